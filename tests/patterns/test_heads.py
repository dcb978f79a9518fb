"""Heads: found by name, counted from configs and attributes, cut in query, key, value and output together."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomModel,
    DistilBertConfig,
    DistilBertModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    Qwen2Model,
)

from tritprune import get_pruner
from tritprune.errors import ConfigError
from tritprune.patterns import WeightView, find_attentions, get_pattern, head_count, set_reduction
from tritprune.pruners import LayerMask


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


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 9}
LLAMA = {**SMALL, "num_attention_heads": 4, "intermediate_size": 8}
NEOX = {**SMALL, "num_attention_heads": 4, "intermediate_size": 8}
FALCON = {**SMALL, "num_attention_heads": 4, "alibi": False}
DECODERS = {  # model, key/value heads, query heads of each
    "llama": (lambda: LlamaModel(LlamaConfig(**LLAMA, num_key_value_heads=4)), 4, 1),
    "llama, grouped": (lambda: LlamaModel(LlamaConfig(**LLAMA, num_key_value_heads=2)), 2, 2),
    "mistral, multi-query": (lambda: MistralModel(MistralConfig(**LLAMA, num_key_value_heads=1)), 1, 4),
    "qwen2, wide heads": (lambda: Qwen2Model(Qwen2Config(**LLAMA, num_key_value_heads=2, head_dim=6)), 2, 2),
    "gpt2": (lambda: GPT2Model(GPT2Config(vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=4)), 4, 1),
    "gpt_neox": (lambda: GPTNeoXModel(GPTNeoXConfig(**NEOX)), 4, 1),
    "bloom": (lambda: BloomModel(BloomConfig(vocab_size=9, hidden_size=16, n_layer=2, n_head=4)), 4, 1),
    "phi3": (lambda: Phi3Model(Phi3Config(**LLAMA, num_key_value_heads=2, pad_token_id=0)), 2, 2),
    "falcon, grouped": (
        lambda: FalconModel(FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)), 2, 2,
    ),
    "falcon, multi-query": (lambda: FalconModel(FalconConfig(**FALCON, multi_query=True)), 1, 4),
    "falcon, apart": (lambda: FalconModel(FalconConfig(**FALCON, multi_query=False)), 4, 1),
}  # fmt: skip


@pytest.mark.parametrize(("make", "units", "group"), DECODERS.values(), ids=DECODERS)
def test_the_rows_of_a_head_are_those_that_its_columns_read(make, units, group):
    """Without the query, key and value rows of a unit, what the output linear reads changes in its columns alone."""
    torch.manual_seed(0)
    model, tokens = make().eval(), torch.arange(7).view(1, 7)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    pattern, site = get_pattern("heads"), sites_of(model)[0]
    assert (site.grid.shape, site.group) == ((1, units), group)
    assert pattern.unit_name(site) == ("head" if group == 1 else f"head group of {group}")
    read = []
    site.views[-1].module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach().clone()))
    for view in site.views[:-1]:
        if view.module.bias is not None:
            view.module.bias.data.zero_()
    with torch.no_grad():
        model(tokens)
        weights = [view.parameter.detach().clone() for view in site.views]
        for unit in range(units):
            keep = torch.ones(1, units, dtype=torch.bool)
            keep[0, unit] = False
            masks = pattern.layer_masks(site, keep, [], [])
            assert torch.equal(pattern.kept_units(site, masks), keep)
            assert int(pattern.broken_units(site, masks)) == 0
            spoilt = [masks[0].clone(), *masks[1:]]
            spoilt[0][0 if unit else -1] = ~spoilt[0][0 if unit else -1]
            assert int(pattern.broken_units(site, spoilt)) == 1 or units == 1
            elements = [
                LayerMask(mask, block, view.kind, view.weight_shape).element_mask()
                for mask, block, view in zip(masks, site.blocks, site.views, strict=True)
            ]
            assert sum(int((~mask).sum()) for mask in elements) == site.grid.uniform_size
            for view, weight, mask in zip(site.views[:-1], weights, elements, strict=False):
                view.parameter.copy_(weight * mask)
            model(tokens)
            for view, weight in zip(site.views, weights, strict=True):
                view.parameter.copy_(weight)
            dense, masked = read[0], read.pop()
            columns = elements[-1].any(0) if site.views[-1].kind == "linear" else elements[-1].any(1)
            assert torch.equal(masked[..., columns], dense[..., columns])
            assert not masked[..., ~columns].any()
            assert dense[..., ~columns].all()


def test_scores_of_a_grouped_head_are_over_its_queries_too():
    """Two key/value heads, two queries each; rows of the fused linear: 4 queries, 2 keys, 2 values, one row each."""
    torch.manual_seed(0)
    config = Phi3Config(**{**LLAMA, "hidden_size": 4, "num_key_value_heads": 2, "pad_token_id": 0})
    pattern, site = get_pattern("heads"), sites_of(Phi3Model(config))[0]
    assert site.blocks == ((1, 4), (4, 2))
    scores = [torch.tensor([[1.0], [2], [3], [4], [10], [20], [100], [200]]), torch.tensor([[0.5, 0.25]])]
    ones = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    # a block of the fused linear has 4 elements, one of the output 8
    mean = pattern.unit_scores(site, scores, ones)[0].tolist()
    assert mean == pytest.approx([(4 * 113 + 8 * 0.5) / 24, (4 * 227 + 8 * 0.25) / 24])
    set_reduction(pattern, "sum")
    assert pattern.unit_scores(site, scores, ones)[0].tolist() == [113.5, 227.25]
    masks = pattern.layer_masks(site, torch.tensor([[False, True]]), scores, ones)
    assert masks[0].flatten().tolist() == [False, False, True, True, False, True, False, True]
    assert pattern.alive_units(site, masks).tolist() == [[False, True]]


def test_groups_that_do_not_fit_are_refused_with_numbers():
    model = LlamaModel(LlamaConfig(**LLAMA, num_key_value_heads=2))
    model.layers[0].self_attn.k_proj = nn.Linear(16, 12)
    with pytest.raises(
        ConfigError, match="query has 16 rows for 4 heads of 4, key 12, value 8, output 16 columns; the"
    ):
        sites_of(model)
    for name in ("k_proj", "v_proj"):
        setattr(model.layers[0].self_attn, name, nn.Linear(16, 4))
    with pytest.raises(ConfigError, match="the config says 2 key/value heads"):
        sites_of(model)


def test_fused_rows_of_unknown_order_are_refused_with_numbers():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(16, 48), nn.Linear(16, 16), 4

    with pytest.raises(
        ConfigError, match=r"qkv holds query.*48 rows, and nothing says.*model_type is None; known: gpt2"
    ):
        sites_of(Fused())
    model = GPTNeoXModel(GPTNeoXConfig(**NEOX))
    model.layers[0].attention.query_key_value = nn.Linear(16, 40)
    with pytest.raises(ConfigError, match="has 40 rows; 4 query and 4 key/value heads of 4 need 48"):
        sites_of(model)


@pytest.mark.parametrize("name", ["llama, grouped", "gpt2", "falcon, grouped"])
def test_half_of_the_heads_of_a_decoder_go(name):
    torch.manual_seed(0)
    model, tokens = DECODERS[name][0](), torch.arange(7).view(1, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = get_pruner("heads", model, target_sparsity=0.5, start_step=1, end_step=3).attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
    assert pruner.current_sparsity_ratio == pruner.sparsity().prunable.sparsity == 0.5
    pruner.verify()
    zeros = {name: mask.element_mask() for name, mask in pruner.masks.items()}
    pruner.detach()
    locked = get_pruner("pattern_lock", model, pattern="heads")
    assert {name: mask.element_mask().tolist() for name, mask in locked.masks.items()} == {
        name: mask.tolist() for name, mask in zeros.items()
    }


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
