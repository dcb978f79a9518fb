import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from accelerate.state import AcceleratorState
from runs import make_driver, make_run, settings
from toy import ToyTask

from tritprune.criteria import SnipMomentum
from tritprune.pruners import RetrainFreePruner
from tritprune.training.loop import Loop, distillation_loss
from tritprune.training.settings import Distillation


def curves(folder):
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def test_distillation_is_the_scaled_divergence_from_the_teacher():
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    p, q = F.softmax(teacher / 2, -1), F.softmax(student / 2, -1)
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(
        4 * float((p * (p / q).log()).sum()), rel=1e-5
    )
    assert float(distillation_loss(student, student, 2.0)) == pytest.approx(0.0, abs=1e-7)


def test_full_distillation_ignores_the_labels(tmp_path):
    """With weight 1 and a student that is its teacher, loss and gradients are zero, whatever the labels say."""
    task = ToyTask()
    run = make_run(tmp_path, task, settings(distillation=Distillation(weight=1.0)))
    student, teacher = task.build_model(0), task.build_model(0)
    before = [parameter.clone() for parameter in student.parameters()]
    Loop(run, student, run.settings.dense, name="prune", teacher=teacher).fit()
    for old, new in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-6)
    assert all(abs(r["loss/train"]) < 1e-6 for r in curves(tmp_path) if "loss/train" in r)


@pytest.mark.parametrize("steps", [4, 16])  # fewer and more examples than the split has: asked each time, asked once
def test_distillation_pulls_towards_the_teacher(tmp_path, steps):
    task = ToyTask()
    options = settings(distillation=Distillation(weight=1.0))
    run = make_run(tmp_path, task, options)
    phase = type(options.prune)(**{**vars(options.prune), "steps": steps, "lr": 0.02})
    Loop(run, task.build_model(1), phase, name="prune", teacher=task.build_model(0)).fit()
    losses = [r["loss/train"] for r in curves(tmp_path) if "loss/train" in r]
    assert losses[-1] < losses[0]


def test_the_curves_have_every_promised_name(tmp_path):
    make_driver(make_run(tmp_path / "run", ToyTask(), settings()), tmp_path / "cache").execute()
    records = curves(tmp_path / "run")
    assert [r["step"] for r in records if "loss/train" in r] == list(range(1, 23))
    assert [r["stage"] for r in records if "loss/train" in r] == ["dense"] * 6 + ["prune"] * 12 + ["recover"] * 4
    names = {name for record in records for name in record}
    assert names >= {
        "loss/train", "loss/eval", "accuracy/eval", "lr", "sparsity/global", "sparsity/target", "sparsity/first",
        "sparsity/second", "masks/flip_rate", "masks/skipped_gradients", "time/step_ms", "time/forward_ms",
        "time/backward_ms", "time/score_ms", "time/mask_ms",
    }  # fmt: skip
    pruning = [r for r in records if r["stage"] in ("prune", "recover") and "sparsity/global" in r]
    assert pruning[-1]["sparsity/global"] == 0.75
    assert all(r["sparsity/global"] <= r["sparsity/target"] for r in pruning)


def test_after_the_last_mask_update_nothing_is_scored(tmp_path):
    class Counting(SnipMomentum):
        calls = 0

        def accumulate_(self, *arguments):
            Counting.calls += 1
            super().accumulate_(*arguments)

    run = make_run(tmp_path / "run", ToyTask(), settings())
    make_driver(run, tmp_path / "cache", criterion=Counting()).execute()
    assert Counting.calls == 12  # the 12 steps to end_step, none of the 4 after it


@pytest.mark.parametrize("tune", [False, True])
def test_calibration_in_the_loop_has_no_dropout_no_clipping_and_no_teacher(tmp_path, tune):
    """Pruner retrain_free sees what calibrate() sees; nothing is trained until it has chosen, and then it is."""
    task = ToyTask(dropout=0.5)
    run = make_run(tmp_path, task, settings(clip=1e-3, distillation=Distillation(weight=1.0)))
    model, twin, teacher = (task.build_model(0) for _ in range(3))
    pruner, alone = (
        RetrainFreePruner(net, include=["second"], end_step=8, exclude_head=False, pattern="channelx1", tune=tune)
        for net in (model, twin)
    )
    chosen = []
    pruner.on_update(lambda event: chosen.append({n: w.clone() for n, w in model.state_dict().items()}))
    loop = Loop(run, model, run.settings.prune, name="prune", pruner=pruner, teacher=teacher)
    batches = [task.collate("train", indices) for step in range(8) for indices in loop._batches.micro_batches(step)]
    alone.calibrate(batches, lambda net, batch: task.loss(net(batch["x"]), batch))
    loop.fit()
    assert pruner.digest() == alone.digest()
    assert alone.fisher_losses == pruner.fisher_losses
    (after,) = chosen
    assert pruner.tuning_errors == alone.tuning_errors
    assert bool(pruner.tuning_errors) == tune
    assert tune or all(torch.equal(after[name], weight) for name, weight in twin.state_dict().items())
    assert not torch.equal(model.first.weight, after["first.weight"])  # the 8 steps after calibration
    assert [r["stage"] for r in curves(tmp_path) if "loss/train" in r] == ["prune"] * 8 + ["recover"] * 8


def test_training_in_bf16_gives_the_same_budget_and_plain_weights(tmp_path):
    AcceleratorState._reset_state()
    try:
        run = make_run(tmp_path / "run", ToyTask(), settings(precision="bf16"))
        assert run.accelerator.mixed_precision == "bf16"
        driver = make_driver(run, tmp_path / "cache")
        result = driver.execute()
    finally:
        AcceleratorState._reset_state()
    pruned = result["rows"][1]
    assert pruned["sparsity"]["prunable"]["zeros"] == 144  # three quarters of 192
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "pruned" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
