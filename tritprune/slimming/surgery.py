"""Cutting dead units out of linears so that the outputs stay what they were.

A feed-forward unit is dead when every weight that makes it is zero, so that it is the constant c = f(bias), or when
every weight that reads it is zero. A head is dead when the output linear reads nothing of it, or when its value rows
are zero: the attention probabilities sum to one, so it is the constant c = b_v. Removing units D of a constant c leaves

    y = W[:, kept] x[kept] + (b + W[:, D] c)

so the constant is folded into the bias of the linear that read it, in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritprune.slimming.attention import Attention
from tritprune.slimming.elementwise import apply, base_kind
from tritprune.slimming.feed_forward import FeedForward

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads", "heads")
"""Attributes of an attention module that may hold its number of heads."""

HEAD_WIDTHS = ("all_head_size", "inner_dim", "all_head_dim", "attention_width")
"""Attributes of an attention module that may hold number of heads * head size."""


@dataclass(frozen=True)
class Units:
    """What is known about the units of one block.

    Args:
        dead: bool [units], True where the unit may go.
        constant: [units], the value of a dead unit at the linear that reads it; 0 where nothing reads it.
    """

    dead: Tensor
    constant: Tensor


def zero_rows(linear: nn.Linear) -> Tensor:
    """Dead outputs, bool [out_features]: True where the whole row of the weight is exactly zero."""
    return (linear.weight.detach() == 0).all(dim=1)


def zero_columns(linear: nn.Linear) -> Tensor:
    """Dead inputs, bool [in_features]: True where the whole column of the weight is exactly zero."""
    return (linear.weight.detach() == 0).all(dim=0)


@torch.no_grad()
def feed_forward_units(block: FeedForward, model: nn.Module) -> Units:
    """Which units of a feed-forward block are dead, and the constants that the dead ones leave.

    Runs the block's element-wise operations on the biases: a result is known where all of its operands are, and where a
    product has a factor that is known to be zero.
    """
    root = linear_at(model, block.root)
    known: dict[str, Tensor] = {}
    value: dict[str, Tensor] = {}
    for name, made in zip(block.frontier, block.frontier_values, strict=True):
        linear = linear_at(model, name)
        known[made] = zero_rows(linear)
        value[made] = linear.bias.detach() if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
    for node in block.nodes:
        operands = [v.name for v in node.inputs if v.name in known]
        arguments = [value.get(v.name, v.constant) for v in node.inputs]
        made = node.output.name
        value[made] = apply(node, arguments)
        known[made] = torch.stack([known[name] for name in operands]).all(dim=0)
        if base_kind(node) == "mul":
            for name in operands:
                absorbing = known[name] & (value[name] == 0)
                known[made] = known[made] | absorbing
                value[made] = torch.where(absorbing, torch.zeros_like(value[made]), value[made])
    unread, left = zero_columns(root), value[block.end]
    constant = known[block.end] & torch.isfinite(left)
    return Units(constant | unread, torch.where(constant & ~unread, left, torch.zeros_like(left)))


@torch.no_grad()
def head_units(block: Attention, model: nn.Module, heads: int) -> Units:
    """Which of an attention block's ``heads`` are dead; ``constant`` is [heads, head size]."""
    *_, value_name, output_name = block.linears
    value, output = linear_at(model, value_name), linear_at(model, output_name)
    unread = zero_columns(output).view(heads, -1).all(dim=1)
    constant = zero_rows(value).view(heads, -1).all(dim=1)
    bias = value.bias.detach() if value.bias is not None else value.weight.new_zeros(value.out_features)
    left = torch.where((constant & ~unread)[:, None], bias.view(heads, -1), 0)
    return Units(constant | unread, left)


def cut_feed_forward(block: FeedForward, model: nn.Module, kept: Tensor, constant: Tensor) -> None:
    """Keep the units with indices ``kept``; fold ``constant`` [units] of the others into the root's bias."""
    root = linear_at(model, block.root)
    fold_constant(root, kept, constant)
    keep_columns(root, kept)
    for name in block.frontier:
        keep_rows(linear_at(model, name), kept)


def cut_heads(block: Attention, model: nn.Module, kept: Tensor, constant: Tensor) -> None:
    """Keep the heads with indices ``kept``; fold ``constant`` [heads, head size] of the others into the output's bias.

    The attention module's attributes that count heads are set too; see :data:`HEAD_COUNTS`.
    """
    heads, size = constant.shape
    elements = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
    *feeding, output_name = block.linears
    output = linear_at(model, output_name)
    fold_constant(output, elements, constant.flatten())
    keep_columns(output, elements)
    for name in feeding:
        keep_rows(linear_at(model, name), elements)
    module = model.get_submodule(common_parent(feeding))
    for names, before, after in ((HEAD_COUNTS, heads, len(kept)), (HEAD_WIDTHS, heads * size, len(kept) * size)):
        for name in names:
            if module.__dict__.get(name) == before:
                setattr(module, name, after)


@torch.no_grad()
def fold_constant(linear: nn.Linear, kept: Tensor, constant: Tensor) -> None:
    """Bias <- bias + W[:, D] c[D] over the inputs D that are not ``kept``; a missing bias is made if it is needed."""
    gone = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
    gone[kept] = False
    added = linear.weight[:, gone].double() @ constant[gone].double()
    if not added.any():
        return
    if linear.bias is None:
        linear.bias = nn.Parameter(added.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.copy_((linear.bias.double() + added).to(linear.bias.dtype))


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Keep the outputs with indices ``kept``, in that order."""
    linear.weight = _kept(linear.weight, kept, 0)
    if linear.bias is not None:
        linear.bias = _kept(linear.bias, kept, 0)
    linear.out_features = len(kept)


def keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    """Keep the inputs with indices ``kept``, in that order."""
    linear.weight = _kept(linear.weight, kept, 1)
    linear.in_features = len(kept)


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear with this dotted name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def common_parent(names: Iterable[str]) -> str:
    """The longest dotted name that is a parent of all ``names``; empty for the model itself."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _kept(parameter: Tensor, kept: Tensor, dimension: int) -> nn.Parameter:
    data = parameter.detach().index_select(dimension, kept).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)
