"""From a masked model to a smaller one with the same outputs: find, cut, explain what stays, certify."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tritprune.errors import CertificateError, ConfigError
from tritprune.slimming.account import SIZES, Selections, changed_widths, copied, named_tensors
from tritprune.slimming.attention import common_parent
from tritprune.slimming.certificate import Certificate, certify
from tritprune.slimming.check_inputs import derive_inputs
from tritprune.slimming.comparison import largest_difference
from tritprune.slimming.graph import trace
from tritprune.slimming.leftovers import Refusal, explain_leftovers, idle_readers
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of
from tritprune.slimming.nodes import Graph
from tritprune.slimming.places import Cut, Place, cuts_of, find_places, found_of, is_empty, recount
from tritprune.slimming.removal import Removal, removal_of, remove
from tritprune.slimming.surgery import cut, selections_of
from tritprune.slimming.units import Units

__all__ = ["Cut", "SlimResult", "slim", "slim_model", "survey"]

STYLES = ("known", "counts", "all", "config")
"""Which attributes of an attention count its heads: what is tried, in this order."""


@dataclass(frozen=True)
class SlimResult:
    """A slimmed model and the account of how it came about.

    Args:
        model: the slim model, in evaluation mode.
        cuts: what was cut.
        refused: what is dead but stays, with the reason.
        found: every place that was looked at: ``kind`` (feed-forward, channels, stream, attention), ``where``, its
            layers, its units or heads, and the ``obstacle`` if none of it can be cut.
        certificate: the proof that the outputs are those of the model that was given.
        widths: what :func:`tritprune.export.save_model` needs to build the slim model again:
            what changed, in the form that :func:`tritprune.slimming.account.changed_widths` describes.
        selections: tensor name -> {dimension: int64 indices into the dimension as it was, in the order kept}, for every
            parameter and buffer that was cut and is still there.
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
    model: nn.Module,
    example_inputs: Any,
    *,
    tracer: str = "jit",
    check_inputs: Sequence[Any] | None = None,
    round_to: int = 1,
) -> SlimResult:
    """Cut the dead units, channels and heads of ``model`` and prove that its outputs stay the same.

    Dead means exactly zero in the weights; a mask must have been applied. The work is done on a copy: the given model
    stays as it is, whatever happens. Activations are taken to be finite, and each query to attend to at least one key.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tracer: how to read the model: "jit" or "export".
        check_inputs: inputs for the certificate, each like ``example_inputs``; by default batches of 1, 2 and 7 and a
            shorter sequence are made from ``example_inputs``.
        round_to: widths that are cut stay multiples of this number: of the dead units, those with the largest weights
            stay, the first among equals.

    Raises:
        ConfigError: unknown tracer, inputs of an odd type, or ``round_to`` below 1.
        TraceError: the model does not run on the inputs, or cannot be traced.
        CertificateError: the slim model's outputs differ; the message names the first module that differs. Or the model
            gives other outputs each time it runs.
    """
    if round_to < 1:
        raise ConfigError(f"round_to is a whole number from 1 on, got {round_to}")
    inputs = ModelInputs.of(example_inputs)
    attempt = _Slimmer(model, inputs, trace(model, inputs, tracer), round_to).attempt()
    checks = [ModelInputs.of(given) for given in check_inputs] if check_inputs else derive_inputs(model, inputs)
    biases, given = attempt.units.weights.folded, attempt.units.weights.tensors
    return SlimResult(
        model=attempt.slim,
        cuts=cuts_of(attempt.units, attempt.places),
        refused=explain_leftovers(attempt.units, attempt.places),
        found=found_of(attempt.units, attempt.places),
        certificate=certify(model, attempt.slim, checks),
        widths=changed_widths(model, attempt.slim),
        selections=attempt.selections,
        created=tuple(name for name, _ in attempt.slim.named_parameters() if name in biases and name not in given),
        folded=tuple(name for name, _ in attempt.slim.named_parameters() if name in biases and name in given),
        parameters_before=sum(parameter.numel() for parameter in model.parameters()),
        parameters_after=sum(parameter.numel() for parameter in attempt.slim.parameters()),
    )


def slim(model: nn.Module, example_inputs: Any, **settings: Any) -> nn.Module:
    """A smaller copy of ``model`` with the same outputs; see :func:`slim_model`, which also returns the account."""
    return slim_model(model, example_inputs, **settings).model


def survey(model: nn.Module, graph: Graph) -> list[dict[str, Any]]:
    """What :func:`slim_model` would look at, as in :attr:`SlimResult.found`; nothing is cut.

    Args:
        model: any module; left as it is.
        graph: traced from it.
    """
    units = Units(model, graph, 1, {})
    return found_of(units, find_places(units))


@dataclass(frozen=True)
class _Attempt:
    """A copy of the model that was cut, and what was taken away."""

    slim: nn.Module
    units: Units
    places: list[Place]
    selections: Selections
    problem: str | None


@dataclass
class _Slimmer:
    """Cuts all that is dead in one go; where the model's code does not follow, finds out which place is to blame.

    Attributes:
        forbidden: family -> why it stays as it is.
        one_stays: family -> why it keeps a unit where all are dead.
    """

    model: nn.Module
    inputs: ModelInputs
    graph: Graph
    round_to: int
    forbidden: dict[int, str] = field(default_factory=dict)
    one_stays: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with evaluating(self.model):
            self._reference = tensors_of(self.inputs.call(self.model))
        units = Units(self.model, self.graph, 1, {})
        places = find_places(units)
        heads = {place.family for place in places if place.attentions}
        self.forbidden |= {f: reason for f, reason in idle_readers(units).items() if f not in heads}
        self.one_stays |= {place.family: reason for place in places if (reason := self._needs_one(place))}
        self._known: dict[str, Removal | str] = {}

    def _needs_one(self, place: Place) -> str | None:
        """Why a width cannot be 0 in PyTorch."""
        layers = [self.model.get_submodule(name.rpartition(".")[0]) for name, _ in place.dims]
        for kind, word in ((nn.modules.conv._ConvNd, "convolution"), (nn.modules.batchnorm._NormBase, "batch norm")):
            if any(isinstance(layer, kind) for layer in layers):
                return f"a {word} has at least one channel"
        return None

    def attempt(self) -> _Attempt:
        """The first attempt whose model runs and gives the same outputs."""
        while True:
            made = self._best({}, self.one_stays)
            if made.problem is None:
                return made
            affected = self._affected(made)
            if not affected:
                raise CertificateError(
                    f"{type(self.model).__name__} gives other outputs each time it runs, or a copy of it does not run, "
                    f"so that nothing can be proved: {made.problem}"
                )
            emptied = [place for place in affected if made.units.emptied(place.family)]
            if emptied:
                whole = self._best({}, self.one_stays | {place.family: "not tried" for place in emptied})
                if whole.problem is None:
                    self.one_stays |= self._not_empty(made, emptied)
                    continue
                made, affected = whole, self._affected(whole)
            self.forbidden |= self._blamed(made) or {place.family: str(made.problem) for place in affected}

    def _not_empty(self, failed: _Attempt, emptied: list[Place]) -> dict[int, str]:
        """The places that fail when they lose all of their units; those whose attention is of one class together."""
        alike: dict[Any, list[Place]] = {}
        for place in emptied:
            kinds = tuple(type(self.model.get_submodule(attention.module)) for attention in place.attentions)
            alike.setdefault(kinds or place.kind, []).append(place)
        blamed: dict[int, str] = {}
        for group in alike.values() if len(alike) > 1 else ():
            others = {place.family: "not tried" for place in emptied if place not in group}
            alone = self._best({}, self.one_stays | others)
            if alone.problem is not None:
                blamed |= dict.fromkeys((place.family for place in group), alone.problem)
        return blamed or {place.family: str(failed.problem) for place in emptied}

    def _blamed(self, failed: _Attempt) -> dict[int, str]:
        """The places that fail when they alone are cut."""
        places = self._affected(failed)
        blamed: dict[int, str] = {}
        for place in places:
            others = {other.family: "not tried" for other in failed.places if other is not place}
            alone = self._best(others, failed.units.one_stays)
            if alone.problem is not None:
                blamed[place.family] = alone.problem
        return blamed

    def _affected(self, attempt: _Attempt) -> list[Place]:
        units = attempt.units
        return [place for place in attempt.places if units.weights.gone[units.members(place.family)].any()]

    def _best(self, others: dict[int, str], one_stays: dict[int, str]) -> _Attempt:
        """An attempt, with the attributes that make the model run."""
        while True:
            units = Units(self.model, self.graph, self.round_to, {**others, **self.forbidden}, one_stays)
            places = find_places(units)
            units.take_away_all()
            removals, held = self._removals(units, places)
            if not held:
                break
            self.one_stays |= held
            one_stays = one_stays | held
        selections = selections_of(units.weights)
        attempts = (self._cut(units, places, selections, removals, style) for style in STYLES)
        first = next(attempts)
        if first.problem is None or not any(place.attentions for place in self._affected(first)):
            return first
        found = next((attempt for attempt in attempts if attempt.problem is None), first)
        self._put_back(found)
        return found

    def _removals(self, units: Units, places: list[Place]) -> tuple[list[Removal], dict[int, str]]:
        """The attentions without a living head, which go as a whole; by family, why others cannot.

        None stays with no head: a cache of no heads counts no tokens, and fused attention is not made for them.
        """
        removals: dict[str, Removal] = {}
        held: dict[int, str] = {}
        for place in places:
            for attention in place.attentions:
                if not is_empty(units, attention):
                    continue
                where = attention.where
                if where not in self._known:
                    self._known[where] = removal_of(self.model, self.inputs, self.graph, attention)
                known = self._known[where]
                if isinstance(known, Removal):
                    removals[where] = known
                else:
                    held[place.family] = known
        return list(removals.values()), held

    def _put_back(self, made: _Attempt) -> None:
        """Undo those changed counts that the model runs without: a number may be equal by chance."""
        if made.problem is not None:
            return
        given = dict(self.model.named_modules())
        attentions = [attention for place in made.places for attention in place.attentions]
        names = {name for a in attentions for name in (a.where, common_parent([*a.feeding, str(a.output)]))}
        for name in sorted(names & given.keys()):
            module = made.slim.get_submodule(name)
            for key, value in list(vars(module).items()):
                was = vars(given[name]).get(key)
                if type(value) is int and type(was) is int and value != was and key not in SIZES:
                    setattr(module, key, was)
                    if self._trial(made.slim) is not None:
                        setattr(module, key, value)

    def _cut(
        self, units: Units, places: list[Place], selections: Selections, removals: list[Removal], style: str
    ) -> _Attempt:
        slim = copied(self.model).eval()
        slim.zero_grad(set_to_none=True)
        cut(slim, units.weights, selections)
        recount(slim, units, places, style)
        for removal in removals:
            remove(slim, removal)
        left = named_tensors(slim)
        return _Attempt(slim, units, places, {n: s for n, s in selections.items() if n in left}, self._trial(slim))

    def _trial(self, slim: nn.Module) -> str | None:
        try:
            with evaluating(slim):
                made = tensors_of(self.inputs.call(slim))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "multiple of 16 bytes" in said:  # products of stacked experts
                size = max(p.element_size() for p in self.model.parameters())
                said = f"{said}: round_to={max(16 // size, 1)} keeps to that"
            return f"the model does not run without them ({said})"
        difference = largest_difference(self._reference, made)
        return None if difference.within else f"without them the model's outputs differ by {difference.largest:.1e}"
