"""Every key of a Neural Compressor 2.x pruning config and what becomes of it: the code and docs/ read the same table.

Defaults are those of ``neural_compressor.compression.pruner.utils.process_and_check_config`` in version 2.6.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritprune.criteria import criteria
from tritprune.errors import ConfigError
from tritprune.pruners import Pruner, pruners
from tritprune.registry import did_you_mean


@dataclass(frozen=True)
class Key:
    """A key that is honoured.

    Args:
        name: theirs.
        default: theirs.
        setting: ours.
        note: what to know.
    """

    name: str
    default: Any
    setting: str
    note: str = ""


KEYS = (
    Key("target_sparsity", 0.9, "target_sparsity", "never silently lowered to `max_sparsity_ratio_per_op`: an error"),
    Key("pruning_type", "snip_momentum", "pruner and criterion", "see the next table"),
    Key("pattern", "4x1", "pattern", "`NxM`, `channelx1`, `N:M`, `mha` (`heads`); a prefix `tile_pattern_` is dropped"),
    Key("op_names", [], "include", "the layers in which a regular expression is found; none: all; see below"),
    Key("excluded_op_names", [], "exclude", "the same; an entry without a match excludes nothing"),
    Key("pruning_op_types", ["Conv", "Linear"], "include", "parts of class names; a bare string is one of them"),
    Key("start_step", 0, "start_step", "also a fraction of training, or `2ep`"),
    Key("end_step", 0, "end_step", "as `start_step`; the last update is the last multiple of the frequency by then"),
    Key("pruning_scope", "global", "scope"),
    Key("pruning_frequency", 1, "frequency"),
    Key("min_sparsity_ratio_per_op", 0.0, "min_layer_sparsity", "a floor, reached with the target"),
    Key("max_sparsity_ratio_per_op", 0.98, "max_layer_sparsity", "a hard cap; at most N/M for N:M"),
    Key("sparsity_decay_type", "exp", "schedule", "`exp`, `cos`, `linear`, `cube`: the same formulas"),
    Key("criterion_type", "snip_momentum", "criterion", "only with pattern `mha`; elsewhere it has to agree"),
    Key("criterion_reduce_type", "mean", "reduce", "`mean`, `sum`, `max`"),
    Key("reg_type", None, "regularizer", "`group_lasso`: proximal, on weight norms; the coefficient has another scale"),
    Key("reg_coeff", 0.0, "regularizer", "at any level; theirs reads it from `parameters` only"),
    Key("parameters", None, "regularizer", "`{reg_coeff: ...}`"),
    Key("low_memory_usage", False, "score_dtype", "true: bf16, never fp16"),
)
"""The keys that are honoured."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "resume_from_pruned_checkpoint": (
        (None, False),
        "nothing in Neural Compressor reads it; use pruner.load_state_dict(state), or resume=auto on the command line",
    ),
    "lock_init_sparsity": ((None, False), "use pruning_type: pattern_lock to keep the zeros that are there"),
    "backend": ((None, "default"), "use kernels.backend on the command line or tritprune.use_backend"),
    "framework": ((None, "pytorch"), "tritprune prunes torch models"),
    "device": ((None,), "move the model: pruning happens where its weights are"),
    "progressive": ((None,), "use a pruning_type that ends in _progressive"),
}
"""Keys that are accepted with these values only, and what to use instead."""

RENAMED = {
    "names": "op_names",
    "exclude_names": "excluded_op_names",
    "excluded_names": "excluded_op_names",
    "extra_excluded_names": "excluded_op_names",
    "prune_layer_type": "pruning_op_types",
    "prune_domain": "pruning_scope",
    "prune_type": "pruning_type",
    "update_frequency_on_step": "pruning_frequency",
    "update_frequency": "pruning_frequency",
    "max_sparsity_ratio_per_layer": "max_sparsity_ratio_per_op",
    "min_sparsity_ratio_per_layer": "min_sparsity_ratio_per_op",
    "start_epoch": "start_step: '2ep'",
    "end_epoch": "end_step: '2ep'",
    "method": "pruning_scope",
    "pruners": "pruning_configs",
}
"""Keys of version 1.x -> those that replace them."""

CRITERIA = {
    "magnitude": "magnitude",
    "gradient": "gradient",
    "snip": "snip",
    "snip_momentum": "snip_momentum",
    "block_mask": "snip_momentum_block",
}
"""Their criterion -> ours."""

OTHER_TYPES = {"pattern_lock": "pattern_lock", "retrain_free": "retrain_free"}
"""Their pruning types that are no criterion -> our pruner."""

UNSUPPORTED_TYPES = {
    "sparse_gpt": "a one-shot for language models that is not here yet; pruner one_shot with criterion magnitude and "
    "pattern 2:4 is the nearest",
}
"""Their pruning types that are refused, and why."""


def check_keys(where: str, given: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be ignored.

    Args:
        where: which part of the config, for messages.
        given: its keys and values.

    Raises:
        ConfigError: an unknown key (with the nearest), one of 1.x (with its name now), or one that cannot be honoured
            (with what replaces it).
    """
    known = [key.name for key in KEYS]
    for name, value in given.items():
        if name in REFUSED:
            accepted, instead = REFUSED[name]
            if not any(value is other or value == other for other in accepted):
                raise ConfigError(f"{where}: {name}={value!r} cannot be honoured; {instead}")
        elif name in RENAMED:
            raise ConfigError(f"{where}: '{name}' is a key of Neural Compressor 1.x; write {RENAMED[name]}")
        elif name not in known:
            raise ConfigError(f"{where} has no key '{name}'; {did_you_mean(str(name), known)}")


def check_here(what: str, kind: str, name: str) -> None:
    """Refuse by its own name what needs a part that this version of tritprune does not have.

    Args:
        what: the key and value, for messages.
        kind: "pruner", "criterion" or "setting".
        name: of the part.

    Raises:
        ConfigError: the part is missing.
    """
    if not _is_here(kind, name):
        raise ConfigError(f"{what} needs {kind} '{name}', which is not here yet; leave it out or choose another")


def _is_here(kind: str, name: str) -> bool:
    known = {"pruner": pruners, "criterion": criteria, "setting": inspect.signature(Pruner).parameters}
    return name in known[kind]


def table() -> str:
    """The keys in Markdown, for docs/neural_compressor.md."""

    def mark(kind: str, name: str) -> str:
        return f"`{name}`" if _is_here(kind, name) else f"`{name}`, not here yet: refused"

    lines = ["| their key | default | becomes | note |", "|---|---|---|---|"]
    for key in KEYS:
        becomes = mark("setting", key.setting) if " " not in key.setting else key.setting
        lines.append(f"| `{key.name}` | `{key.default}` | {becomes} | {key.note} |")
    lines += [
        f"| `{name}` | `{values[0]}` | refused if set | {instead} |" for name, (values, instead) in REFUSED.items()
    ]
    lines += ["", "| their `pruning_type` | pruner | criterion |", "|---|---|---|"]
    lines += [f"| `{theirs}` | `iterative` | {mark('criterion', ours)} |" for theirs, ours in CRITERIA.items()]
    lines.append(f"| any of these and `_progressive` | {mark('pruner', 'progressive')} | that of the first part |")
    lines += [f"| `{theirs}` | {mark('pruner', ours)} | |" for theirs, ours in OTHER_TYPES.items()]
    lines += [f"| `{theirs}` | refused | {why} |" for theirs, why in UNSUPPORTED_TYPES.items()]
    lines += ["", "| key of version 1.x, refused | write |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    return "\n".join(lines) + "\n"
