"""Training after slimming: the pruning phase goes on in the slim model where it stopped in the masked one.

Slimming stands in the middle of one phase: examples, learning rate and optimizer state go on as if nothing had been cut
(:func:`tritprune.slimming.slim_optimizer` says what cannot). Masks of what is zero and could not be cut go on as well.

The certificate is about the moment of slimming, ``pruned/`` against ``slim/``. What is trained afterwards has other
outputs on purpose and is saved as ``tuned/``; ``tuning.json`` has the hashes of the slim model that it came from and of
what it became, so that ``verify`` can follow the chain from the certificate to the final weights.
"""

import hashlib
import json
from typing import Any

from torch import nn

from tritprune.errors import CheckpointError
from tritprune.export import save_model
from tritprune.patterns import to_2d
from tritprune.pruners import MaskSet
from tritprune.pruners.masks import LayerMask
from tritprune.slimming import Carried, SlimResult, slim_optimizer, state_sha256
from tritprune.slimming.account import selected
from tritprune.training.checkpoint import BEFORE_SLIM, CERTIFICATE, MASKS, SLIM, RunFolder, write_json
from tritprune.training.loop import optimizer_of, trained_in
from tritprune.training.settings import Phase

TUNED, TUNING, SLIM_MASKS = "tuned", "tuning.json", "slim_masks.safetensors"
PHASE = "tune"


def cut_masks(masks: MaskSet, result: SlimResult) -> MaskSet:
    """The masks of the weights that the slim model still has, element by element.

    Args:
        masks: of the model that was slimmed.
        result: what :func:`tritprune.slimming.slim_model` made of it.
    """
    left: dict[str, LayerMask] = {}
    slim = dict(result.model.named_parameters(remove_duplicate=False))
    for name, layer in masks.items():
        weight = f"{name}.weight"
        if weight not in slim:
            continue  # its whole block was dead
        stays = selected(layer.element_mask(), result.selections.get(weight, {}))
        left[name] = LayerMask(to_2d(stays, layer.kind), (1, 1), layer.kind, tuple(stays.shape))
    return MaskSet(left)


def hand_over(folder: RunFolder, masked: nn.Module, result: SlimResult, phase: Phase) -> Carried:
    """Leave a checkpoint with which training goes on in the slim model, and its masks.

    Args:
        folder: has the checkpoint of the end of pruning and the masks.
        masked: what was slimmed.
        result: what came of it.
        phase: the optimizer's settings.

    Returns:
        What became of the optimizer's parameters.

    Raises:
        CheckpointError: the checkpoint of the end of pruning is missing or damaged.
    """
    state = folder.load_checkpoint("cpu", BEFORE_SLIM)
    if state is None:
        raise CheckpointError(f"{folder / BEFORE_SLIM} is missing: training cannot go on after slimming; run anew")
    optimizer = optimizer_of(masked, phase, trained_in(state))
    optimizer.load_state_dict(state["optimizer"])
    carried = slim_optimizer(optimizer, masked, result)
    cut_masks(MaskSet.load(folder / MASKS), result).save(folder / SLIM_MASKS)
    slim = {"model": result.model.state_dict(), "optimizer": optimizer.state_dict()}
    folder.save_checkpoint({**state, **slim, "phase": PHASE, "pruner": {}})
    return carried


def save_tuned(folder: RunFolder, model: nn.Module, *, builder: dict[str, Any], metrics: dict[str, float]) -> None:
    """Leave ``tuned/`` and ``tuning.json``, which ties it to the slim model that the certificate is about."""
    widths = json.loads((folder / SLIM / "manifest.json").read_text(encoding="utf-8"))["widths"]
    save_model(model, folder / TUNED, builder=builder, widths=widths, extra={"metrics": metrics})
    record = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    files = (f"{TUNED}/manifest.json", SLIM_MASKS)
    write_json(
        folder / TUNING,
        {
            "metrics": metrics,
            "slim_sha256": record["models_sha256"]["slim"],
            "tuned_sha256": state_sha256(model),
            "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        },
    )
