"""Operations that treat each element alone: units keep apart through them, and what they do to a constant is known.

Each entry computes one operation from its arguments in the operation's own order, as the traced graph lists them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritprune.slimming.nodes import Node

Function = Callable[..., Tensor]

IDENTITIES: dict[str, Function] = dict.fromkeys(
    (
        *("alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as", "lift_fresh", "lift_fresh_copy"),
        *("dropout", "feature_dropout", "alpha_dropout", "native_dropout"),
    ),
    lambda x, *_: x,
)
"""Operations that change nothing in evaluation mode; :func:`is_identity` checks their arguments too."""

ELEMENTWISE: dict[str, Function] = {
    **IDENTITIES,
    "abs": torch.abs,
    "add": lambda x, y, alpha=1: torch.add(x, y, alpha=alpha),
    "celu": F.celu,
    "clamp": torch.clamp,
    "clamp_max": torch.clamp_max,
    "clamp_min": torch.clamp_min,
    "cos": torch.cos,
    "div": lambda x, y, mode=None: torch.div(x, y, rounding_mode=mode),
    "elu": lambda x, alpha, scale, slope: torch.where(x > 0, scale * x, scale * alpha * torch.expm1(slope * x)),
    "erf": torch.erf,
    "exp": torch.exp,
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "log": torch.log,
    "log_sigmoid": F.logsigmoid,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mish": F.mish,
    "mul": torch.mul,
    "neg": torch.neg,
    "pow": torch.pow,
    "reciprocal": torch.reciprocal,
    "relu": torch.relu,
    "relu6": F.relu6,
    "rsqrt": torch.rsqrt,
    "rsub": lambda x, y, alpha=1: torch.rsub(x, y, alpha=alpha),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": lambda x, y, alpha=1: torch.sub(x, y, alpha=alpha),
    "tanh": torch.tanh,
}
"""Operations that a feed-forward block may have between its linears."""

UNCOMPUTED = (
    *("where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__", "bitwise_and", "bitwise_or"),
    *("logical_and", "logical_or", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "nan_to_num", "sign"),
    *("floor", "ceil", "round", "remainder", "fmod", "floor_divide", "lerp", "addcmul", "addcdiv", "log1p", "expm1"),
    *("atan", "sinh", "cosh", "tan", "atan2", "threshold", "hardshrink", "softshrink", "prelu", "rrelu"),
)
"""Operations element by element whose constants are not followed."""


def is_identity(node: Node) -> bool:
    """Whether ``node`` hands on its first argument as it is: dropout in evaluation, a copy, a cast to itself."""
    if node.kind.endswith("dropout"):
        return node.argument(2) is False or node.argument(1) == 0
    if node.kind in ("to", "_to_copy", "type_as"):
        return node.output.dtype is not None and node.output.dtype == node.inputs[0].dtype
    return node.kind in IDENTITIES


def is_elementwise(node: Node) -> bool:
    """Whether ``node`` is in the table, with arguments that make it element by element."""
    return is_identity(node) if node.kind in IDENTITIES else node.kind in ELEMENTWISE


def apply(node: Node, arguments: list[Any]) -> Tensor:
    """Compute ``node`` on ``arguments``, its inputs in order."""
    return ELEMENTWISE[node.kind](*arguments)
