"""Operations that treat each element alone: units keep apart through them, and what they do to a constant is known.

Each entry computes one operation from its arguments in the operation's own order, as the traced graph lists them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritprune.slimming.graph import Node

Function = Callable[..., Tensor]

IDENTITIES: dict[str, Function] = {
    "alias": lambda x: x,
    "clone": lambda x, *_: x,
    "contiguous": lambda x, *_: x,
    "detach": lambda x: x,
    "dropout": lambda x, *_: x,
    "to": lambda x, *_: x,
}
"""Operations that change nothing in evaluation mode; :func:`is_identity` checks their arguments too."""

ELEMENTWISE: dict[str, Function] = {
    **IDENTITIES,
    "abs": torch.abs,
    "add": lambda x, y, alpha=1: torch.add(x, y, alpha=alpha),
    "celu": F.celu,
    "clamp": torch.clamp,
    "clamp_max": torch.clamp_max,
    "clamp_min": torch.clamp_min,
    "div": torch.div,
    "elu": lambda x, alpha, scale, slope: torch.where(x > 0, scale * x, scale * alpha * torch.expm1(slope * x)),
    "erf": torch.erf,
    "exp": torch.exp,
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "mish": F.mish,
    "mul": torch.mul,
    "neg": torch.neg,
    "pow": torch.pow,
    "relu": torch.relu,
    "relu6": F.relu6,
    "rsub": lambda x, y, alpha=1: torch.rsub(x, y, alpha=alpha),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": lambda x, y, alpha=1: torch.sub(x, y, alpha=alpha),
    "tanh": torch.tanh,
}
"""Operations that a feed-forward block may have between its linears."""


def base_kind(node: Node) -> str:
    """The operation's name without the underscore of its in-place form: "relu_" -> "relu"."""
    return node.kind.removesuffix("_")


def is_identity(node: Node) -> bool:
    """Whether ``node`` hands on its first argument as it is: dropout in evaluation, a copy, a cast to itself."""
    kind = base_kind(node)
    if kind == "dropout":
        return node.inputs[2].constant is False or node.inputs[1].constant == 0
    if kind == "to":
        return node.output.dtype is not None and node.output.dtype == node.inputs[0].dtype
    return kind in IDENTITIES


def is_elementwise(node: Node) -> bool:
    """Whether ``node`` is in the table, with arguments that make it element by element."""
    kind = base_kind(node)
    return is_identity(node) if kind in IDENTITIES else kind in ELEMENTWISE


def apply(node: Node, arguments: list[Any]) -> Tensor:
    """Compute ``node`` on ``arguments``, its inputs in order."""
    return ELEMENTWISE[base_kind(node)](*arguments)
