"""Optimizers whose step ends with the mask, in one pass over the weights: AdamW and SGD.

On the CPU the weights and moments are those of ``torch.optim.AdamW`` and ``torch.optim.SGD`` with ``foreach`` False or
True, and a mask after the step, **bit for bit**, for every weight, with numba and without. On CUDA the kernels repeat
the rounding of ``foreach=True``, torch's default there, within one unit in the last place: the same bits by its source,
which no device has shown yet. ``fused=True`` rounds otherwise in torch itself; ``kernels/optimizer_reference.py`` has
the table. States have the same names, so that either loads the other's ``state_dict``. A :class:`tritprune.Pruner`
that is attached to one hands its masks over before every step and spares its own pass over the weights after it:

    optimizer = tritprune.optim.MaskedAdamW(model.parameters(), lr=1e-3)
    pruner = tritprune.Pruner(model, target_sparsity=0.9, end_step=1000).attach(optimizer)

A layer of its own: it needs the kernels alone, and the pruners need it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritprune.errors import ConfigError
from tritprune.kernels import masked_adamw_, masked_sgd_

Block = tuple[int, int]


@dataclass(frozen=True, eq=False)
class WeightMask:
    """What is pruned of a parameter.

    Args:
        mask: bool ``[rows, cols]``, True = keep, or packed.
        block: ``(n, m)`` of a unit.
        to_2d: brings the parameter, and what is shaped like it, to ``[R, C]`` without a copy.
        reset: whether the optimizer's state of pruned elements is zeroed, too.
    """

    mask: Tensor
    block: Block
    to_2d: Callable[[Tensor], Tensor]
    reset: bool = False


class MaskedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that takes masks; parameters without one are updated as by its namesake in torch."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._masks: dict[Tensor, WeightMask] = {}
        super().__init__(params, defaults)

    def use_masks(self, masks: Mapping[Tensor, WeightMask], *, instead_of: Iterable[Tensor] | None = None) -> None:
        """Masks for the steps from now on.

        Args:
            masks: by parameter.
            instead_of: the parameters whose masks before are forgotten; None: all.

        Raises:
            ConfigError: a parameter whose two-dimensional form would be a copy.
        """
        for parameter, mask in masks.items():
            if mask.to_2d(parameter.detach()).data_ptr() != parameter.data_ptr():
                raise ConfigError(f"a weight of shape {list(parameter.shape)} has no two-dimensional view to step on")
        forgotten = set(self._masks if instead_of is None else instead_of)
        self._masks = {weight: mask for weight, mask in self._masks.items() if weight not in forgotten} | dict(masks)

    def masks_of(self, parameter: Tensor) -> WeightMask | None:
        """The mask that the next step ends with."""
        return self._masks.get(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ConfigError: a parameter that is not fp32, or has gaps in memory; amsgrad or maximize.
        """
        self._refuse_what_it_has_not([param_group])
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32:
                raise ConfigError(
                    f"{type(self).__name__} steps on float32 weights, got {str(parameter.dtype).removeprefix('torch.')}"
                    f" {list(parameter.shape)}; torch.optim takes other types"
                )
            if _any_2d(parameter.detach(), parameter).data_ptr() != parameter.data_ptr():
                raise ConfigError(
                    f"{type(self).__name__} steps in place, and a parameter of shape {list(parameter.shape)} has gaps "
                    "in memory; make it contiguous"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient, then the masks.

        Raises:
            ConfigError: a sparse gradient, or a CUDA graph that is being captured.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph: learning rate and step number are "
                "arguments of its kernels, and every replay would repeat those of this step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready: dict[tuple[Any, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout != torch.strided:
                    raise ConfigError(f"{type(self).__name__} does not take sparse gradients")
                mask = self._masks.get(parameter)
                key = (self._prepare(parameter, group), parameter.device, mask is not None and mask.reset)
                ready.setdefault(key, []).append(parameter)
            for (number, _, reset), parameters in ready.items():
                self._step_together(parameters, group, number, reset)
        return loss

    @abstractmethod
    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """Make the state if there is none; the number of this step, from 1."""

    @abstractmethod
    def _step_together(self, parameters: Sequence[Tensor], group: dict[str, Any], number: int, reset: bool) -> None:
        """Step number ``number`` of parameters on one device."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Masks are the pruner's: a copy begins without, an optimizer that takes up a state keeps its own."""
        self._refuse_what_it_has_not(state.get("param_groups", ()), ", which the state to load was made with")
        super().__setstate__(state)
        if "_masks" not in vars(self):
            self._masks = {}

    def _refuse_what_it_has_not(self, groups: Iterable[Mapping[str, Any]], why: str = "") -> None:
        for group in groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ConfigError(f"{type(self).__name__} has no {name}{why}")

    def _two_dimensional(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the parameters' shapes as ``[R, C]``, by the mask's view or as one row."""
        views: list[Tensor] = []
        for parameter, tensor in zip(parameters, tensors, strict=True):
            mask = self._masks.get(parameter)
            views.append(_any_2d(tensor, parameter) if mask is None else mask.to_2d(tensor))
        return views

    def _masks_and_blocks(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Block]]:
        masks = [self._masks.get(parameter) for parameter in parameters]
        return [mask and mask.mask for mask in masks], [mask.block if mask else (1, 1) for mask in masks]


class MaskedAdamW(MaskedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose step ends with the mask; see ``kernels.masked_adamw_``.

    Args:
        params: as in torch.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root.
        weight_decay: decoupled.
        amsgrad: refused; it is here to say so.

    Raises:
        ConfigError: a number out of range, ``amsgrad``, or a parameter that is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise ConfigError("MaskedAdamW has no amsgrad; torch.optim.AdamW(amsgrad=True) with a Pruner does it")
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                f"MaskedAdamW needs lr, eps, weight_decay >= 0 and betas in [0, 1), got lr={lr:g}, eps={eps:g}, "
                f"weight_decay={weight_decay:g}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
        elif state["step"].device.type != "cpu":  # of a fused or capturable optimizer: read once, then kept here
            state["step"] = state["step"].cpu()
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _like(parameter, state.get(name))
        state["step"] += 1
        return int(state["step"])  # on the CPU, as torch's: nothing is read back from a device

    def _step_together(self, parameters: Sequence[Tensor], group: dict[str, Any], number: int, reset: bool) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        masked_adamw_(
            self._two_dimensional(parameters, [parameter.detach() for parameter in parameters]),
            self._two_dimensional(parameters, _gradients(parameters)),
            self._two_dimensional(parameters, [state["exp_avg"] for state in states]),
            self._two_dimensional(parameters, [state["exp_avg_sq"] for state in states]),
            *self._masks_and_blocks(parameters),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=number,
            reset=reset,
        )


class MaskedSGD(MaskedOptimizer):
    """SGD with momentum whose step ends with the mask; see ``kernels.masked_sgd_``.

    Args:
        params: as in torch.
        lr: learning rate.
        momentum: share of the momentum that stays.
        dampening: of the new gradient in the momentum.
        weight_decay: added to the gradient.
        nesterov: look ahead.

    Raises:
        ConfigError: a number out of range, or a parameter that is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0):
            raise ConfigError(
                f"MaskedSGD needs lr, momentum, weight_decay >= 0, got lr={lr:g}, momentum={momentum:g}, "
                f"weight_decay={weight_decay:g}"
            )
        if nesterov and (momentum == 0 or dampening != 0):
            raise ConfigError("nesterov needs momentum > 0 and dampening = 0")
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "nesterov": nesterov})

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> int:
        if group["momentum"] == 0:
            return 1
        state = self.state[parameter]
        known = state.get("momentum_buffer")
        state["momentum_buffer"] = _like(parameter, known)
        return 1 if known is None else 2

    def _step_together(self, parameters: Sequence[Tensor], group: dict[str, Any], number: int, reset: bool) -> None:
        momenta = None
        if group["momentum"] != 0:
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            momenta = self._two_dimensional(parameters, buffers)
        masked_sgd_(
            self._two_dimensional(parameters, [parameter.detach() for parameter in parameters]),
            self._two_dimensional(parameters, _gradients(parameters)),
            momenta,
            *self._masks_and_blocks(parameters),
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            first=number == 1,
            reset=reset,
        )


def _like(parameter: Tensor, state: Tensor | None) -> Tensor:
    """A state with the strides of its parameter: itself, a copy of one that was loaded with others, or zeros."""
    if state is None:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if state.stride() == parameter.stride():
        return state
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(state)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _any_2d(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's shape as ``[R, C]``; without a copy if it has the parameter's strides."""
    if parameter.dim() == 2:
        return tensor
    strides = parameter.stride()
    return tensor.permute(sorted(range(parameter.dim()), key=lambda axis: -strides[axis])).reshape(1, -1)
