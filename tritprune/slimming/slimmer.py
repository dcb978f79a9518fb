"""From a masked model to a smaller one with the same outputs: find, cut, explain what stays, certify."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.slimming.account import Selections, changed_widths, compose, created_and_folded
from tritprune.slimming.attention import Attention, find_attention
from tritprune.slimming.certificate import Certificate, certify
from tritprune.slimming.check_inputs import derive_inputs
from tritprune.slimming.comparison import largest_difference
from tritprune.slimming.feed_forward import FeedForward, find_feed_forward
from tritprune.slimming.graph import trace
from tritprune.slimming.leftovers import Refusal, explain_leftovers
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of
from tritprune.slimming.surgery import (
    Units,
    common_parent,
    cut_feed_forward,
    cut_heads,
    feed_forward_units,
    head_units,
    linear_at,
    zero_columns,
    zero_rows,
)


@dataclass(frozen=True)
class Cut:
    """What was cut at one place.

    Args:
        kind: "feed-forward units" or "heads".
        where: dotted name: of the linear that reads the units, or of the attention module.
        before: number of units before.
        after: number of units after.
        unit: "unit" or "head".
    """

    kind: str
    where: str
    before: int
    after: int
    unit: str


@dataclass(frozen=True)
class SlimResult:
    """A slimmed model and the account of how it came about.

    Args:
        model: the slim model, in evaluation mode.
        cuts: what was cut.
        refused: what is dead but stays, with the reason.
        found: every block that was looked at: ``kind``, ``where``, its linears, its units or heads.
        certificate: the proof that the outputs are those of the model that was given.
        widths: what :func:`tritprune.export.save_model` needs to build the slim model again:
            what changed, in the form that :func:`tritprune.slimming.account.changed_widths` describes.
        selections: tensor name -> {dimension: int64 indices into the dimension as it was, in the order kept}, for every
            parameter and buffer that was cut.
        created: parameters that the given model does not have: biases that were made to hold folded constants.
        folded: parameters whose values were changed because constants were folded into them.
        parameters_before: number of parameters of the model that was given.
        parameters_after: number of parameters of the slim model.
    """

    model: nn.Module
    cuts: list[Cut]
    refused: list[Refusal]
    found: list[dict[str, Any]]
    certificate: Certificate
    widths: dict[str, Any]
    selections: Selections
    created: tuple[str, ...]
    folded: tuple[str, ...]
    parameters_before: int
    parameters_after: int


def slim_model(
    model: nn.Module, example_inputs: Any, *, tracer: str = "jit", check_inputs: Sequence[Any] | None = None
) -> SlimResult:
    """Cut the dead feed-forward units and heads of ``model`` and prove that its outputs stay the same.

    Dead means exactly zero in the weights; a mask must have been applied. The work is done on a copy: the given model
    stays as it is, whatever happens. Activations are taken to be finite, and each query to attend to at least one key.

    Args:
        model: any module with linears.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tracer: how to read the model: "jit".
        check_inputs: inputs for the certificate, each like ``example_inputs``; by default batches of 1, 2 and 7 and a
            shorter sequence are made from ``example_inputs``.

    Raises:
        ConfigError: unknown tracer, or inputs of an odd type.
        TraceError: the model does not run on the inputs, or cannot be traced.
        CertificateError: the slim model's outputs differ; the message names the first module that differs.
    """
    inputs = ModelInputs.of(example_inputs)
    slim = copy.deepcopy(model).eval()
    slim.zero_grad(set_to_none=True)
    slimmer = _Slimmer(model, slim, inputs, tracer)
    slimmer.cut_until_nothing_is_dead()
    checks = [ModelInputs.of(given) for given in check_inputs] if check_inputs else derive_inputs(model, inputs)
    created, folded = created_and_folded(model, slim, slimmer.selections)
    return SlimResult(
        model=slim,
        cuts=slimmer.cuts(),
        refused=slimmer.refused + explain_leftovers(slimmer.graph, slim, slimmer.blocks, slimmer.attentions),
        found=slimmer.found,
        certificate=certify(model, slim, checks),
        widths=changed_widths(model, slim),
        selections=slimmer.selections,
        created=created,
        folded=folded,
        parameters_before=sum(parameter.numel() for parameter in model.parameters()),
        parameters_after=sum(parameter.numel() for parameter in slim.parameters()),
    )


def slim(model: nn.Module, example_inputs: Any, **settings: Any) -> nn.Module:
    """A smaller copy of ``model`` with the same outputs; see :func:`slim_model`, which also returns the account."""
    return slim_model(model, example_inputs, **settings).model


@dataclass
class _Slimmer:
    """The state of one slimming: the copy under the knife, what was found, how wide it was."""

    model: nn.Module
    slim: nn.Module
    inputs: ModelInputs
    tracer: str
    refused: list[Refusal] = field(default_factory=list)
    selections: Selections = field(default_factory=dict[str, dict[int, Tensor]])

    def __post_init__(self) -> None:
        self.graph = trace(self.slim, self.inputs, self.tracer)
        self.blocks = find_feed_forward(self.graph, self.slim)
        self.attentions = find_attention(self.graph, self.slim)
        self.found = [_found_block(b, self.slim) for b in self.blocks] + [_found_attention(a) for a in self.attentions]
        self._heads = {id(attention): attention.heads for attention in self.attentions}
        self._widths = {block.root: linear_at(self.slim, block.root).in_features for block in self.blocks}
        self._given_up: set[int] = set()
        with evaluating(self.model):
            self._reference = tensors_of(self.inputs.call(self.model))

    def cut_until_nothing_is_dead(self) -> None:
        """Repeat over all blocks: what is cut in one can leave a row or column of another without weights."""
        while any([*map(self._cut_block, self.blocks), *map(self._cut_attention, self.attentions)]):
            pass
        self.refused += [*self._kept_units(), *self._kept_heads()]

    def cuts(self) -> list[Cut]:
        """What was cut, block by block."""
        made = [
            Cut("feed-forward units", block.root, before, after, "unit")
            for block in self.blocks
            if (before := self._widths[block.root]) != (after := linear_at(self.slim, block.root).in_features)
        ]
        return made + [
            Cut("heads", _where(attention), attention.heads, self._heads[id(attention)], "head")
            for attention in self.attentions
            if attention.heads != self._heads[id(attention)]
        ]

    def _cut_block(self, block: FeedForward) -> bool:
        if block.obstacle is not None:
            return False
        units = feed_forward_units(block, self.slim)
        kept = _kept(units)
        if len(kept) == len(units.dead):
            return False
        cut_feed_forward(block, self.slim, kept, units.constant)
        self._note(block.frontier, block.root, kept)
        return True

    def _cut_attention(self, attention: Attention) -> bool:
        """Cut dead heads, run the model, and take the cut back where its code does not follow."""
        if attention.obstacle is not None or id(attention) in self._given_up:
            return False
        heads = self._heads[id(attention)]
        units = head_units(attention, self.slim, heads)
        kept = _kept(units)
        if len(kept) == heads:
            return False
        modules = [linear_at(self.slim, name) for name in attention.linears]
        modules.append(self.slim.get_submodule(common_parent(attention.linears[:3])))  # type: ignore[arg-type]
        saved = [_snapshot(module) for module in modules]
        cut_heads(attention, self.slim, kept, units.constant)
        problem = self._trial()
        if problem is None:
            self._heads[id(attention)] = len(kept)
            size = units.constant.shape[1]
            elements = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
            self._note(attention.linears[:3], attention.linears[3], elements)
            return True
        for module, state in zip(modules, saved, strict=True):
            _restore(module, state)
        self._given_up.add(id(attention))
        self.refused.append(
            Refusal("heads", _where(attention), f"{heads - len(kept)} of {heads} heads are dead but stay: {problem}")
        )
        return False

    def _note(self, makers: Sequence[str], reader: str, kept: Tensor) -> None:
        """Of the rows of ``makers`` and the columns of ``reader`` only ``kept`` have stayed."""
        for name in makers:
            for part, tensor in linear_at(self.slim, name).named_parameters():
                compose(self.selections, f"{name}.{part}", 0, kept)
                assert len(self.selections[f"{name}.{part}"][0]) == len(tensor)
        compose(self.selections, f"{reader}.weight", 1, kept)

    def _trial(self) -> str | None:
        try:
            with evaluating(self.slim):
                made = tensors_of(self.inputs.call(self.slim))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"the model does not run with fewer heads ({str(error).strip().splitlines()[0]})"
        difference = largest_difference(self._reference, made)
        return None if difference.within else f"with fewer heads the model's outputs differ by {difference.largest:.1e}"

    def _kept_units(self) -> list[Refusal]:
        reason = "all units are dead; one stays, so that the layer keeps a width"
        return [
            Refusal("units", block.root, reason)
            for block in self.blocks
            if block.obstacle is None and bool(feed_forward_units(block, self.slim).dead.all())
        ]

    def _kept_heads(self) -> list[Refusal]:
        refusals: list[Refusal] = []
        for attention in self.attentions:
            heads = self._heads[id(attention)]
            if attention.obstacle is None and id(attention) not in self._given_up:
                if bool(head_units(attention, self.slim, heads).dead.all()):
                    reason = "all heads are dead; one stays, so that the layer keeps a width"
                    refusals.append(Refusal("heads", _where(attention), reason))
            elif attention.obstacle is not None and (dead := _dead_heads(attention, self.slim)):
                reason = f"{dead} of {heads} heads are dead but stay: {attention.obstacle}"
                refusals.append(Refusal("heads", _where(attention), reason))
        return refusals


def _kept(units: Units) -> Tensor:
    """Indices of the units that stay; the first one if none would."""
    kept = (~units.dead).nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.long, device=units.dead.device)


def _dead_heads(attention: Attention, model: nn.Module) -> int:
    """How many heads of a block that cannot be cut are dead, also by its value linear if that is divided alike."""
    if attention.output is None or attention.heads < 1:
        return 0
    unread = zero_columns(linear_at(model, attention.output))
    if len(unread) % attention.heads:
        return 0
    dead = unread.view(attention.heads, -1).all(dim=1)
    if len(attention.value) == 1 and linear_at(model, attention.value[0]).out_features == len(unread):
        dead = dead | zero_rows(linear_at(model, attention.value[0])).view(attention.heads, -1).all(dim=1)
    return int(dead.sum())


def _where(attention: Attention) -> str:
    names = [*attention.query, *attention.key, *attention.value]
    return common_parent(names) or ", ".join(dict.fromkeys(names))


def _found_block(block: FeedForward, model: nn.Module) -> dict[str, Any]:
    return {
        "kind": "feed-forward",
        "where": block.root,
        "root_linear": block.root,
        "target_frontier_linears": list(block.frontier),
        "units": linear_at(model, block.root).in_features,
        "obstacle": block.obstacle,
    }


def _found_attention(attention: Attention) -> dict[str, Any]:
    return {
        "kind": "attention",
        "where": _where(attention),
        "qkv": list(dict.fromkeys([*attention.query, *attention.key, *attention.value])),
        "ffn": [attention.output] if attention.output else [],
        "heads": attention.heads,
        "obstacle": attention.obstacle,
    }


def _snapshot(module: nn.Module) -> Mapping[str, Any]:
    """The module's own attributes and parameters; the tensors themselves are copied."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    return {"own": own, "parameters": parameters}


def _restore(module: nn.Module, state: Mapping[str, Any]) -> None:
    vars(module).update(state["own"])
    module._parameters.update(state["parameters"])
