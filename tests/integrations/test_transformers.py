"""The Trainer's callback: the plain loop's bits, checkpoints, resuming, and what is refused before time is spent."""

import copy
import shutil

import pytest
import torch
from transformers import TrainerCallback

from tritprune import Pruner, RetrainFreePruner
from tritprune.errors import CheckpointError, ConfigError, UnknownNameError
from tritprune.integrations import TransformersPruning

SETTINGS = {"pattern": "4x1", "target_sparsity": 0.8, "frequency": 3}


class Watch(TrainerCallback):
    """Sparsity after every step; ends the process, as far as the Trainer can tell, after ``stop`` steps."""

    def __init__(self, pruning, stop=None):
        self.pruning, self.stop, self.seen = pruning, stop, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((self.pruning.pruner.step, self.pruning.pruner.sparsity().prunable.zeros))
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def build(example):
    """``build(path, pruning, stop=None, **arguments)``: the example's trainer, shortened, its callback and a watch."""
    shown = example("transformers_trainer")
    data = [{"input_ids": x["input_ids"][20:36], "labels": x["labels"]} for x in shown.make_data()]
    shown.make_trainer.__globals__["make_data"] = lambda: data[:600]

    def of(path, pruning, *, stop=None, **changes):
        settings = {"max_steps": 12, "save_steps": 4, "logging_steps": 4, "disable_tqdm": True}
        trainer, own = shown.make_trainer(str(path), **{**settings, "optim": "adamw_torch", **changes})
        if pruning is not None:
            trainer.callback_handler.callbacks.remove(own)
            own = pruning(trainer.model) if callable(pruning) else pruning
            trainer.add_callback(own)
        watch = Watch(own, stop)
        trainer.add_callback(watch)
        return trainer, own, watch

    return of


@pytest.fixture
def make(build, tmp_path):
    """As ``build``, in a folder of the test's own."""
    return lambda folder="run", pruning=None, **changes: build(tmp_path / folder, pruning, **changes)


@pytest.fixture(scope="module")
def whole(build, outcome, tmp_path_factory):
    """An uninterrupted run: its outcome, the sparsity after every step, its folder."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, pruning, watch = build(folder, late())
    trainer.train()
    return outcome(trainer.model, pruning.pruner), watch.seen, folder


def late(**changes):
    return TransformersPruning(**{**SETTINGS, "start_step": 1, "end_step": 8, **changes})


def plain_loop(make, accumulate):
    """The same without Trainer: batches in the Trainer's order, AdamW, linear decay, the pruner on the optimizer."""
    trainer, _, _ = make("plain", gradient_accumulation_steps=accumulate)
    model, args = trainer.model, trainer.args
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (args.max_steps - step) / args.max_steps)
    pruner = Pruner(model, **SETTINGS, start_step=1, end_step=8).attach(optimizer)
    seen, pending = [], []
    torch.manual_seed(args.seed)
    model.train()
    for batch in trainer.get_train_dataloader():
        pending.append(batch)
        if len(pending) < accumulate:
            continue
        items = torch.tensor(sum(len(b["labels"]) for b in pending))
        for micro_batch in pending:
            model(**micro_batch, num_items_in_batch=items).loss.backward()
        pending = []
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        decay.step()
        model.zero_grad()
        seen.append((pruner.step, pruner.sparsity().prunable.zeros))
        if len(seen) == args.max_steps:
            return model, pruner, seen
    raise AssertionError("the data ended early")


def test_the_plain_loops_bits(make, whole, outcome):
    model, pruner, seen = plain_loop(make, accumulate=1)
    assert whole[:2] == (outcome(model, pruner), seen)
    assert seen[-1] == (12, int(0.8 * 17408 / 4) * 4)


def test_the_plain_loops_bits_with_gradient_accumulation(make, outcome):
    trainer, pruning, watch = make(pruning=late(), gradient_accumulation_steps=2)
    trainer.train()
    model, pruner, seen = plain_loop(make, accumulate=2)
    assert (outcome(trainer.model, pruning.pruner), watch.seen) == (outcome(model, pruner), seen)


@pytest.mark.parametrize(("stop", "resume"), [(6, 4), (11, 8)])
def test_killed_and_resumed_to_the_same_bits(make, whole, outcome, stop, resume, tmp_path):
    killed, _, _ = make(pruning=late(), stop=stop)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again, pruning, rest = make(pruning=late())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{resume}"))
    assert rest.seen == whole[1][resume:]
    assert outcome(again.model, pruning.pruner) == whole[0]


def test_resuming_without_the_pruners_state_would_be_another_run(make, whole, tmp_path):
    """The comparison above can fail."""
    shutil.copytree(whole[2] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    pruning = late()
    trainer, _, _ = make(pruning=pruning)
    pruning._restore = lambda args, state: None
    trainer.train(resume_from_checkpoint=True)
    assert pruning.pruner.digest() != whole[0]["masks"]


def test_the_same_trainer_goes_on_after_an_interrupt(make, whole, outcome):
    trainer, pruning, watch = make(pruning=late(), stop=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    watch.stop = None
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer.model, pruning.pruner) == whole[0]


def test_fractions_and_epochs_are_of_the_trainers_length(make):
    trainer, pruning, _ = make(max_steps=40)  # the example: 0.1 to 0.7
    trainer.callback_handler.callbacks.remove(pruning)
    dataloader = trainer.get_train_dataloader()
    for settings, steps in (({}, (4, 28)), ({"end_step": "0.5ep"}, (4, len(dataloader) // 2))):
        fresh = TransformersPruning(**{**SETTINGS, "start_step": 0.1, "end_step": 0.7, **settings})
        trainer.state.max_steps, model = 40, trainer.model
        optimizer = trainer.create_optimizer()
        fresh.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer, train_dataloader=dataloader
        )
        assert (fresh.pruner.start_step, fresh.pruner.end_step) == steps
        fresh.pruner.detach()


def test_sparsity_is_in_the_logs_and_reporters_see_it(make):
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((state.global_step, logs.get("sparsity")))

    trainer, pruning, _ = make()
    trainer.callback_handler.callbacks.insert(1, Reporter())  # where the Trainer puts wandb and TensorBoard
    trainer.train()
    history = [(record["step"], record["sparsity"], record["sparsity_target"]) for record in trainer.state.log_history]
    assert [step for step, _, _ in history] == [4, 8, 12, 12]
    assert history[-1][1] == pruning.pruner.sparsity().prunable.sparsity
    assert history[-1][2] == 0.8
    assert history[0][1] < history[1][1]
    assert told == [(step, sparsity) for step, sparsity, _ in history]


def ready(model, **changes):
    return TransformersPruning(Pruner(model, **SETTINGS, **{"start_step": 1, "end_step": 8, **changes}))


def test_a_ready_pruner(make, whole, outcome):
    trainer, pruning, _ = make(pruning=ready)
    trainer.train()
    assert outcome(trainer.model, pruning.pruner) == whole[0]
    assert not pruning.pruner.attached


def test_the_best_model_comes_with_its_own_masks(make, caplog):
    trainer, pruning, _ = make(
        pruning=late(end_step=12), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
        metric_for_best_model="sparsity_of_run", greater_is_better=False,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"sparsity_of_run": pruning.pruner.current_sparsity_ratio}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert pruning.pruner.step == 4
    assert pruning.pruner.verify().zeros == pruning.pruner.sparsity().prunable.zeros
    assert "load_best_model_at_end chose a model that was not pruned to the end yet" in caplog.text
    assert "training ended after 4 optimizer steps, before the last mask update at 12" in caplog.text


def test_wrong_use_is_told_before_the_first_step(make, caplog):
    cases = [
        (late(end_step=13), {}, r"pruner.end_step=13 is past the end of training, the Trainer's max_steps=12"),
        (late(), {"auto_find_batch_size": True}, "does not work with auto_find_batch_size"),
        (late(end_step="x"), {}, "a step is 100 .optimizer steps., 0.1 .fraction of training. or '2ep'"),
        (late(include=["nothing"]), {}, "include 'nothing' of group 'all' matches no layer"),
    ]
    for pruning, changes, said in cases:
        trainer, _, watch = make(pruning=pruning, **changes)
        with pytest.raises(ConfigError, match=said):
            trainer.train()
        assert watch.seen == []


def test_a_ready_pruner_past_the_end_or_with_settings_is_refused(make):
    trainer, _, _ = make(pruning=lambda model: ready(model, end_step=50))
    with pytest.raises(ConfigError, match="end_step=50 is past the end of training, the Trainer's max_steps=12"):
        trainer.train()
    with pytest.raises(ConfigError, match="was given a pruner, which has its own settings, and also end_step"):
        TransformersPruning(Pruner(trainer.model, end_step=3), end_step=3)
    with pytest.raises(UnknownNameError, match="unknown pruner 'iterativ'; did you mean 'iterative'"):
        TransformersPruning("iterativ", end_step=3)


def test_an_optimizer_without_the_layers_is_refused(make):
    trainer, _, watch = make(pruning=late())
    head = trainer.model.classifier.parameters()
    trainer.optimizer = torch.optim.SGD(head, lr=0.1)
    with pytest.raises(ConfigError, match="the optimizer has none of the 13 weights to prune"):
        trainer.train()
    assert watch.seen == []


def test_a_callback_is_used_once(make):
    trainer, pruning, _ = make(pruning=late())
    trainer.train()
    other, _, _ = make("other", pruning=pruning)
    with pytest.raises(ConfigError, match="has pruned already, up to step 12; make a new one"):
        other.train()
    doubled, twice, _ = make("doubled", pruning=late())
    doubled.add_callback(twice)
    with pytest.raises(ConfigError, match="list it once"):
        doubled.train()
    two, _, _ = make("two", pruning=late(include=["**.query"]))
    two.add_callback(late(include=["**.key"]))
    with pytest.raises(ConfigError, match=r"another TransformersPruning is at work on this model; one with groups="):
        two.train()


def test_a_checkpoint_without_fitting_state_is_named(make, whole, tmp_path):
    run = shutil.copytree(whole[2], tmp_path / "run")
    state = run / "checkpoint-12" / "tritprune.pt"

    def refused(said):
        again, _, watch = make(pruning=late())
        with pytest.raises(CheckpointError, match=said):
            again.train(resume_from_checkpoint=True)
        assert watch.seen == []

    state.unlink()
    refused(r"at step 12 .* not found: .*checkpoint-12/tritprune.pt is not there.*checkpoint-4, .*checkpoint-8; resume")
    shutil.copy(run / "checkpoint-4" / "tritprune.pt", state)
    refused(r"checkpoint-12/tritprune.pt is of other weights")
    state.write_bytes(b"half a fi")
    refused(r"checkpoint-12/tritprune.pt cannot be read")


def test_a_checkpoint_elsewhere_is_named(make, whole, outcome, tmp_path):
    moved = shutil.copytree(whole[2] / "checkpoint-8", tmp_path / "elsewhere")
    trainer, pruning, _ = make(pruning=late(resume_from=moved))
    trainer.train(resume_from_checkpoint=str(moved))
    assert outcome(trainer.model, pruning.pruner) == whole[0]


class Seen(TrainerCallback):
    """What each forward pass of a training was given, and in which mode."""

    def __init__(self):
        self.batches, self.modes, self.handle = [], [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.handle = model.bert.register_forward_pre_hook(
            lambda module, inputs, given: self.modes.append(module.training), with_kwargs=True
        )
        model.register_forward_pre_hook(lambda module, inputs, given: self.batches.append(given), with_kwargs=True)


CALIBRATED = {"pattern": "channelx1", "include": ["**.output.dense"], "target_sparsity": 0.5}


def test_calibration_sees_no_dropout(make):
    """The masks are those of calibrate() on the same batches; training after it has its dropout again."""
    pruning = TransformersPruning("retrain_free", end_step=4, **CALIBRATED)
    trainer, _, _ = make(pruning=pruning, max_steps=6, max_grad_norm=0.0, save_strategy="no")
    twin, seen = copy.deepcopy(trainer.model), Seen()
    trainer.add_callback(seen)
    trainer.train()
    assert seen.modes == [False] * 4 + [True] * 2
    assert not any(module._forward_pre_hooks for module in twin.modules())
    expected = RetrainFreePruner(twin, **CALIBRATED)
    expected.calibrate(seen.batches[:4], lambda model, batch: model(**batch).loss)
    assert pruning.pruner.digest() == expected.digest()
    assert len(trainer.model._forward_pre_hooks) == 1  # the test's own
