"""Neural Compressor configs as their users have them: every key is honoured, or refused with what replaces it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import tritprune
from tritprune.criteria import criteria
from tritprune.errors import ConfigError
from tritprune.neural_compressor import WeightPruningConfig, from_neural_compressor, keys, prepare_pruning
from tritprune.neural_compressor.keys import KEYS, REFUSED, RENAMED
from tritprune.pruners import Pruner, pruners

STEPS = {"start_step": 1, "end_step": 10}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **sizes))


def settings_of(config, model, **arguments):
    """The settings of the only group."""
    (group,) = from_neural_compressor(config, model, **arguments).groups
    return group


def names_of(config, model):
    return [layer.name for layer in from_neural_compressor({**STEPS, **config}, model).layers]


# ---- forms ---------------------------------------------------------------------------------------------------------

DOCUMENTED = {  # from the docstring of WeightPruningConfig, version 2.6
    "pruning_configs": [
        {
            "pruning_scope": "local",
            "target_sparsity": 0.6,
            "op_names": ["query", "key", "value"],
            "pattern": "channelx1",
            "pruning_type": "magnitude",
        },
        {"pruning_type": "snip_momentum", "target_sparsity": 0.5, "op_names": ["attention.output.dense"]},
    ],
    "target_sparsity": 0.8,
    "start_step": 1,
    "end_step": 10,
}
YAML = """
pruning:
  approach:
    weight_compression_v2:
      start_step: 1
      end_step: 10
      target_sparsity: 0.8
      pruners:
        - !Pruner
            pruning_scope: local
            target_sparsity: 0.6
            op_names: [query, key, value]
            pattern: channelx1
            pruning_type: magnitude
        - !Pruner
            op_names: [attention.output.dense]
            target_sparsity: 0.5
"""


def as_object():
    """Shaped as neural_compressor.WeightPruningConfig is."""
    config = copy.deepcopy(DOCUMENTED)
    groups = [SimpleNamespace(pruner_config=group) for group in config.pop("pruning_configs")]
    return SimpleNamespace(backend=None, pruning_configs=groups, weight_compression=config)


@pytest.mark.parametrize("form", ["mapping", "yaml", "flat yaml", "object", "class"])
def test_every_form_gives_the_same_groups(form, bert, tmp_path):
    file = tmp_path / "nc.yaml"
    file.write_text(YAML if form == "yaml" else str(DOCUMENTED))
    forms = {
        "mapping": DOCUMENTED,
        "yaml": file,
        "flat yaml": str(file),
        "object": as_object(),
        "class": WeightPruningConfig(**copy.deepcopy(DOCUMENTED)),
    }
    first, second = from_neural_compressor(forms[form], bert).groups
    assert (first.scope, first.target_sparsity, first.pattern, first.criterion) == (
        "local",
        0.6,
        "channelx1",
        "magnitude",
    )
    assert len(first.include) == 36
    assert (second.scope, second.target_sparsity, second.pattern, second.criterion) == (
        "global",
        0.5,
        "4x1",
        "snip_momentum",
    )
    assert len(second.include) == 12


def test_a_config_is_left_as_it_is_and_two_of_a_process_share_nothing(bert):
    config = copy.deepcopy(DOCUMENTED)
    from_neural_compressor(config, bert)
    assert config == DOCUMENTED
    first, second = WeightPruningConfig(), WeightPruningConfig()
    first.pruning_configs[0]["pattern"] = "2:4"
    assert second.pruning_configs == [{}]


def test_their_defaults_hold(bert):
    group = settings_of({"end_step": 10}, bert)
    assert (group.target_sparsity, group.pattern, group.criterion) == (0.9, "4x1", "snip_momentum")
    assert (group.scope, group.schedule, group.frequency, group.start_step) == ("global", "exp", 1, 0)
    assert (group.min_layer_sparsity, group.max_layer_sparsity, group.reduce) == (0.0, 0.98, "mean")
    assert group.exclude_head


# ---- layers --------------------------------------------------------------------------------------------------------


def test_op_names_are_regular_expressions_searched_for_anywhere(bert):
    assert len(names_of({"op_names": [r"layer\.[01]\..*(query|key)$"]}, bert)) == 4
    assert len(names_of({"op_names": ["query"], "excluded_op_names": [r"layer\.[0-9]\."]}, bert)) == 2


def test_the_exact_name_of_a_module_is_that_module(bert):
    names = names_of({"op_names": ["bert.encoder.layer.1"]}, bert)
    assert len(names) == 6
    assert all(name.startswith("bert.encoder.layer.1.") for name in names)
    left = names_of({"excluded_op_names": ["bert.encoder.layer.1"]}, bert)
    assert any(name.startswith("bert.encoder.layer.10.") for name in left)
    assert not any(name.startswith("bert.encoder.layer.1.") for name in left)


def test_a_bare_string_is_one_name(bert):
    assert len(names_of({"op_names": "query", "pruning_op_types": "Linear"}, bert)) == 12
    assert len(names_of({"op_names": ["query", "key"], "excluded_op_names": "key"}, bert)) == 12


def test_excluded_names_without_a_match_exclude_nothing(bert):
    config = {"op_names": ["query"], "excluded_op_names": ["LayerNorm", ".*embeddings*", "pooler"]}
    assert len(names_of(config, bert)) == 12


def test_an_excluded_layer_has_its_reason(bert):
    config = {**STEPS, "op_names": ["query"], "excluded_op_names": [r"layer\.3\."]}
    reasons = {e.name: e.reason for e in from_neural_compressor(config, bert).excluded}
    assert "excluded" in reasons["bert.encoder.layer.3.attention.self.query"]
    assert reasons["bert.encoder.layer.3.attention.self.key"] == "not included"


def test_the_head_is_excluded_by_its_exact_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    assert names_of({}, Model()) == ["out_proj"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"op_names": ["qurey"]}, "op_names 'qurey' finds no layer"),
        ({"op_names": ["("]}, "no regular expression"),
        ({"op_names": 3}, "list of names"),
        ({"pruning_op_types": ["LayerNorm"]}, r"finds 25 layers such as bert.embeddings.LayerNorm"),
        ({"pruning_configs": [{"op_names": ["query"]}, {}]}, "in two pruner groups"),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(config, message, bert):
    with pytest.raises(ConfigError, match=message):
        from_neural_compressor({**STEPS, **config}, bert)


def test_pruning_op_types_choose_by_class_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))
    assert names_of({"pruning_op_types": ["Conv"]}, model) == ["0"]
    assert names_of({}, model) == ["0", "2"]


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "frequency", "last"), [(1, 10, 3, 10), (1, 9, 3, 7), (0, 10, 4, 8), (5, 6, 9, 5), (4, 4, 1, 4)]
)
def test_the_last_update_is_theirs(start, end, frequency, last, bert):
    config = {"start_step": start, "end_step": end, "pruning_frequency": frequency}
    group = settings_of(config, bert)
    assert (group.start_step, group.end_step, group.frequency) == (start, last, frequency)


def test_steps_may_be_fractions_or_epochs(bert):
    config = {"start_step": 0.1, "end_step": "2ep"}
    group = settings_of(config, bert, total_steps=100, steps_per_epoch=30)
    assert (group.start_step, group.end_step) == (10, 60)
    with pytest.raises(ConfigError, match="total_steps"):
        settings_of(config, bert)
    with pytest.raises(ConfigError, match="past the end of training, 50"):
        settings_of({"end_step": 51}, bert, total_steps=50)


def test_the_schedule_is_theirs_at_every_update(bert):
    """1 - (1 - a)^(j / n) at their update j of n."""
    pruner = from_neural_compressor({"start_step": 2, "end_step": 23, "pruning_frequency": 5}, bert)
    asked = [pruner.target_at(step) for step in (2, 7, 12, 17, 22)]
    assert asked == pytest.approx([1 - 0.1 ** (j / 4) for j in range(5)])


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_every_key_is_in_the_table_once():
    names = [key.name for key in KEYS]
    assert len({*names, *REFUSED, *RENAMED}) == len(names) + len(REFUSED) + len(RENAMED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_sparsty": 0.5}, "did you mean 'target_sparsity'"),
        ({"pruning_configs": [{"patern": "4x1"}]}, r"pruning_configs\[0\] has no key 'patern'; did you mean 'pattern'"),
        ({"resume_from_pruned_checkpoint": True}, "load_state_dict"),
        ({"backend": "itex"}, r"kernels\.backend"),
        ({"prune_domain": "local"}, "1.x; write pruning_scope"),
        ({"pruning_type": "sparse_gpt"}, "not here yet"),
        ({"pruning_type": "snip_momentun"}, "did you mean 'snip_momentum'"),
        ({"sparsity_decay_type": "cubic"}, "Zhu and Gupta"),
        ({"pattern": 124}, "quote 2:4"),
        ({"pruning_type": "magnitude", "criterion_type": "snip"}, "write pruning_type: snip"),
        ({"reg_type": "lasso"}, "group_lasso"),
        ({"reg_coeff": 0.1}, "without reg_type"),
        ({"reg_type": "group_lasso", "reg_coeff": "much"}, "a number"),
        ({"reg_type": "group_lasso", "reg_coeff": 0.1, "pattern": "2:4", "target_sparsity": 0.5}, "block pattern"),
        ({"reg_coeff": 0.1, "parameters": {"reg_coeff": 0.2}}, "give one of them"),
        ({"parameters": {"alpha": 0.2}}, "known: reg_coeff"),
        ({"end_step": 0, "start_step": 0}, "needs gradients"),
        ({"end_step": 0}, "before start_step"),
        ({"pruning_frequency": 0}, "pruning_frequency"),
        ({"pruning_scope": "everywhere"}, "scope is one of"),
        ({"pattern": "2:4"}, "the most that pattern 2:4 can prune"),
        ({"target_sparsity": 0.99}, "raise max_layer_sparsity or lower the target"),
        ({"pruning_configs": "all"}, "list of mappings"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_with_what_replaces_it(config, message, bert):
    with pytest.raises(ConfigError, match=message):
        from_neural_compressor({**STEPS, **config}, bert)


@pytest.mark.parametrize("config", [[], 3, "nowhere.yaml", {"pruning": {"approach": {}}}], ids=str)
def test_what_is_no_config_is_refused(config, bert):
    with pytest.raises(ConfigError):
        from_neural_compressor(config, bert)


def test_keys_that_say_nothing_are_accepted(bert):
    config = {
        "resume_from_pruned_checkpoint": False,
        "backend": None,
        "reg_type": None,
        "parameters": {"reg_coeff": 0.0},
    }
    assert settings_of({**STEPS, **config}, bert).target_sparsity == 0.9


def test_the_other_keys_reach_our_settings(bert):
    config = {
        **STEPS,
        "pattern": "tile_pattern_2:4",
        "target_sparsity": 0.4,
        "max_sparsity_ratio_per_op": 0.45,
        "min_sparsity_ratio_per_op": 0.1,
        "criterion_reduce_type": "sum",
        "sparsity_decay_type": "cube",
        "pruning_type": "gradient",
    }
    group = settings_of(config, bert)
    assert (group.pattern, group.max_layer_sparsity, group.min_layer_sparsity) == ("2:4", 0.45, 0.1)
    assert (group.reduce, group.schedule, group.criterion) == ("sum", "cube", "gradient")


def test_mha_is_heads_and_there_criterion_type_counts(bert):
    pruner = from_neural_compressor(
        {**STEPS, "pattern": "mha", "target_sparsity": 0.5, "criterion_type": "magnitude"}, bert
    )
    assert (pruner.pattern.label, pruner.groups[0].criterion) == ("head", "magnitude")


def test_pruners_of_several_kinds_are_refused_by_name(bert, monkeypatch):
    monkeypatch.setitem(pruners._entries, "pattern_lock", Pruner)  # whether or not there is one
    first = {"op_names": ["query"], "pruning_type": "pattern_lock"}
    with pytest.raises(ConfigError, match=r"\[0\] needs pruner 'pattern_lock', .*\[1\] needs pruner 'iterative'"):
        from_neural_compressor({**STEPS, "pruning_configs": [first, {"op_names": ["key"]}]}, bert)


@pytest.mark.parametrize(
    ("config", "kind", "name"),
    [
        ({"pruning_type": "pattern_lock"}, "pruner", "pattern_lock"),
        ({"pruning_type": "snip_progressive"}, "pruner", "progressive"),
        ({"pruning_type": "retrain_free"}, "pruner", "retrain_free"),
        ({"pruning_type": "block_mask"}, "criterion", "snip_momentum_block"),
    ],
    ids=str,
)
def test_a_part_that_is_missing_is_named(config, kind, name, bert, monkeypatch):
    """Whether or not it is missing now: its registry is emptied of it."""
    monkeypatch.delitem({"pruner": pruners, "criterion": criteria}[kind]._entries, name, raising=False)
    with pytest.raises(
        ConfigError, match=f"pruning_type '{config['pruning_type']}' needs {kind} '{name}', which is not"
    ):
        from_neural_compressor({**STEPS, **config}, bert)
    assert f"`{name}`, not here yet" in keys.table()


# ---- use -----------------------------------------------------------------------------------------------------------


def test_prepare_pruning_prunes_to_exactly_the_target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = WeightPruningConfig(target_sparsity=0.5, pattern="4x1", start_step=1, end_step=4)
    pruner = prepare_pruning(model, config, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
    assert pruner.sparsity().prunable.zeros == 300
    assert pruner.current_sparsity_ratio == 0.5


def test_it_is_public():
    assert tritprune.from_neural_compressor is from_neural_compressor
