"""Every known defect of the system that this one follows, by its name: the public API does not have it."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tritprune
from tritprune import Pruner, from_neural_compressor, get_pruner, slim_model
from tritprune.errors import ConfigError, TraceError, TritpruneError
from tritprune.patterns import find_attentions
from tritprune.pruners import find_head
from tritprune.slimming import ClassifierHeadSearcher, Linear2LinearSearcher, SelfMHASearcher


class Residual(nn.Module):
    """Two blocks with residual adds, an output that two linears read, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.up = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.left, self.right = nn.Linear(12, 8), nn.Linear(12, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.classifier(self.left(x).relu() * self.right(x))


def chain(*widths: int) -> nn.Sequential:
    """Linears, seeded; every layer but the last is prunable."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths)))


def train(model, optimizer, steps, shape=(8, 6), first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(torch.randn(shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def attached(model, lr=0.05, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    settings = {"target_sparsity": 0.5, "start_step": 1, "end_step": 4} | settings
    return Pruner(model, **settings).attach(optimizer), optimizer


class Ops(TorchDispatchMode):
    """Counts operations, and those that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# ---- masks and counts ----------------------------------------------------------------------------------------------


def test_a_layer_that_the_block_does_not_divide_crashed_training():
    model = chain(6, 10, 7, 3)
    pruner, optimizer = attached(model, pattern="4x1")
    train(model, optimizer, 5)
    rows = {row["name"]: row for row in pruner.layer_report()}
    assert rows["0"]["units"] == 3 * 6  # blocks of 4, 4 and 2 outputs
    assert rows["1"]["units"] == 2 * 10  # blocks of 4 and 3 outputs
    # units of 4, 3 and 2 weights: at most the target, and less than one unit below it
    assert 130 / 2 - 4 < sum(row["zeros"] for row in rows.values()) <= 130 / 2


def test_all_counts_recomputed_for_every_layer():
    """One mask update: operations and the host's reads grow with the layers, not with their square."""
    counted = []
    for layers in (6, 12, 24):
        model = chain(*[6] * (layers + 2))
        _, optimizer = attached(model, end_step=3)
        train(model, optimizer, 1)
        with Ops() as ops:
            train(model, optimizer, 1, first=1)
        counted.append(ops)
    small, middle, large = counted
    assert large.all - middle.all <= 2.1 * (middle.all - small.all)  # linear: 2; quadratic: 4
    assert large.reads - middle.reads <= 2 * (middle.reads - small.reads)
    assert large.reads < 3 * 24 + 10  # theirs: 144 a layer for BERT-base; on a GPU ours do not depend on the layers


def test_the_count_of_operations_can_fail():
    with Ops() as ops:
        for value in torch.ones(5):
            value.item()
    assert ops.reads == 5


def test_per_step_overhead_goes_on_after_the_end():
    counted = []
    for settings in ({"end_step": 100}, {"end_step": 2}):
        model = chain(6, 8, 8, 3)
        pruner, optimizer = attached(model, start_step=2, frequency=200, **settings)
        train(model, optimizer, 3)
        with Ops() as ops:
            train(model, optimizer, 1, first=3)
        counted.append(ops.all)
        assert bool(pruner.scores) == (settings["end_step"] == 100)
    assert counted[1] < counted[0]


def test_sparsity_of_1in4_reported_as_0():
    model = chain(8, 8, 8, 3)
    pruner, optimizer = attached(model, pattern="1:4", target_sparsity=0.25)
    train(model, optimizer, 4, shape=(8, 8))
    assert pruner.sparsity().prunable.sparsity == pruner.current_sparsity_ratio == 0.25
    assert {row["sparsity"] for row in pruner.layer_report()} == {0.25}


def test_sparsity_of_gpt2_reported_as_7_68():
    """Hugging Face's Conv1D was missing from the denominator."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    pruner = get_pruner("one_shot", model, criterion="magnitude", start_step=0, target_sparsity=0.5)
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    weights = [module.weight for name, module in model.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc"))]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == sum(weight.numel() for weight in weights) / 2
    report = pruner.sparsity()
    assert report.prunable.sparsity == 0.5
    for count in (report.prunable, report.linear_conv, report.parameters):
        assert 0 < count.sparsity <= 0.5


def test_ties_over_pruned():
    """Asked 0.5 of a constant layer, got 1.0."""
    model = chain(8, 8, 3)
    nn.init.constant_(model[0].weight, 0.1)
    pruner = get_pruner("one_shot", model, criterion="magnitude", pattern="1x1", start_step=0, target_sparsity=0.5)
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert int((model[0].weight == 0).sum()) == 32
    assert pruner.sparsity().prunable.sparsity == 0.5


@pytest.mark.parametrize(("pattern", "target", "floor"), [("1x1", 0.5, 0.4), ("4x1", 0.5, 0.25), ("2:4", 0.3, 0.25)])
def test_the_minimum_ratio_was_not_a_floor(pattern, target, floor):
    model = chain(8, 8, 8, 8, 3)
    with torch.no_grad():
        model[0].weight.mul_(100)  # by score alone nothing of it would go
    config = {"pattern": pattern, "target_sparsity": target, "min_sparsity_ratio_per_op": floor}
    config |= {"pruning_type": "magnitude", "start_step": 1, "end_step": 3}
    pruner = from_neural_compressor(config, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    pruner.attach(optimizer)
    train(model, optimizer, 3, shape=(8, 8))
    assert min(row["sparsity"] for row in pruner.layer_report()) >= floor
    unit = {"1x1": 1, "4x1": 4, "2:4": 2}[pattern]
    assert pruner.sparsity().prunable.zeros == math.floor(target * 192 / unit) * unit


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)], ids=["zeroed a 2:4 model", "unlocked a 1:4 model"])
def test_locking_a_2in4_model_zeroed_it_and_locking_1in4_unlocked_it(n, m):
    model = chain(8, 8, 8, 3)
    once = get_pruner("one_shot", model, criterion="magnitude", pattern=f"{n}:{m}", start_step=0, target_sparsity=n / m)
    once.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    once.detach()
    zeros = [layer.weight == 0 for layer in model[:2]]
    assert sum(int(zero.sum()) for zero in zeros) == 128 * n // m
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = from_neural_compressor({"pruning_type": "pattern_lock", "pattern": f"{n}:{m}"}, model).attach(optimizer)
    for again in range(2):  # idempotent
        train(model, optimizer, 3, shape=(8, 8), first=3 * again)
        assert all(torch.equal(layer.weight == 0, zero) for layer, zero in zip(model[:2], zeros, strict=True))
    assert pruner.current_sparsity_ratio == n / m


@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
def test_progressive_mode_never_made_partial_blocks_for_4x1_and_refused_2in4(pattern):
    model = chain(8, 8, 8, 8, 3)
    config = {"pruning_type": "snip_momentum_progressive", "pattern": pattern, "target_sparsity": 0.5}
    pruner = from_neural_compressor({**config, "start_step": 4, "end_step": 12, "pruning_frequency": 8}, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner.attach(optimizer)
    partial = 0
    for step in range(14):
        train(model, optimizer, 1, shape=(8, 8), first=step)
        for layer in model[:3]:
            zero = layer.weight == 0
            gone = zero.view(2, 4, 8).sum(1) if pattern == "4x1" else zero.view(8, 2, 4).sum(2)
            partial += int(((gone > 0) & (gone < (4 if pattern == "4x1" else 2))).sum())
    assert partial > 0
    assert pruner.sparsity().prunable.sparsity == 0.5


# ---- scores --------------------------------------------------------------------------------------------------------


def test_a_layer_without_a_gradient_crashed():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.classifier = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.classifier(self.used(x))

    torch.manual_seed(0)
    model = Idle()
    pruner, optimizer = attached(model, pattern="1x1")
    train(model, optimizer, 5)
    assert pruner.sparsity().prunable.sparsity == 0.5


def test_one_infinite_gradient_poisoned_the_momentum_for_ever():
    model = chain(6, 8, 8, 3)
    pruner, optimizer = attached(model, lr=0.0, pattern="1x1", start_step=4, end_step=8, frequency=2)
    handle = model[0].weight.register_hook(lambda grad: grad.masked_fill(torch.eye(8, 6, dtype=torch.bool), torch.inf))
    model(torch.randn(4, 6)).sum().backward()
    handle.remove()
    with torch.no_grad():
        optimizer.step()
        model[0].weight.nan_to_num_()  # what the infinite gradient did to the weights is the optimizer's affair
    optimizer.state.clear()
    assert all(torch.isfinite(scores).all() for scores in pruner.scores.values())
    train(model, optimizer, 8)
    assert pruner.sparsity().prunable.sparsity == 0.5


def test_gradient_criterion_regrew_weights_unasked():
    model = chain(6, 8, 8, 3)
    pruner, optimizer = attached(model, criterion="gradient", pattern="1x1", schedule="linear", end_step=8)
    gone: dict[str, torch.Tensor] = {}
    for step in range(8):
        train(model, optimizer, 1, first=step)
        for name, mask in pruner.masks.items():
            assert not (mask.mask & gone.get(name, torch.zeros_like(mask.mask))).any()
            gone[name] = ~mask.mask
    assert pruner.sparsity().prunable.sparsity == pytest.approx(0.5, abs=0.005)


def test_low_memory_scores_in_fp16_underflowed():
    """Scores of 1e-9 and less are 0 in fp16; then all units are equal."""
    digests = []
    for settings in ({}, {"low_memory_usage": True}):
        model = chain(6, 8, 8, 3)
        config = {"pattern": "4x1", "target_sparsity": 0.5, "start_step": 1, "end_step": 2, **settings}
        pruner = from_neural_compressor(config, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner.attach(optimizer)
        batch = torch.randn((8, 6), generator=torch.Generator().manual_seed(0))
        (model(batch).square().mean() * 1e-9).backward()
        optimizer.step()
        scores = torch.cat([score.flatten().float() for score in pruner.scores.values()])
        assert 0 < scores.min() <= scores.max() < 1e-8
        digests.append(scores)
    torch.testing.assert_close(digests[0], digests[1], rtol=2**-8, atol=0)


def test_group_lasso_divided_by_the_gradient_norm():
    """A unit without a gradient was divided by 1e-12: its weights blew up. Proximal on weights, they only shrink."""
    model = chain(6, 8, 8, 3)
    config = {"reg_type": "group_lasso", "reg_coeff": 0.01, "start_step": 1, "end_step": 20, "target_sparsity": 0.5}
    pruner = from_neural_compressor(config, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    before = [layer.weight.detach().clone() for layer in model[:2]]
    (model(torch.zeros(4, 6)) * 0).sum().backward()  # gradients of zero
    optimizer.step()
    for layer, old in zip(model[:2], before, strict=True):
        assert (layer.weight.abs() <= old.abs()).all()
        assert (layer.weight.abs() < old.abs()).any()
        assert torch.isfinite(layer.weight).all()


# ---- configs -------------------------------------------------------------------------------------------------------


def test_a_mutable_default_made_the_second_config_of_a_process_equal_to_the_first():
    from tritprune.neural_compressor import WeightPruningConfig

    first = WeightPruningConfig(pattern="1x1", end_step=3)
    first.pruning_configs[0]["op_names"] = ["0"]
    model = chain(6, 8, 8, 3)
    assert [layer.name for layer in from_neural_compressor(first, model).layers] == ["0"]
    second = WeightPruningConfig(end_step=3)
    pruner = from_neural_compressor(second, model)
    assert [layer.name for layer in pruner.layers] == ["0", "1"]
    assert pruner.groups[0].pattern == "4x1"


def test_a_top_level_key_silently_ignored():
    """``reg_coeff`` was overwritten by a default inside ``parameters``; unknown keys were warned about and dropped."""
    config = {"criterion_reduce_type": "max", "end_step": 3, "pruning_configs": [{"pattern": "1x1"}]}
    assert from_neural_compressor(config, chain(6, 8, 3)).groups[0].reduce == "max"
    from tritprune.neural_compressor.reading import read, resolve

    shared, (group,) = read({"reg_type": "group_lasso", "reg_coeff": 0.1})
    assert resolve(shared, group)["reg_coeff"] == 0.1
    with pytest.raises(ConfigError, match="did you mean 'criterion_reduce_type'"):
        from_neural_compressor({**config, "criterion_reduce": "max"}, chain(6, 8, 3))


def test_no_state_dict_and_a_resume_key_that_nothing_reads():
    straight, stopped = chain(6, 8, 8, 3), chain(6, 8, 8, 3)
    whole, optimizer = attached(straight, end_step=8, pattern="1x1")
    train(straight, optimizer, 8)
    first, optimizer = attached(stopped, end_step=8, pattern="1x1")
    train(stopped, optimizer, 4)
    resumed = chain(6, 8, 8, 3)
    resumed.load_state_dict(stopped.state_dict())
    second = Pruner(resumed, target_sparsity=0.5, start_step=1, end_step=8, pattern="1x1")
    second.load_state_dict(first.state_dict())
    again = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    second.attach(again)
    train(resumed, again, 4, first=4)
    assert second.digest() == whole.digest()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
    with pytest.raises(ConfigError, match="load_state_dict"):
        from_neural_compressor({"resume_from_pruned_checkpoint": True, "end_step": 3}, chain(6, 8, 3))


def test_pruning_op_types_linear_iterated_characters():
    config = {"pruning_op_types": "Linear", "op_names": "0", "end_step": 3}
    assert [layer.name for layer in from_neural_compressor(config, chain(6, 8, 8, 3)).layers] == ["0"]
    with pytest.raises(ConfigError, match=r"write \['0'\]"):
        Pruner(chain(6, 8, 3), end_step=3, include="0")


def test_the_excluded_heads_name_used_as_a_regex_excluded_other_layers():
    """``out`` took ``output_proj``, ``layer.1`` took ``layer.10``."""

    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
            self.output_proj = nn.Linear(8, 8)
            self.out = nn.Linear(8, 3)

    names = [layer.name for layer in Pruner(Model(2), end_step=3).layers]
    assert names == ["layer.0", "layer.1", "output_proj"]
    config = {"excluded_op_names": ["layer.1"], "end_step": 3}
    names = [layer.name for layer in from_neural_compressor(config, Model(12)).layers]
    assert "layer.1" not in names
    assert {"layer.10", "layer.11", "output_proj"} < set(names)


def test_a_model_without_linear_crashed_head_detection():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert find_head(model) is None
    assert ClassifierHeadSearcher(model).search() in (None, "2")  # theirs takes a convolution for a head, too
    assert ClassifierHeadSearcher(nn.Sequential(nn.ReLU())).search() is None
    assert [layer.name for layer in Pruner(model, end_step=3).layers] == ["0", "2"]


# ---- in the loop ---------------------------------------------------------------------------------------------------


def test_torch_save_failed_after_attaching():
    model = chain(6, 8, 8, 3)
    _, optimizer = attached(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    copy.deepcopy(model)


def test_evaluation_forwards_pruned():
    model = chain(6, 8, 8, 3)
    pruner, optimizer = attached(model, end_step=2)
    train(model, optimizer, 1)
    before, digest = copy.deepcopy(model.state_dict()), pruner.digest()
    model.eval()
    for _ in range(5):
        model(torch.randn(2, 6))
    model.train()
    model(torch.randn(2, 6)).sum().backward()
    assert pruner.digest() == digest
    assert pruner.step == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_two_pruners_on_one_layer_multiplied_in_silence():
    model = chain(6, 8, 8, 3)
    _, optimizer = attached(model, include=["0"])
    with pytest.raises(ConfigError, match="0 is being pruned by another pruner"):
        Pruner(model, end_step=3).attach(optimizer)
    Pruner(model, end_step=3, include=["1"]).attach(optimizer)
    with pytest.raises(ConfigError, match="0 is in two pruner groups"):
        from_neural_compressor({"end_step": 3, "pruning_configs": [{"op_names": ["0"]}, {}]}, model)


def test_storage_re_allocated_every_step():
    model = chain(6, 8, 8, 3)
    _, optimizer = attached(model)
    before = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    train(model, optimizer, 6)
    assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == before


# ---- slimming ------------------------------------------------------------------------------------------------------


def damaged_residual() -> Residual:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.up[0].weight[:7] = 0
        model.down[1].weight[:, 3:9] = 0
        model.embed.weight[:4] = 0  # rows that a residual add reads
        model.left.weight[2] = 0  # one of two readers of a fan-out
    return model


def test_slimming_through_a_residual_add_or_a_fan_out_broke_the_model():
    model, x = damaged_residual(), torch.randn(5, 6)
    result = slim_model(model, torch.randn(2, 6))
    torch.testing.assert_close(result.model(x), model(x))
    assert [(cut.where, cut.after) for cut in result.cuts if cut.where.startswith("down")] == [
        ("down.0", 13),
        ("down.1", 14),
    ]
    assert result.certificate.holds
    if result.model.embed.out_features == 12:  # not cut, but not silently: the residual add has several readers
        assert any(refusal.where == "embed" and "4 of 12 rows" in refusal.reason for refusal in result.refused)


def test_every_slimming_error_swallowed():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            raise RuntimeError("broken on purpose")

    with pytest.raises(TraceError, match="broken on purpose"):
        slim_model(Untraceable(), torch.randn(2, 6))
    with pytest.raises(TritpruneError):
        slim_model(Residual(), "no input")


def test_slimming_chose_channels_at_random_and_did_not_update_the_config_so_nothing_reloaded(tmp_path):
    from tritprune.export import save_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[::3] = 0
        layer.attention.self.value.weight[6:12] = 0
        layer.attention.output.dense.weight[:, 6:12] = 0
    tokens = {"input_ids": torch.arange(16).view(2, 8)}
    first, second = (slim_model(model, tokens) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    builder = {"kind": "transformers", "class": "BertForSequenceClassification"}
    save_model(first.model, tmp_path / "slim", builder=builder, widths=first.widths)
    loaded = tritprune.load(tmp_path / "slim")
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(loaded(**tokens).logits, model(**tokens).logits)


def tiny_llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, **{**sizes, **heads, **settings})
    ).eval()


def test_tracing_failed_on_decoders():
    """Cache objects are among a decoder's outputs."""
    model, tokens = tiny_llama(), {"input_ids": torch.arange(12).view(2, 6)}
    assert model.config.use_cache
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:5] = 0
            layer.mlp.up_proj.weight[:5] = 0
            layer.mlp.down_proj.weight[:, :5] = 0
    result = slim_model(model, tokens)
    assert [cut.after for cut in result.cuts] == [19, 19]
    torch.testing.assert_close(result.model(**tokens).logits, model(**tokens).logits)


def test_tracing_failed_on_vision_models():
    """Their searchers gave every model a tensor of integers."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    assert len(SelfMHASearcher(model).search()) == 1
    assert Linear2LinearSearcher(model).search()
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(slim_model(model, image).model(image).logits, model(image).logits)


def test_tracing_failed_on_fused_qkv():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.classifier = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            return self.classifier((x + self.proj(mixed)).mean(1))

    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        model.qkv.weight[32:36] = 0  # the values of the first head
        model.proj.weight[:, :4] = 0
    result = slim_model(model, x)
    assert [item["heads"] for item in result.found if item["kind"] == "attention"] == [4]
    torch.testing.assert_close(result.model(x), model(x))
    # cut, or refused with a reason: not silently left
    assert result.cuts or any("qkv" in refusal.where for refusal in result.refused)


def test_tracing_failed_on_grouped_query_attention():
    """Found 0 heads."""
    model = tiny_llama(num_key_value_heads=2)
    assert len(find_attentions(model)) == 2
    found = SelfMHASearcher(model).search()
    assert [[name.rpartition(".")[2] for name in item["qkv"]] for item in found] == [["q_proj", "k_proj", "v_proj"]] * 2
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    result = slim_model(model, tokens)
    assert [item["heads"] for item in result.found if item["kind"] == "attention"] == [4, 4]
    torch.testing.assert_close(result.model(**tokens).logits, model(**tokens).logits)
    pruner = get_pruner("heads", model, criterion="magnitude", target_sparsity=0.5, end_step=0, schedule="one_shot")
    assert {(row["unit"], row["units"]) for row in pruner.layer_report()} == {("head group of 2", 2)}
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    zeros = {name: int((model.get_submodule(name).weight == 0).sum()) for name in pruner.modules}
    assert sum(zeros.values()) == pruner.verify().zeros == 2 * (16 * 16 * 2 + 16 * 8 * 2) / 2
