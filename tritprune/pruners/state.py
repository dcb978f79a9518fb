"""A pruner's stored state: whether it is one, and whether it fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from tritprune.errors import CheckpointError, MaskMismatchError
from tritprune.pruners.masks import LayerMask

FORMAT = "tritprune pruner 1"


def check_state(state: Mapping[str, Any], own: Mapping[str, LayerMask], groups: Sequence[str]) -> None:
    """Refuse what a pruner with these masks and groups cannot take up.

    Raises:
        CheckpointError: not a pruner's state.
        MaskMismatchError: the state is of other layers, blocks or groups; the message has the first difference.
    """
    if state.get("format") != FORMAT:
        raise CheckpointError(f"this is not a pruner's state: its format is {state.get('format')!r}")
    wanted = {name: mask.describe() for name, mask in own.items()}
    found = {name: {k: v for k, v in entry.items() if k != "bits"} for name, entry in state["masks"].items()}
    if wanted == found and set(groups) == set(state["groups"]):
        return
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            here, there = (_described(layers.get(name)) for layers in (wanted, found))
            raise MaskMismatchError(f"the pruner's state does not fit: {name} is {here} here and {there} in the state")
    raise MaskMismatchError(
        f"the pruner's state does not fit: groups {list(groups)} here, {list(state['groups'])} in the state"
    )


def _described(layer: Mapping[str, Any] | None) -> str:
    if layer is None:
        return "not pruned"
    n, m = layer["block"]
    return f"a {layer['kind']} weight {layer['weight_shape']} in blocks of {n}x{m}"
