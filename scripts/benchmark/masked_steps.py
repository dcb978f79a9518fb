"""Optimizer steps that end with a 4x1 mask, beside torch's own optimizers and a mask after them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from problem import Problem, same
from torch import Tensor, nn

from tritprune import kernels
from tritprune.kernels import reference
from tritprune.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD, WeightMask

ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}
BLOCK = (4, 1)


class MaskedSteps:
    """Makes the two problems.

    Args:
        weights: fp32 layers; every contender steps on a copy of its own.
        gradients: of all of them.
        sparsity: of the masks.
        peers: whether torch's optimizers run beside ours.
    """

    def __init__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], sparsity: float, *, peers: bool) -> None:
        self.weights, self.gradients, self.sparsity, self.peers = weights, gradients, sparsity, peers
        self.elements = sum(weight.numel() for weight in weights)

    def adamw(self) -> Problem:
        """28 bytes an element: weight and two moments read and written, gradient read; a byte a unit."""
        numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 1, **ADAMW}
        return self._problem(
            "AdamW step, 4x1 mask", 28, (MaskedAdamW, torch.optim.AdamW, ADAMW), "masked_adamw_", numbers
        )

    def sgd(self) -> Problem:
        """20 bytes an element with momentum; a byte a unit."""
        numbers = {"dampening": 0.0, "nesterov": False, "first": False, **SGD}
        return self._problem("SGD step, 4x1 mask", 20, (MaskedSGD, torch.optim.SGD, SGD), "masked_sgd_", numbers)

    def _masks(self) -> list[Tensor]:
        device = self.weights[0].device
        generator = torch.Generator(device).manual_seed(5)
        shapes = [(-(-weight.shape[0] // BLOCK[0]), weight.shape[1]) for weight in self.weights]
        return [torch.rand(shape, generator=generator, device=device) >= self.sparsity for shape in shapes]

    def _parameters(self) -> list[nn.Parameter]:
        made = [nn.Parameter(weight.clone()) for weight in self.weights]
        for parameter, gradient in zip(made, self.gradients, strict=True):
            parameter.grad = gradient
        return made

    def _problem(
        self, name: str, size: int, classes: tuple[Any, Any, dict[str, Any]], op: str, numbers: dict[str, Any]
    ) -> Problem:
        ours, theirs, options = classes
        masks = self._masks()
        weights = self._parameters()
        own: MaskedOptimizer = ours(weights, **options)
        own.use_masks({w: WeightMask(mask, BLOCK, _as_it_is) for w, mask in zip(weights, masks, strict=True)})
        contenders: dict[str, Callable[[], object]] = {"tritprune": own.step}
        agreement: dict[str, str] = {}
        if self.peers:
            spread = [mask.repeat_interleave(BLOCK[0], 0)[: len(w)] for mask, w in zip(masks, weights, strict=True)]
            for label, how in {"torch default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
                agreement[f"{label}, mul_"] = self._difference(classes, how)
                contenders[f"{label}, mul_"] = self._rival(theirs, {**options, **how}, spread)

        def check() -> None:
            states = 1 if "momentum" in numbers else 2
            rounding = "cuda" if self.weights[0].is_cuda else "own"
            made = [[[w.abs() for w in self.weights[:3]] for _ in range(1 + states)] for _ in range(2)]
            for (first, *moments), step in zip(made, (getattr(kernels, op), getattr(reference, op)), strict=True):
                step(first, self.gradients[:3], *moments, masks[:3], [BLOCK] * 3, **numbers, rounding=rounding)
            same(name, *([tensor for part in each for tensor in part] for each in made))

        floor = size * self.elements + self.elements // 4
        return Problem(name, floor, contenders, check, agreement, in_a_graph=False)  # step numbers are arguments

    def _rival(self, optimizer: Any, options: dict[str, Any], spread: Sequence[Tensor]) -> Callable[[], object]:
        weights = self._parameters()
        theirs = optimizer(weights, **options)

        @torch.no_grad()
        def run() -> None:
            theirs.step()
            for weight, mask in zip(weights, spread, strict=True):
                weight.mul_(mask)

        return run

    def _difference(self, classes: tuple[Any, Any, dict[str, Any]], how: dict[str, Any]) -> str:
        """How far our steps are from theirs, without masks: five steps of two layers."""
        ours, theirs, options = classes
        pairs = [[nn.Parameter(weight.clone()) for weight in self.weights[:2]] for _ in range(2)]
        stepped = (ours(pairs[0], **options), theirs(pairs[1], **options, **how))
        for _ in range(5):
            for weights, optimizer in zip(pairs, stepped, strict=True):
                for weight, gradient in zip(weights, self.gradients, strict=False):
                    weight.grad = gradient
                optimizer.step()
        mine, other = (torch.cat([weight.detach().flatten() for weight in weights]) for weights in pairs)
        differing = float((mine != other).float().mean())
        if not differing:
            return "same bits"
        spacing = torch.nextafter(other.abs(), torch.full_like(other, torch.inf)) - other.abs()
        within = float(((mine - other).abs() <= spacing).float().mean())
        return f"{differing:.1%} of weights differ, {1 - within:.2g} by more than an ulp"


def _as_it_is(weight: Tensor) -> Tensor:
    return weight
