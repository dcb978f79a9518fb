"""Post-training pruning: mask gradients against autograd, rearrangement by hand and brute force."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tritprune import RetrainFreePruner, from_neural_compressor
from tritprune.errors import ConfigError, NonFiniteScoreError
from tritprune.pruners.rearrangement import fisher_loss, rearrange


class Block(nn.Module):
    """Two feed-forward layers with dropout and an attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 8)
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads = 4
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(8, 3)
        self.channel_mask, self.head_mask = torch.ones(9), torch.ones(4)

    def forward(self, x):
        x = self.down(self.drop(F.gelu(self.up(x))) * self.channel_mask)  # [B, S, 8]
        q, k, v = (part(x).unflatten(-1, (4, 2)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v) * self.head_mask.view(4, 1, 1)
        return self.classifier(x + self.output(mixed.transpose(1, 2).flatten(2))).mean(1)


def block(seed=0):
    torch.manual_seed(seed)
    return Block()


def batches(count=5, first=0):
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn((4, 3, 6), generator=generator), torch.randint(0, 3, (4,), generator=generator)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


GROUPS = [
    {"name": "channels", "include": ["down"], "pattern": "channelx1", "target_sparsity": 0.45},
    {"name": "heads", "include": ["query", "key", "value", "output"], "pattern": "heads", "target_sparsity": 0.5},
]


def test_mask_gradients_are_those_of_masks_on_channels_and_heads():
    """Autograd of real mask variables in the forward pass gives the same numbers."""
    model = block()
    pruner = RetrainFreePruner(model, groups=GROUPS)
    expected = {"down": torch.zeros(9), "output": torch.zeros(4)}
    model.eval()
    for batch in batches():
        model.channel_mask, model.head_mask = (torch.ones(n, requires_grad=True) for n in (9, 4))
        loss(model, batch).backward()
        expected["down"] += model.channel_mask.grad.square()
        expected["output"] += model.head_mask.grad.square()
        pruner._update_scores(None)
        model.zero_grad()
    assert {name: tuple(score.shape) for name, score in pruner.scores.items()} == {"down": (1, 9), "output": (1, 4)}
    for name, score in pruner.scores.items():
        torch.testing.assert_close(score.flatten(), expected[name], rtol=1e-4, atol=1e-9)


def test_calibration_changes_no_weight_but_those_that_go():
    model = block().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruner = RetrainFreePruner(model, groups=GROUPS)
    event = pruner.calibrate(batches(), loss)
    assert model.training
    assert model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())
    masks = pruner.masks
    assert set(masks) == {"down", "query", "key", "value", "output"}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        kept = masks[layer].element_mask() if layer in masks else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(weight, torch.where(kept, before[name], 0))
    assert [int((model.down.weight == 0).all(0).sum()), int((model.output.weight == 0).all(0).sum())] == [4, 4]
    assert event.layers["down"].zeros == 32
    assert pruner.verify().zeros == 32 + 4 * 32
    with pytest.raises(ConfigError, match="chosen already"):
        pruner.calibrate(batches(), loss)


def test_a_training_loop_can_calibrate():
    """The first end_step steps move neither weights nor the optimizer; the masks are those of calibrate()."""
    model, twin = block().eval(), block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    pruner = RetrainFreePruner(model, groups=GROUPS, end_step=5).attach(optimizer)
    assert pruner.calibrating
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    assert not pruner.calibrating
    assert not optimizer.state
    expected = RetrainFreePruner(twin, groups=GROUPS)
    expected.calibrate(batches(), loss)
    assert pruner.digest() == expected.digest()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    model.train()
    for batch in batches(first=5):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    assert pruner.digest() == expected.digest()
    assert pruner.verify().zeros == 160
    assert not torch.equal(model.up.weight, before["up.weight"])


def test_rearrangement_by_hand():
    """Units 0 and 1 have the least Fisher information, but they pull together; 2 makes up for 0."""
    gradients = torch.tensor([[1.0, 1.1, -1.2, 5.0], [0.0, 0.0, 0.1, 5.0]])
    searched = torch.tensor([False, False, True, True])
    found = rearrange(searched, gradients, torch.ones(4, dtype=torch.int64))
    # joined by unit 2: without 0 it is (1.1 - 1.2)^2 + 0.1^2 = 0.02, without 1 (1 - 1.2)^2 + 0.1^2 = 0.05
    assert found.tolist() == [True, False, False, True]
    assert fisher_loss(searched, gradients) == pytest.approx(4.41)
    assert fisher_loss(found, gradients) == pytest.approx(0.02)
    assert searched.tolist() == [False, False, True, True]


def test_units_of_another_size_and_units_that_are_gone_are_not_exchanged():
    gradients = torch.tensor([[1.0, 1.1, -1.2, 5.0], [0.0, 0.0, 0.1, 5.0]])
    searched = torch.tensor([False, False, True, True])
    sizes = torch.tensor([4, 4, 3, 4])
    assert torch.equal(rearrange(searched, gradients, sizes), searched)
    fixed = torch.tensor([True, False, False, False])
    found = rearrange(searched, gradients, torch.ones(4, dtype=torch.int64), fixed)
    assert found.tolist() == [False, True, False, True]  # 2 for 1: the only one that may come back


def test_what_ties_stays():
    gradients = torch.ones(2, 5)
    searched = torch.tensor([True, True, False, False, True])
    assert torch.equal(rearrange(searched, gradients, torch.ones(5, dtype=torch.int64)), searched)


@given(units=st.integers(1, 7), rows=st.integers(1, 4), seed=st.integers(0, 10**6), share=st.integers(0, 7))
def test_rearranging_never_costs_and_brute_force_bounds_it(units, rows, seed, share):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randint(-4, 5, (rows, units), generator=generator).float()
    diagonal = gradients.square().sum(0)
    gone = diagonal.argsort(stable=True)[: min(share, units)]
    searched = torch.ones(units, dtype=torch.bool)
    searched[gone] = False
    found = rearrange(searched, gradients, torch.ones(units, dtype=torch.int64))
    assert int(found.sum()) == int(searched.sum())
    best = min(
        fisher_loss(torch.tensor([i not in chosen for i in range(units)]), gradients)
        for chosen in itertools.combinations(range(units), len(gone))
    )
    assert best <= fisher_loss(found, gradients) <= fisher_loss(searched, gradients)


def test_the_rearranged_model_is_not_worse_by_its_fisher_blocks_and_each_layer_keeps_its_count():
    losses = []
    for rearranges in (False, True):
        model = block(3)
        pruner = RetrainFreePruner(model, groups=GROUPS, rearrange=rearranges)
        pruner.calibrate(batches(20), loss)
        losses.append(pruner)
    plain, better = losses
    assert plain.fisher_losses == {}
    assert set(better.fisher_losses) == {"down", "attention"}
    assert all(after <= before for before, after in better.fisher_losses.values())
    assert any(after < before for before, after in better.fisher_losses.values())
    counts = [[row["zeros"] for row in pruner.layer_report()] for pruner in losses]
    assert counts[0] == counts[1]
    assert plain.digest() != better.digest()


def captured(model, name, batch):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.eval()(batch[0])
    handle.remove()
    return seen[0]


def test_tuning_is_the_least_squares_fit_of_what_is_left():
    """Against torch.linalg.lstsq on the design matrix written out, with its damping as rows of their own."""
    model, dense, data = block(2), block(2), list(batches(6))
    pruner = RetrainFreePruner(model, include=["down"], target_sparsity=0.45, tune=True)
    pruner.calibrate(data, loss)
    kept = pruner.masks["down"].element_mask().any(0)
    assert int(kept.sum()) == 5
    design, wanted = [], []
    for batch in data:
        read, made = captured(dense, "down", batch)  # the first pruned layer: the pruned model reads the same
        design.append(torch.einsum("bsc,oc->bsoc", read, dense.down.weight[:, :]).flatten(0, 2)[:, kept])
        wanted.append((made - dense.down.bias).flatten())
    design, wanted = torch.cat(design).double().detach(), torch.cat(wanted).double().detach()
    damping = 1e-3 * design.square().sum(0).mean()
    rows = damping.sqrt() * torch.eye(5, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat([design, rows]), torch.cat([wanted, rows.sum(0)])).solution
    expected = dense.down.weight.detach()[:, kept] * fit.float()
    torch.testing.assert_close(model.down.weight.detach()[:, kept], expected, rtol=1e-4, atol=1e-6)
    assert not model.down.weight[:, ~kept].any()
    before, after = pruner.tuning_errors["down"]
    errors = [(design @ m - wanted).square().sum() / wanted.square().sum() for m in (torch.ones_like(fit), fit)]
    assert (before, after) == pytest.approx(tuple(map(float, errors)))
    assert after < before
    pruner.verify()


def test_layers_are_tuned_in_the_order_in_which_they_run_and_none_gets_worse():
    model, twin = block(2), block(2)
    tuned, plain = (RetrainFreePruner(net, groups=GROUPS[::-1], tune=net is model) for net in (model, twin))
    tuned.calibrate(batches(8), loss)
    plain.calibrate(batches(8), loss)
    assert list(tuned.tuning_errors) == ["down", "output"]
    assert all(after <= before for before, after in tuned.tuning_errors.values())
    assert tuned.digest() == plain.digest()
    assert plain.tuning_errors == {}
    heads = model.output.weight.detach() / twin.output.weight.detach().where(twin.output.weight != 0, 1)
    assert torch.allclose(heads.view(8, 4, 2), heads.view(8, 4, 2)[:1, :, :1], atol=1e-6)  # one factor a head
    assert torch.equal(model.query.weight, twin.query.weight)
    with torch.no_grad():
        dense, data = block(2).eval(), list(batches(8))
        errors = [sum(float((net.eval()(x) - dense(x)).square().sum()) for x, _ in data) for net in (model, twin)]
    assert errors[0] < errors[1]


def test_tuning_comes_after_the_choice():
    with pytest.raises(ConfigError, match="calibrate first"):
        RetrainFreePruner(block(), include=["down"]).tune(list(batches()), loss, block())


def test_a_calibration_that_is_stopped_goes_on():
    digests = []
    for stop in (5, 2):
        model = block().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = RetrainFreePruner(model, groups=GROUPS, end_step=5).attach(optimizer)
        for number, batch in enumerate(batches()):
            if number == stop:
                file = io.BytesIO()
                torch.save(pruner.state_dict(), file)
                file.seek(0)
                model = block().eval()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                pruner = RetrainFreePruner(model, groups=GROUPS, end_step=5)
                pruner.load_state_dict(torch.load(file, weights_only=True))
                pruner.attach(optimizer)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        digests.append(pruner.digest())
    assert digests[0] == digests[1]


def test_a_layer_without_a_gradient_keeps_its_units():
    model = block()
    model.idle = nn.Linear(6, 9)
    pruner = RetrainFreePruner(model, include=["down", "idle"], target_sparsity=0.3)
    event = pruner.calibrate(batches(), loss)
    assert event.layers["idle"].zeros == 0
    assert any("idle has no gradient" in warning for warning in event.warnings)
    assert event.layers["down"].zeros == 32  # 37.8 of 126 weights may go, 8 a unit


def test_non_finite_gradients_are_left_out_and_non_finite_weights_refused():
    model = block()
    handle = model.down.weight.register_hook(lambda grad: grad.masked_fill(torch.eye(8, 9) > 0, torch.inf))
    pruner = RetrainFreePruner(model, include=["down"])
    event = pruner.calibrate(batches(3), loss)
    handle.remove()
    assert event.skipped_gradients == 3 * 8
    assert event.layers["down"].zeros == 32
    model = block()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan
    pruner = RetrainFreePruner(model, include=["down"])
    with pytest.raises(NonFiniteScoreError, match="down"):
        pruner.calibrate([next(iter(batches()))], lambda model, batch: model.down.weight.nan_to_num().sum())


def test_a_neural_compressor_config_calibrates():
    config = {"pruning_type": "retrain_free", "pattern": "channelx1", "op_names": ["down"], "target_sparsity": 0.5}
    pruner = from_neural_compressor({**config, "end_step": 5}, block())
    assert isinstance(pruner, RetrainFreePruner)
    assert pruner.final_step == 5
    assert pruner.calibrate(batches(), loss).layers["down"].zeros == 32
    model = block()
    groups = [{"op_names": ["down"]}, {"op_names": ["query", "key", "value", "output"], "pattern": "mha"}]
    shared = {"pruning_type": "retrain_free", "pattern": "channelx1", "end_step": 3, "target_sparsity": 0.5}
    pruner = from_neural_compressor({**shared, "pruning_configs": groups}, model)
    assert [group.pattern for group in pruner.groups] == ["channelx1", "heads"]
    for key, value in {"start_step": 2, "pruning_frequency": 5, "sparsity_decay_type": "cube"}.items():
        with pytest.raises(ConfigError, match=f"{key}={value!r} cannot be honoured with pruning_type 'retrain_free'"):
            from_neural_compressor({**config, "end_step": 5, key: value}, block())
    with pytest.raises(ConfigError, match="low_memory_usage does nothing with pruning_type 'retrain_free'"):
        from_neural_compressor({**config, "end_step": 5, "low_memory_usage": True}, block())
    with pytest.raises(ConfigError, match="end_step is 0"):
        from_neural_compressor(config, block())


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_a_control_stands_in_the_same_place(criterion):
    model = block()
    pruner = RetrainFreePruner(model, groups=GROUPS, criterion=criterion)
    event = pruner.calibrate(batches(2), loss)
    assert event.layers["down"].zeros == 32
    assert pruner.verify().zeros == 160


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "2:4"}, "pattern 2:4 has no block per unit; use channelx1"),
        ({"criterion": "snip"}, "calibrated by criterion retrain_free, got Snip"),
        ({"end_step": 0}, "needs calibration batches"),
        ({"rearrange": 1}, "rearrange is true or false"),
        ({"pattern": "1xchannel", "tune": True}, r"down has units of pattern 1xchannel \(1x9 of a linear\); use"),
        ({"reduce": "max"}, "cannot be reduced by 'max'"),
        ({"groups": [{"include": ["down"], "frequency": 3}]}, "has no key 'frequency'"),
        ({"groups": [{"include": ["down"], "end_step": 3}]}, "share end_step=32, a group has 3"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        RetrainFreePruner(block(), **{"include": ["down"], **settings})


def test_more_units_than_can_be_kept_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="0 has 66,048 units of pattern 1x1, more than 65,536"):
        RetrainFreePruner(nn.Sequential(nn.Linear(256, 258), nn.Linear(258, 2)), pattern="1x1")


def test_no_batch_is_refused():
    with pytest.raises(ConfigError, match="no batch"):
        RetrainFreePruner(block(), include=["down"]).calibrate([], loss)


def test_a_calibration_that_fails_can_be_tried_again_and_counts_no_batch_twice():
    settings = {"pattern": "channelx1", "include": ["down"], "target_sparsity": 0.5}
    expected = RetrainFreePruner(block(), **settings)
    expected.calibrate(batches(), loss)

    def failing():
        yield from batches(3)
        raise OSError("the disk went away")

    pruner = RetrainFreePruner(block(), **settings)
    with pytest.raises(OSError, match="the disk went away"):
        pruner.calibrate(failing(), loss)
    assert (pruner.step, pruner.calibrating) == (0, True)
    pruner.calibrate(batches(), loss)
    assert pruner.digest() == expected.digest()
    assert pruner.fisher_losses == expected.fisher_losses


def test_several_optimizers_are_refused_while_it_calibrates():
    model = block()
    pruner = RetrainFreePruner(model, pattern="channelx1", include=["down"], target_sparsity=0.5)
    parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.down, model.classifier)]
    with pytest.raises(ConfigError, match="was given 2 optimizers"):
        pruner.attach(parts)


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_optimizer_beside_the_followed_one_is_held_still(order):
    """It has a part of the model, and its steps come before or after those that calibrate; then it trains."""
    model = block().eval()
    followed = torch.optim.SGD([*model.down.parameters(), *model.up.parameters()], lr=0.1)
    other = torch.optim.AdamW([*model.output.parameters(), model.query.weight], lr=0.1)
    settings = {"pattern": "channelx1", "include": ["down"], "target_sparsity": 0.5}
    pruner = RetrainFreePruner(model, end_step=5, **settings).attach(followed)
    before = {name: weight.clone() for name, weight in model.state_dict().items() if not name.startswith("down")}
    stray = nn.Parameter(torch.ones(2))
    apart = torch.optim.SGD([stray], lr=0.1)  # trains something else, and goes on
    steps = [apart, other, followed] if order == "before" else [apart, followed, other]
    for batch in batches():
        for optimizer in steps:
            optimizer.zero_grad()
        (loss(model, batch) + stray.sum()).backward()
        for optimizer in steps:
            optimizer.step()
            if order == "before" and optimizer is other:
                assert model.output.weight.grad is not None
    assert not pruner.calibrating
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if name in before)
    assert not other.state
    torch.testing.assert_close(stray.detach(), torch.full((2,), 0.5))
    expected = RetrainFreePruner(block(), **settings)
    expected.calibrate(batches(), loss)
    assert pruner.digest() == expected.digest()
    loss(model, next(batches())).backward()
    other.step()
    assert not torch.equal(model.output.weight, before["output.weight"])


def test_a_pruner_that_is_gone_holds_no_optimizer():
    model = block()
    optimizer, other = torch.optim.SGD(model.down.parameters(), lr=0.1), torch.optim.SGD(model.up.parameters(), lr=0.1)
    pruner = RetrainFreePruner(model, pattern="channelx1", include=["down"], target_sparsity=0.5).attach(optimizer)
    pruner.detach()
    before = model.up.weight.clone()
    loss(model, next(batches())).backward()
    other.step()
    assert not torch.equal(model.up.weight, before)


def test_dropout_while_a_loop_calibrates_is_told_once(caplog):
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    RetrainFreePruner(model, groups=GROUPS, end_step=3).attach(optimizer)
    for batch in batches(4):
        loss(model, batch).backward()
        optimizer.step()
    (record,) = caplog.records
    assert "calibration sees Dropout in training mode (1 modules, first drop)" in record.getMessage()
    assert "set model.eval() for the first 3 steps" in record.getMessage()


def test_a_wrapped_model_is_tuned():
    model = block()
    pruner = RetrainFreePruner(
        nn.DataParallel(model), pattern="channelx1", include=["down"], target_sparsity=0.5, tune=True
    )
    pruner.calibrate(batches(), loss)
    assert set(pruner.tuning_errors) == {"down"}
