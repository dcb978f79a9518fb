"""Whole steps of a pruner over the layers of a set, beside Neural Compressor 2.6 itself where it is installed.

A plain step scores every weight and applies the masks; a mask update selects over all layers, 4x1 units at 80%,
applies the new masks and counts them. Ours is ``Pruner`` as a training loop drives it, theirs ``PytorchBasicPruner``
with its own ``update_masks``, on equal layers, weights and gradients, in one process.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from problem import Problem
from problems import SPARSITY
from torch import Tensor, nn

import tritprune


class Steps:
    """Makes the problems; the layers of a contender are its own.

    Args:
        shapes: of the layers.
        device: where.
        peers: whether Neural Compressor runs beside ours, if it is installed.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device, *, peers: bool = True) -> None:
        self.shapes, self.device = list(shapes), device
        self.elements = sum(rows * cols for rows, cols in shapes)
        self.theirs = Theirs(self._layers()) if peers and find_spec("neural_compressor") else None

    def names(self, only: Sequence[str] = ()) -> list[str]:
        """What :meth:`all` gives."""
        return [name for name in ("plain step", "mask update") if not only or any(part in name for part in only)]

    def all(self, only: Sequence[str] = ()) -> Iterator[Problem]:
        """The problems whose name holds one of ``only``; every one if it is empty."""
        for name in self.names(only):
            yield self._plain(name) if name == "plain step" else self._update(name)
            gc.collect()

    def _layers(self) -> nn.Sequential:
        """Linear layers with the same weights and gradients for everybody, and a head that nobody prunes."""
        generator = torch.Generator().manual_seed(1)
        layers = nn.Sequential()
        for number, (rows, cols) in enumerate(self.shapes):
            layer = nn.utils.skip_init(nn.Linear, cols, rows, bias=False, device=self.device)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(rows, cols, generator=generator))
            layer.weight.grad = torch.randn(rows, cols, generator=generator).to(self.device)
            layers.add_module(f"layer{number}", layer)
        layers.add_module("classifier", nn.Linear(self.shapes[-1][0], 2))
        return layers

    def _ours(self, *, frequency: int) -> tuple[nn.Sequential, tritprune.Pruner, torch.optim.Optimizer]:
        """A pruner that asks for 80% at every step that is due; units may come back, as theirs may."""
        model = self._layers()
        pruner = tritprune.Pruner(
            model,
            pattern="4x1",
            criterion="snip_momentum",
            schedule="linear",
            initial_sparsity=SPARSITY,
            target_sparsity=SPARSITY,
            start_step=1,
            end_step=10**9,
            frequency=frequency,
            exclude=("classifier",),
            regrow=True,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return model, pruner.attach(optimizer), optimizer

    def _plain(self, name: str) -> Problem:
        model, pruner, optimizer = self._ours(frequency=10**9)

        def run() -> None:
            pruner._before_step(optimizer, (), {})
            pruner._after_step(optimizer, (), {})

        run()  # step 1 has the one mask update
        contenders: dict[str, Callable[[], object]] = {"tritprune": run}
        if self.theirs:
            self.theirs.begin()
            contenders["neural_compressor 2.6"] = self.theirs.plain_step
        units = self.elements // 4
        floor = 8 * self.elements + 8 * units + units + int(SPARSITY * self.elements) * 4
        return Problem(name, floor, contenders, lambda: _require_sparse(model), {})

    def _update(self, name: str) -> Problem:
        model, pruner, optimizer = self._ours(frequency=1)
        pruner._before_step(optimizer, (), {})  # scores once: an update alone is measured

        def run() -> None:
            pruner._after_step(optimizer, (), {})

        contenders: dict[str, Callable[[], object]] = {"tritprune": run}
        agreement: dict[str, str] = {}
        if self.theirs:
            contenders["neural_compressor 2.6"] = self.theirs.update
            run()
            self.theirs.begin()
            pairs = list(zip(model, self.theirs.model, strict=True))[:-1]
            differing = sum(int(((a.weight == 0) != (b.weight == 0)).sum()) for a, b in pairs)
            agreement["neural_compressor 2.6"] = f"{differing:,} mask elements differ" if differing else "same masks"
        units = self.elements // 4
        floor = 4 * units + 5 * units + units + int(SPARSITY * self.elements) * 4
        return Problem(name, floor, contenders, lambda: (run(), _require_sparse(model)), agreement)


class Theirs:
    """Neural Compressor's own pruner, asked for 80% at every update.

    Args:
        model: layers with gradients.
    """

    def __init__(self, model: nn.Sequential) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from neural_compressor import WeightPruningConfig
            from neural_compressor.compression.pruner.pruning import PRUNINGS
            from neural_compressor.compression.pruner.utils import process_config
        for name in ("neural_compressor", "root"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # a step of the schedule: what is asked for is the target at once, as in the middle of a long run
        settings = {
            "target_sparsity": SPARSITY,
            "pattern": "4x1",
            "start_step": 1,
            "end_step": 1,
            "excluded_op_names": [],
        }
        config = process_config(WeightPruningConfig([{}], pruning_type="snip_momentum", **settings))
        self.model = model
        (self.pruner,) = PRUNINGS["basic_pruning"](config, model).pruners
        if set(self.pruner.modules) != {name for name, _ in model.named_children()} - {"classifier"}:
            raise AssertionError(f"neural_compressor prunes {len(self.pruner.modules)} of {len(model) - 1} layers")

    def begin(self) -> None:
        """Scores and the masks of a first update."""
        self.pruner.on_before_optimizer_step()
        self.update()

    def plain_step(self) -> None:
        """What its optimizer hooks do between two updates."""
        self.pruner.on_before_optimizer_step()
        self.pruner.on_after_optimizer_step()

    def update(self) -> Any:
        """``update_masks``, from a state in which it has something to do."""
        pruner = self.pruner
        pruner.global_step, pruner.completed_pruned_cnt, pruner.current_sparsity_ratio = pruner.start_step, 1, 0.0
        return pruner.update_masks(0)


def _require_sparse(model: nn.Sequential) -> None:
    weights: list[Tensor] = [layer.weight for layer in list(model)[:-1]]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    wanted = 4 * int(SPARSITY * sum(weight.numel() for weight in weights) / 4)
    if abs(zeros - wanted) > 4:
        raise AssertionError(f"steps: {zeros:,} zeros, {wanted:,} are asked for")
