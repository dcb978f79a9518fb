"""Lightning's callback: the plain loop's bits, checkpoints, resuming, and what is refused before time is spent."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritprune import Pruner, RetrainFreePruner
from tritprune.errors import CheckpointError, ConfigError
from tritprune.integrations import LightningPruning

SETTINGS = {"pattern": "4x1", "target_sparsity": 0.8, "frequency": 3}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`isinstance.treespec, LeafSpec",  # Lightning 2.6 and torch 2.13
        "The 'train_dataloader' does not have many workers",
        ".*You called `self.log",
        ".*Experiment logs directory",
        "Checkpoint directory",
        "You.re resuming from a checkpoint that ended before the epoch ended",
        "Using ModelCheckpoint with manual optimization",
        "Be aware that when using `ckpt_path`, callbacks used to create",
    )
]


def late(**changes):
    return LightningPruning(**{**SETTINGS, "start_step": 1, "end_step": 8, **changes})


@pytest.fixture(scope="module")
def shown(example):
    return example("lightning_trainer")


@pytest.fixture
def manual(shown):
    """The example with an optimization of its own: two micro-batches a step."""

    class Manual(shown.Digits):
        automatic_optimization = False
        micro_batches = 0

        def training_step(self, batch):
            optimizer = self.optimizers()
            (super().training_step(batch) / 2).backward()
            self.micro_batches += 1
            if self.micro_batches % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()

    return Manual


@pytest.fixture
def fit(shown, tmp_path):
    """``fit(callback, ...)``: the trained module, and ``(step, zeros)`` after every batch."""
    lightning = importlib.import_module("lightning")

    def run(pruning, *, module=None, resume=None, stop=None, steps=12, **changes):
        module = shown.Digits() if module is None else module
        seen = []

        class Watch(lightning.Callback):
            def on_train_batch_end(self, trainer, *_):
                seen.append((pruning.pruner.step, pruning.pruner.sparsity().prunable.zeros))
                if trainer.global_step == stop:
                    raise RuntimeError("killed")

        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1
        )
        settings = {"max_epochs": -1, "max_steps": steps, "enable_model_summary": False, **changes}
        trainer, own = shown.make_trainer(tmp_path, keep, Watch(), **settings)
        trainer.callbacks[trainer.callbacks.index(own)] = pruning
        trainer.fit(module, shown.make_loader(), ckpt_path=resume)
        return module, seen

    return run


def plain_loop(shown, *, accumulate=1, steps=12):
    """The same without Lightning."""
    module = shown.Digits()
    optimizer = module.configure_optimizers()
    pruner = Pruner(module, **SETTINGS, start_step=1, end_step=8).attach(optimizer)
    seen, micro_batches = [], 0
    while True:
        for images, labels in shown.make_loader():
            (F.cross_entropy(module.net(images), labels) / accumulate).backward()
            micro_batches += 1
            if micro_batches % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            seen.append((pruner.step, pruner.sparsity().prunable.zeros))
            if pruner.step == steps:
                return module, pruner, seen


@pytest.mark.parametrize("way", ["automatic", "accumulating", "manual"])
def test_the_plain_loops_bits(shown, manual, fit, outcome, way):
    """Automatic optimization gives the optimizer a closure that computes the gradients; manual does not."""
    pruning = late()
    changes = {"accumulating": {"accumulate_grad_batches": 2}, "manual": {"module": manual()}}.get(way, {})
    module, seen = fit(pruning, **changes)
    expected, pruner, plain_seen = plain_loop(shown, accumulate=1 if way == "automatic" else 2)
    assert seen == plain_seen
    assert seen[-1] == (12, int(0.8 * 16384 / 4) * 4)
    assert outcome(module, pruning.pruner) == outcome(expected, pruner)
    assert not pruning.pruner.attached


@pytest.fixture
def by_step(shown, manual):
    """``by_step(way)``: the module with batches that are a function of the step: Lightning forgets where it was."""
    batches = list(shown.make_loader())

    def make(way):
        class ByStep(manual if way == "manual" else shown.Digits):
            def training_step(self, batch):
                return super().training_step(batches[self.trainer.global_step])

        return ByStep()

    return make


@pytest.mark.parametrize(("way", "stop", "resume"), [("automatic", 6, 4), ("automatic", 11, 8), ("manual", 6, 4)])
def test_killed_and_resumed_to_the_same_bits(by_step, fit, outcome, tmp_path, way, stop, resume):
    pruning = late()
    module, _ = fit(pruning, module=by_step(way))
    expected = outcome(module, pruning.pruner)
    killed = late()
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, module=by_step(way), stop=stop)
    for again in (late(), killed):
        resumed, seen = fit(again, module=by_step(way), resume=tmp_path / f"step={resume}.ckpt")
        assert seen[0][0] <= resume + 1
        assert outcome(resumed, again.pruner) == expected


def test_resuming_without_the_pruners_state_would_be_another_run(by_step, fit, tmp_path):
    """The comparison above can fail."""
    pruning, forgetful = late(), late()
    fit(pruning, module=by_step("automatic"))
    forgetful.load_state_dict = lambda state: None
    forgetful.on_train_start = lambda *_: None
    fit(forgetful, module=by_step("automatic"), resume=tmp_path / "step=4.ckpt")
    assert forgetful.pruner.digest() != pruning.pruner.digest()


def test_the_other_name_of_lightning(shown, outcome, tmp_path):
    """pytorch_lightning has classes of its own; the callback is of whichever was imported before it."""
    other = importlib.import_module("pytorch_lightning")
    module = importlib.import_module("tritprune.integrations.lightning")
    spec = importlib.util.spec_from_file_location("second_copy", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert issubclass(copy.LightningPruning, other.Callback)

    class Digits(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = shown.Digits().net

        training_step, configure_optimizers = shown.Digits.training_step, shown.Digits.configure_optimizers

    trained = Digits()
    pruning = copy.LightningPruning(**SETTINGS, start_step=1, end_step=8)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = other.Trainer(
        default_root_dir=tmp_path, max_steps=12, callbacks=pruning, enable_model_summary=False, **settings
    )
    trainer.fit(trained, shown.make_loader())
    expected, pruner, _ = plain_loop(shown)
    assert outcome(trained, pruning.pruner) == outcome(expected, pruner)


def test_fractions_and_epochs_are_of_lightnings_length(fit):
    batches = 29
    cases = [
        ({"start_step": 0.25, "end_step": 0.5}, {"steps": 12}, (3, 6)),
        ({"start_step": 1, "end_step": "0.5ep"}, {"steps": -1, "max_epochs": 1}, (1, batches // 2)),
        (
            {"start_step": 1, "end_step": "1ep"},
            {"steps": -1, "max_epochs": 1, "accumulate_grad_batches": 4},
            (1, batches // 4 + 1),
        ),
    ]
    for settings, changes, steps in cases:
        pruning = late(**settings)
        fit(pruning, **changes)
        assert (pruning.pruner.start_step, pruning.pruner.end_step) == steps


def test_sparsity_is_logged(fit):
    lightning = importlib.import_module("lightning")

    class Metrics(lightning.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append((trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}))

    pruning, metrics = late(), Metrics()
    pruning.on_train_batch_end, inner = (
        (lambda *a: (inner(*a), metrics.on_train_batch_end(*a))),
        (pruning.on_train_batch_end),
    )
    fit(pruning)
    step, logged = metrics.seen[-1]
    assert step == 12
    assert logged["sparsity"] == pytest.approx(pruning.pruner.sparsity().prunable.sparsity)
    assert logged["sparsity_target"] == pytest.approx(0.8)
    assert metrics.seen[0][1]["sparsity"] < logged["sparsity"]


def test_wrong_use_is_told_before_the_first_step(fit, manual):
    cases = [
        (late(end_step=13), {}, r"pruner.end_step=13 is past the end of training, the Trainer's optimizer steps=12"),
        (late(end_step=0.5), {"module": manual()}, r"0.5 becomes a step only where total_steps is known"),
        (late(total_steps=5), {"module": manual()}, r"pruner.end_step=8 is past the end of training, total_steps=5"),
    ]
    for pruning, changes, said in cases:
        with pytest.raises(ConfigError, match=said):
            fit(pruning, **changes)
        assert pruning.pruner is None
    pruning = late()
    fit(pruning)
    with pytest.raises(ConfigError, match="has pruned already, up to step 12; make a new one"):
        fit(pruning)


@pytest.fixture
def divided(shown):
    """``divided("extra", "net")``: the example beside another layer, with an optimizer for each of these parts."""

    class Divided(shown.Digits):
        automatic_optimization = False

        def __init__(self, *parts):
            super().__init__()
            self.extra, self.parts = nn.Linear(1, 1), parts

        def configure_optimizers(self):
            return [torch.optim.SGD(self.get_submodule(part).parameters(), lr=0.1) for part in self.parts]

        def training_step(self, batch):
            optimizers = self.optimizers()
            super().training_step(batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return Divided


def test_of_several_optimizers_that_of_the_layers_is_followed(fit, divided):
    pruning = late(include=["net.**"])
    fit(pruning, module=divided("extra", "net"), steps=24)  # Lightning counts the steps of both
    assert pruning.pruner.step == 12


def test_optimizers_without_the_layers_or_with_a_part_each_are_refused(fit, divided):
    with pytest.raises(ConfigError, match="the 2 optimizers have none of the 2 weights to prune"):
        fit(late(include=["net.0", "net.2"]), module=divided("extra", "net.4"))
    said = r"2 weights to prune are in 2 optimizers \(SGD has 1, first net.0; SGD has 1, first net.2\).*with include"
    with pytest.raises(ConfigError, match=said):
        fit(late(include=["net.0", "net.2"]), module=divided("net.0", "net.2"))


def test_a_checkpoint_without_the_pruners_state_is_refused(shown, fit, tmp_path):
    lightning = importlib.import_module("lightning")
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}")
    trainer, _ = shown.make_trainer(tmp_path, limit_train_batches=4, max_epochs=1, enable_model_summary=False)
    trainer.callbacks[:] = [keep]
    trainer.fit(shown.Digits(), shown.make_loader())
    with pytest.raises(CheckpointError, match="Lightning resumes at step 4 from a checkpoint without a pruner's state"):
        fit(late(), resume=tmp_path / "step=4.ckpt")


def test_what_a_validation_loaded_is_not_taken_for_a_new_training(shown, fit, tmp_path):
    pruning = late()
    pruning.load_state_dict({"pruner": {"format": "of another run"}})
    fit(pruning)
    assert pruning.pruner.step == 12


def test_a_training_that_ends_early_is_told(fit, caplog):
    pruning = late(pruner="iterative")
    fit(pruning, max_epochs=-1, steps=12, max_time={"seconds": 0})
    assert "training ended after" in caplog.text
    assert "before the last mask update at 8" in caplog.text


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_calibration_sees_no_dropout(shown, fit):
    """The masks are those of calibrate() on the same batches; training after it has its dropout again."""

    class Dropped(shown.Digits):
        def __init__(self):
            super().__init__()
            self.net.insert(2, nn.Dropout(0.5))
            self.net[4].eval()  # a mode of its own, which comes back
            self.seen = []

        def training_step(self, batch):
            self.seen.append((batch, self.net[2].training, self.net[4].training))
            return super().training_step(batch)

    settings = {"pattern": "channelx1", "include": ["net.3"], "target_sparsity": 0.5}
    pruning = LightningPruning("retrain_free", end_step=4, **settings)
    module, _ = fit(pruning, module=Dropped(), steps=6)
    assert [modes for _, *modes in module.seen] == [[False, False]] * 4 + [[True, False]] * 2
    twin = Dropped()
    expected = RetrainFreePruner(twin, **settings)
    batches = [batch for batch, *_ in module.seen[:4]]
    expected.calibrate(batches, lambda model, batch: F.cross_entropy(model.net(batch[0]), batch[1]))
    assert pruning.pruner.digest() == expected.digest()
