"""One process of the comparison: the same plain training loop, with Neural Compressor 2.6, tritprune, or no pruner.

python compare.py accuracy --task digits --pattern 4x1 --seeds 0 1 2 --systems plain neural_compressor tritprune
python compare.py time --task pydocs --pattern 4x1
python compare.py memory --task pydocs --pattern 4x1 --systems neural_compressor

Each prints a line of JSON per measurement and appends it to outputs/neural_compressor/<mode>.jsonl.
"""

import argparse
import json
import logging
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from neural_compressor import WeightPruningConfig
from neural_compressor.compression.pruner import prepare_pruning

import tritprune
from tritprune.tasks import Task, get_task
from tritprune.training.batches import BatchOrder, step_seed

OUT = Path("outputs/neural_compressor")
TORCH_SAVE = torch.save  # prepare_pruning replaces it
SYSTEMS = ("plain", "neural_compressor", "tritprune", "tritprune_torch")  # the last: without numba
CUBIC = "tritprune_cubic"  # the same config but for the schedule, which Neural Compressor does not have
TARGETS = {"4x1": 0.9, "2:4": 0.5}
# The last mask update is at 60% of the steps, the rest is recovery.
LOOPS = {
    "digits": {"dense": 440, "steps": 220, "end": 130, "frequency": 5, "lr": 2e-3, "dense_lr": 2e-3, "batch": 32},
    "pydocs": {"dense": 0, "steps": 250, "end": 150, "frequency": 10, "lr": 4e-4, "batch": 16},  # from the encoder
}
LAYERS = {"digits": [], "pydocs": ["bert.encoder"]}  # none: every layer but the classifier head


class Training:
    """A model in a plain PyTorch loop; ``step`` is the same code for every system."""

    def __init__(self, task: Task, model: torch.nn.Module, *, batch: int, lr: float, steps: int, seed: int) -> None:
        self.task, self.model, self.steps, self.lr, self.seed = task, model.train(), steps, lr, seed
        self.done = 0
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        self.order = BatchOrder(task.n_train, batch_size=batch, accumulate=1, rank=0, world=1, seed=seed)
        self.hooks = {"begin": [], "before": [], "after": []}  # seconds of CPU in the pruner's own functions, a step

    def step(self) -> None:
        torch.manual_seed(step_seed(self.seed, self.done))
        (indices,) = self.order.micro_batches(self.done)
        batch = self.task.collate("train", indices)
        warm = max(1, self.steps // 20)
        factor = min((self.done + 1) / warm, (self.steps - self.done) / (self.steps - warm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.zero_grad()
        self.task.loss(self.task.logits(self.model(**self.task.model_inputs(batch))), batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1


def prune_with(system: str, training: Training, config: dict[str, Any], *, clocked: bool = False) -> Any:
    """Attach a system as its documentation says; None for ``plain``."""
    watch = (lambda name, run: _clocked(run, training.hooks[name])) if clocked else (lambda name, run: run)
    if system == "neural_compressor":
        pruning = prepare_pruning(training.model, WeightPruningConfig([{}], **config), training.optimizer)
        pruning.on_step_begin = watch("begin", pruning.on_step_begin)
        pruning.on_before_optimizer_step = watch("before", pruning.on_before_optimizer_step)
        pruning.on_after_optimizer_step = watch("after", pruning.on_after_optimizer_step)
        return pruning
    if system.startswith("tritprune"):
        backend = "torch" if system == "tritprune_torch" else "auto"
        pruner = tritprune.from_neural_compressor(config, training.model)
        if system == CUBIC:
            settings = {"criterion": "snip_momentum", "schedule": "cubic", "max_layer_sparsity": 0.98}
            steps = {"start_step": 0, "end_step": config["end_step"], "frequency": config["pruning_frequency"]}
            names = [layer.name for layer in pruner.layers]
            shared = {"pattern": config["pattern"], "target_sparsity": config["target_sparsity"], "include": names}
            pruner = tritprune.Pruner(training.model, **settings, **steps, **shared)
        pruner._before_step = watch("before", _with_backend(backend, pruner._before_step))
        pruner._after_step = watch("after", _with_backend(backend, pruner._after_step))
        return pruner.attach(training.optimizer)
    return None


def _with_backend(backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def forced(*arguments: Any) -> Any:
        with tritprune.use_backend(backend):
            return run(*arguments)

    return forced


def _clocked(run: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.thread_time()
        result = run(*arguments)
        seconds.append(time.thread_time() - start)
        return result

    return timed


def dense_model(name: str, task: Task, seed: int) -> torch.nn.Module:
    """The model that all systems start from; a fine-tuned one is trained once a seed."""
    model, path, loop = task.build_model(seed), OUT / "dense" / f"{name}_{seed}.pt", LOOPS[name]
    if not loop["dense"]:
        return model
    if not path.exists():
        training = Training(task, model, batch=loop["batch"], lr=loop["dense_lr"], steps=loop["dense"], seed=seed)
        for _ in range(loop["dense"]):
            training.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        TORCH_SAVE(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model


def config_of(name: str, pattern: str, *, end: int, frequency: int) -> dict[str, Any]:
    """One config for both: their defaults (snip_momentum, exp, global, cap 0.98), steps and target given."""
    steps = {"start_step": frequency, "end_step": end, "pruning_frequency": frequency}
    return {"pattern": pattern, "target_sparsity": TARGETS[pattern], "op_names": LAYERS[name], **steps}


def masks_of(system: str, pruner: Any) -> dict[str, torch.Tensor]:
    """Bool masks over the weights, True = keep."""
    if system == "neural_compressor":
        return {name: mask.bool() for name, mask in pruner.pruners[0].masks.items()}
    return {name: mask.element_mask() for name, mask in pruner.masks.items()} if pruner else {}


def accuracy(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train to the end and evaluate, a record per seed and system."""
    task, loop, pattern = get_task(arguments.task), LOOPS[arguments.task], arguments.pattern
    config = config_of(arguments.task, pattern, end=loop["end"], frequency=loop["frequency"])
    for seed in arguments.seeds:
        theirs: dict[str, torch.Tensor] = {}
        for system in arguments.systems:
            model = dense_model(arguments.task, task, seed)
            before = task.evaluate(model)["accuracy"]
            training = Training(task, model, batch=loop["batch"], lr=loop["lr"], steps=loop["steps"], seed=seed)
            pruner = prune_with(system, training, config)
            start = time.process_time()
            for _ in range(loop["steps"]):
                training.step()
            seconds = time.process_time() - start
            torch.save = TORCH_SAVE
            masks = masks_of(system, pruner)
            theirs = masks if system == "neural_compressor" else theirs
            same = system == "tritprune" and theirs
            yield {
                "system": system,
                "seed": seed,
                **task.evaluate(model),
                "start": before,
                "zeros": sum(int((~mask).sum()) for mask in masks.values()),
                "elements": sum(mask.numel() for mask in masks.values()),
                "mask_elements_that_differ": differing(theirs, masks) if same else None,
                "cpu_seconds": seconds,
            }


def time_steps(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All systems in turn, step by step, each on a model of its own: wall and CPU milliseconds of every step."""
    task, loop, seed, frequency = get_task(arguments.task), LOOPS[arguments.task], 0, 5
    steps, end = arguments.steps, arguments.steps * 5 // 7 // frequency * frequency
    config = config_of(arguments.task, arguments.pattern, end=end, frequency=frequency)
    contenders = {}
    for system in SYSTEMS:
        training = Training(task, task.build_model(seed), batch=loop["batch"], lr=loop["lr"], steps=steps, seed=seed)
        contenders[system] = (training, prune_with(system, training, config, clocked=True))
    rows = []
    for step in range(steps):
        turn = step % len(SYSTEMS)
        for system in SYSTEMS[turn:] + SYSTEMS[:turn]:
            training = contenders[system][0]
            wall, cpu = time.perf_counter(), time.thread_time()
            training.step()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            hooks = {name: 1e3 * sum(seconds) for name, seconds in training.hooks.items()}
            for seconds in training.hooks.values():
                seconds.clear()
            rows.append({"step": step + 1, "system": system, "wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, **hooks})
    masks = {system: masks_of(system, pruner) for system, (_, pruner) in contenders.items()}
    yield {
        "steps": steps,
        "end": end,
        "frequency": frequency,
        "rows": rows,
        "elements_that_differ": differing(masks["neural_compressor"], masks["tritprune"]),
        "backends_differ": differing(masks["tritprune"], masks["tritprune_torch"]),
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Elements whose masks differ; the layers must be the same."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return sum(int((mask != other[name]).sum()) for name, mask in one.items())


def masks_step_by_step(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both in lock-step: after every mask update, the zeros of each and the elements whose masks differ."""
    task, loop, frequency = get_task(arguments.task), LOOPS[arguments.task], 2
    config = config_of(arguments.task, arguments.pattern, end=arguments.steps, frequency=frequency)
    pair = {}
    for system in ("neural_compressor", "tritprune"):
        steps = arguments.steps + 1  # their last update is in the forward pass of the next step
        training = Training(task, task.build_model(0), batch=loop["batch"], lr=loop["lr"], steps=steps, seed=0)
        pair[system] = (training, prune_with(system, training, config))
    ours: dict[str, torch.Tensor] = {}
    for step in range(1, arguments.steps + 2):
        for system, (training, pruner) in pair.items():
            training.step()
            if system == "neural_compressor" and step % frequency == 1 and ours:
                theirs = masks_of(system, pruner)
                zeros = [sum(int((~mask).sum()) for mask in masks.values()) for masks in (theirs, ours)]
                unlike = differing(theirs, ours)
                yield {"after_step": step - 1, "zeros_theirs": zeros[0], "zeros_ours": zeros[1], "unlike": unlike}
        ours = {name: mask.clone() for name, mask in masks_of("tritprune", pair["tritprune"][1]).items()}


def memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak resident memory of a process that trains 14 steps, 3 mask updates among them: one system a process."""
    (system,) = arguments.systems
    task, loop = get_task(arguments.task), LOOPS[arguments.task]
    training = Training(task, task.build_model(0), batch=loop["batch"], lr=loop["lr"], steps=14, seed=0)
    config = config_of(arguments.task, arguments.pattern, end=12, frequency=4)
    training.step()  # Adam's state is there, whatever the system
    before = _resident("VmRSS")
    pruner = prune_with(system, training, config)
    for _ in range(14 - 1):
        training.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sizes = [mask.numel() for mask in masks_of(system, pruner).values()]
    yield {"system": system, "peak_mb": peak, "before_mb": before, "elements": sum(sizes)}


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


MODES = {"accuracy": accuracy, "time": time_steps, "memory": memory, "masks": masks_step_by_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=tuple(MODES))
    parser.add_argument("--task", choices=tuple(LOOPS), required=True)
    parser.add_argument("--pattern", choices=tuple(TARGETS), required=True)
    parser.add_argument("--systems", nargs="+", choices=(*SYSTEMS, CUBIC), default=SYSTEMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--label", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("neural_compressor").setLevel(logging.WARNING)
    OUT.mkdir(parents=True, exist_ok=True)
    asked = {"task": arguments.task, "pattern": arguments.pattern, "label": arguments.label}
    for measured in MODES[arguments.mode](arguments):
        record = {**asked, **measured, "torch": torch.__version__, "python": platform.python_version()}
        with (OUT / f"{arguments.mode}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps({name: value for name, value in record.items() if name != "rows"}), flush=True)


if __name__ == "__main__":
    main()
