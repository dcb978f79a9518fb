"""The keys of one layer group -> the name of a pruner and the settings of a group of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.neural_compressor.keys import CRITERIA, OTHER_TYPES, UNSUPPORTED_TYPES, check_here
from tritprune.neural_compressor.layers import choose_layers
from tritprune.neural_compressor.reading import resolve
from tritprune.pruners.layers import Inventory
from tritprune.registry import did_you_mean
from tritprune.schedules import resolve_step

_DECAYS = ("exp", "cos", "linear", "cube")
_PROGRESSIVE = "_progressive"


@dataclass(frozen=True)
class Length:
    """How long training is, where it is known.

    Args:
        total_steps: optimizer steps.
        steps_per_epoch: optimizer steps of an epoch.
    """

    total_steps: int | None = None
    steps_per_epoch: int | None = None


def translate(
    shared: Mapping[str, Any], group: Mapping[str, Any], model: nn.Module, inventory: Inventory, length: Length
) -> tuple[str, dict[str, Any]]:
    """The pruner's registered name, and the group's settings.

    Args:
        shared: the keys that hold for all groups.
        group: this group's own.
        model: whose layers are pruned.
        inventory: its layers.
        length: for steps that are fractions or epochs.

    Raises:
        ConfigError: a value that is out of range, that contradicts another one, or that cannot be honoured.
    """
    values = resolve(shared, group)
    pattern = _pattern(values["pattern"])
    pruner, criterion = _kind(str(values["pruning_type"]))
    check_here(f"pruning_type '{values['pruning_type']}'", "pruner", pruner)
    include, exclude = choose_layers(model, inventory, values)
    settings: dict[str, Any] = {"pattern": pattern, "include": include, "exclude": exclude, "exclude_head": True}
    if pruner == "pattern_lock":
        return pruner, settings
    criterion = _agreed_criterion(values, criterion, pattern)
    if criterion is not None:
        check_here(f"pruning_type '{values['pruning_type']}'", "criterion", criterion)
    settings |= {
        "scope": values["pruning_scope"],
        "target_sparsity": values["target_sparsity"],
        "min_layer_sparsity": values["min_sparsity_ratio_per_op"],
        "max_layer_sparsity": _cap(values["max_sparsity_ratio_per_op"], pattern),
        "reduce": values["criterion_reduce_type"],
    }
    regularizer = _regularizer(values, pattern)
    if regularizer is not None:
        check_here("reg_type group_lasso", "setting", "regularizer")
        settings["regularizer"] = regularizer
    if values["low_memory_usage"]:
        check_here("low_memory_usage", "setting", "score_dtype")
        settings["score_dtype"] = "bf16"
    if pruner == "retrain_free":
        return pruner, _calibrated(settings, values, length)
    return pruner, {**settings, "criterion": criterion, **_times(values, length, criterion), "schedule": _decay(values)}


def _calibrated(settings: dict[str, Any], values: Mapping[str, Any], length: Length) -> dict[str, Any]:
    """Settings of pruner ``retrain_free``: the steps until ``end_step`` are its calibration batches."""
    for key, theirs in (("regularizer", "reg_type"), ("score_dtype", "low_memory_usage")):
        if key in settings:
            raise ConfigError(f"{theirs} does nothing with pruning_type 'retrain_free': no weight is trained")
    times = _times({**values, "pruning_frequency": 1}, length, "retrain_free")
    told = {"start_step": times["start_step"] not in (0, times["end_step"])}
    told |= {key: values[key] != default for key, default in (("pruning_frequency", 1), ("sparsity_decay_type", "exp"))}
    for key, given in told.items():
        if given:
            raise ConfigError(
                f"{key}={values[key]!r} cannot be honoured with pruning_type 'retrain_free': all steps until end_step "
                "calibrate, and then the masks are chosen once; leave it out"
            )
    return {**settings, "end_step": times["end_step"]}


def _kind(pruning_type: str) -> tuple[str, str | None]:
    """The pruner and, where the type names one, the criterion."""
    if pruning_type in UNSUPPORTED_TYPES:
        raise ConfigError(f"pruning_type '{pruning_type}': {UNSUPPORTED_TYPES[pruning_type]}")
    if pruning_type in OTHER_TYPES:
        return OTHER_TYPES[pruning_type], None
    name = pruning_type.removesuffix(_PROGRESSIVE)
    if name in CRITERIA:
        return "progressive" if pruning_type.endswith(_PROGRESSIVE) else "iterative", CRITERIA[name]
    known = [*CRITERIA, *(name + _PROGRESSIVE for name in CRITERIA), *OTHER_TYPES]
    raise ConfigError(f"unknown pruning_type '{pruning_type}'; {did_you_mean(pruning_type, known)}")


def _pattern(text: object) -> str:
    """``4x1`` of ``4x1`` or ``tile_pattern_4x1``; ``heads`` of ``mha``."""
    if not isinstance(text, str):
        raise ConfigError(f"pattern is a word such as '4x1' or '2:4', got {text!r} (quote 2:4 in yaml)")
    return "heads" if "mha" in text else text.rpartition("_")[2]


def _agreed_criterion(values: Mapping[str, Any], criterion: str | None, pattern: str) -> str | None:
    """``criterion_type`` counts for heads; elsewhere ``pruning_type`` does, and the two must agree.

    The default of either says nothing: Neural Compressor writes its defaults into the configs that it is given.
    """
    word, default = values["criterion_type"], CRITERIA["snip_momentum"]
    if word not in CRITERIA and word != "retrain_free":
        raise ConfigError(f"unknown criterion_type '{word}'; {did_you_mean(str(word), list(CRITERIA))}")
    other = CRITERIA.get(word)
    if criterion is None or other in (criterion, default):
        return criterion
    if pattern == "heads" and criterion == default:
        return other
    raise ConfigError(
        f"criterion_type '{word}' contradicts pruning_type '{values['pruning_type']}', which decides; "
        f"write pruning_type: {word}"
    )


def _cap(cap: float, pattern: str) -> float:
    n, colon, m = pattern.partition(":")
    if not colon or not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        return cap
    return min(cap, int(n) / int(m))


def _regularizer(values: Mapping[str, Any], pattern: str) -> dict[str, Any] | None:
    kind = values["reg_type"]
    try:
        coeff = float(values["reg_coeff"])  # yaml reads 1e-4 as text
    except (TypeError, ValueError):
        raise ConfigError(f"reg_coeff is a number, got {values['reg_coeff']!r}") from None
    if kind is None:
        if coeff:
            raise ConfigError(f"reg_coeff={coeff:g} does nothing without reg_type: group_lasso")
        return None
    if kind != "group_lasso":
        raise ConfigError(f"unknown reg_type '{kind}'; {did_you_mean(str(kind), ['group_lasso'])}")
    if coeff < 0:
        raise ConfigError(f"reg_coeff must be at least 0, got {coeff:g}")
    if "x" not in pattern:
        raise ConfigError(f"reg_type group_lasso needs a block pattern such as 4x1, got {pattern}")
    return {"name": "group_lasso", "coeff": coeff} if coeff else None


def _decay(values: Mapping[str, Any]) -> str:
    decay = values["sparsity_decay_type"]
    if decay not in _DECAYS:
        hint = "; tritprune's cubic is the schedule of Zhu and Gupta, their cube starts slowly" * (decay == "cubic")
        raise ConfigError(f"unknown sparsity_decay_type '{decay}'; {did_you_mean(str(decay), _DECAYS)}{hint}")
    return decay


def _times(values: Mapping[str, Any], length: Length, criterion: str | None) -> dict[str, int]:
    """Their mask updates: at ``start_step``, then every ``pruning_frequency`` steps, the last by ``end_step``."""
    frequency = values["pruning_frequency"]
    if type(frequency) is not int or frequency < 1:
        raise ConfigError(f"pruning_frequency must be a whole number of at least 1, got {frequency!r}")
    start, end = (
        resolve_step(values[key], total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch)
        for key in ("start_step", "end_step")
    )
    if end < start:
        raise ConfigError(f"end_step={end} is before start_step={start}")
    if length.total_steps is not None and end > length.total_steps:
        raise ConfigError(f"end_step={end} is past the end of training, {length.total_steps} steps")
    if end == 0 and criterion != "magnitude":
        raise ConfigError(
            f"end_step is 0 and criterion {criterion} needs gradients; give start_step and end_step (what "
            "update_config sets in Neural Compressor is a key of the config here)"
        )
    last = start + (end - start) // frequency * frequency
    return {"start_step": start, "end_step": last, "frequency": frequency}
