"""Heads: found by name, counted from configs and attributes, cut in query, key, value and output together."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
)

from tritprune.errors import ConfigError
from tritprune.patterns import WeightView, find_attentions, get_pattern, head_count, set_reduction


def tiny_bert(**changes):
    torch.manual_seed(0)
    values = {
        "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20, "vocab_size": 30,
        "max_position_embeddings": 16, "num_labels": 5,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**values, **changes})).eval()


class Attention(nn.Module):
    """As in a plain vision transformer."""

    def __init__(self, width=8, heads=4, rows=None, **attributes):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, rows or width) for _ in range(3))
        self.output = nn.Linear(rows or width, width)
        self.n_heads = heads
        for name, value in attributes.items():
            setattr(self, name, value)


def views_of(model):
    views = [WeightView.of(name, module) for name, module in model.named_modules()]
    return [view for view in views if view is not None]


def sites_of(model):
    return get_pattern("heads").sites(views_of(model), model)


def test_the_heads_of_bert():
    sites = sites_of(tiny_bert())
    assert [site.name for site in sites] == [f"bert.encoder.layer.{i}.attention" for i in range(2)]
    site = sites[0]
    assert [view.name.removeprefix(site.name + ".") for view in site.views] == [
        "self.query", "self.key", "self.value", "output.dense",
    ]  # fmt: skip
    assert site.blocks == ((4, 12), (4, 12), (4, 12), (12, 4))
    assert site.grid.shape == (1, 3)
    assert site.grid.uniform_size == 4 * 4 * 12
    assert site.grid.elements == site.elements == 4 * 12 * 12


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (lambda: DistilBertModel(DistilBertConfig(dim=8, n_heads=2, n_layers=1, hidden_dim=8, vocab_size=9)), 2),
        (lambda: LlamaModel(LlamaConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, vocab_size=9)), 4),
        (lambda: nn.ModuleDict({"attention": Attention()}), 4),
        (Attention, 4),
    ],
)
def test_other_names(model, heads):
    sites = sites_of(model())
    assert [site.grid.cols for site in sites] == [heads]


def test_the_nearest_number_of_heads_counts():
    model = nn.ModuleDict({"a": Attention(heads=4), "b": Attention(heads=2)})
    assert [head_count(model, f"{name}.query") for name in "ab"] == [4, 2]
    assert [site.grid.cols for site in sites_of(model)] == [4, 2]


def test_masks_of_all_four_linears():
    model = Attention(width=6, heads=3)
    pattern = get_pattern("heads")
    site = sites_of(model)[0]
    keep = torch.tensor([[True, False, True]])
    scores = [torch.rand(3, 1)] * 3 + [torch.rand(1, 3)]
    masks = pattern.layer_masks(site, keep, scores, scores)
    assert [mask.tolist() for mask in masks] == [[[True], [False], [True]]] * 3 + [[[True, False, True]]]
    assert torch.equal(pattern.kept_units(site, masks), keep)


def test_the_score_of_a_head_is_over_all_its_elements():
    """Query has 2 x 6 elements a head, output 5 x 2: the mean weighs them by that."""
    model = Attention(width=6, heads=3)
    model.output = nn.Linear(6, 5)
    pattern = get_pattern("heads")
    site = sites_of(model)[0]
    q, k, v, o = (torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 0, 0]), torch.tensor([3.0, 0, 0]), torch.ones(3))
    scores = [q.view(3, 1), k.view(3, 1), v.view(3, 1), o.view(1, 3)]
    mean = pattern.unit_scores(site, scores, scores)
    assert mean[0].tolist() == pytest.approx([(12 * 6 + 10) / 46, 10 / 46, 10 / 46])
    set_reduction(pattern, "sum")
    assert pattern.unit_scores(site, scores, scores).tolist() == [[7.0, 1.0, 1.0]]
    set_reduction(pattern, "max")
    assert pattern.unit_scores(site, scores, scores).tolist() == [[3.0, 1.0, 1.0]]


def test_rows_that_the_heads_do_not_divide_are_refused_with_numbers():
    with pytest.raises(ConfigError, match="query has 8 rows, which 3 heads do not divide"):
        sites_of(Attention(width=8, heads=3))


def test_an_unknown_number_of_heads_is_refused():
    model = Attention()
    model.n_heads = None
    with pytest.raises(ConfigError, match="does not say how many heads it has: no num_attention_heads"):
        sites_of(model)


def test_grouped_keys_are_refused_with_numbers():
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=9)
    with pytest.raises(ConfigError, match="query has 8 rows, key 4"):
        sites_of(LlamaModel(config))


def test_an_incomplete_attention_is_refused_by_name():
    model = tiny_bert()
    views = [view for view in views_of(model) if not view.name.endswith("0.attention.output.dense")]
    with pytest.raises(ConfigError, match=r"same group; not among its prunable layers: .*0\.attention\.output\.dense"):
        get_pattern("heads").sites(views, model)


def test_attentions_outside_the_group_are_left_alone():
    model = tiny_bert()
    views = [view for view in views_of(model) if ".layer.1." in view.name]
    assert [site.name for site in get_pattern("heads").sites(views, model)] == ["bert.encoder.layer.1.attention"]
    assert len(find_attentions(model)) == 2
