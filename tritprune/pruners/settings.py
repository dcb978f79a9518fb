"""What a user may set, per layer group; everything is checked before any training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch

from tritprune.criteria import Criterion
from tritprune.errors import ConfigError
from tritprune.patterns import Pattern
from tritprune.pruners.regularizers import Regularizer
from tritprune.registry import check_arguments
from tritprune.schedules import PruneTimes, Schedule
from tritprune.selection import Normalize

SCOPES = ("global", "local")
SCORE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """The settings of one layer group; :class:`~tritprune.pruners.base.Pruner` says what each means.

    Raises:
        ConfigError: a value out of range, or values that contradict each other.
    """

    name: str = "all"
    criterion: str | Mapping[str, Any] | Criterion = "snip_momentum"
    pattern: str | Mapping[str, Any] | Pattern = "4x1"
    schedule: str | Mapping[str, Any] | Schedule = "cubic"
    scope: str = "global"
    target_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    start_step: int = 0
    end_step: int
    frequency: int = 1
    include: Sequence[str] = ("**",)
    exclude: Sequence[str] = ()
    exclude_head: bool = True
    min_layer_sparsity: float = 0.0
    max_layer_sparsity: float = 1.0
    reduce: str = "mean"
    normalize: Normalize = "none"
    score_dtype: str = "fp32"
    regularizer: str | Mapping[str, Any] | Regularizer | None = None
    regrow: bool = False
    reset_state: bool = False

    def __post_init__(self) -> None:
        for key in ("target_sparsity", "initial_sparsity"):
            if not 0 <= _number(key, getattr(self, key)) < 1:
                raise ConfigError(f"{key} is a fraction of zeros in [0, 1), got {getattr(self, key)}")
        for key in ("min_layer_sparsity", "max_layer_sparsity"):
            if not 0 <= _number(key, getattr(self, key)) <= 1:
                raise ConfigError(f"{key} is a fraction of zeros in [0, 1], got {getattr(self, key)}")
        _rising("initial_sparsity", self.initial_sparsity, "target_sparsity", self.target_sparsity)
        _rising("min_layer_sparsity", self.min_layer_sparsity, "max_layer_sparsity", self.max_layer_sparsity)
        if self.scope not in SCOPES:
            raise ConfigError(f"scope is one of {', '.join(SCOPES)}, got '{self.scope}'")
        for key, known in (("normalize", get_args(Normalize)), ("score_dtype", tuple(SCORE_DTYPES))):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key} is one of {', '.join(known)}, got '{getattr(self, key)}'")
        for key in ("include", "exclude"):
            globs = getattr(self, key)
            if isinstance(globs, str):  # a string is a sequence of its letters, each of which would be a glob
                raise ConfigError(
                    f"{key} is a list of layer names or globs, got the string '{globs}'; write ['{globs}']"
                )
            object.__setattr__(self, key, tuple(str(glob) for glob in globs or ()))
        for key in ("exclude_head", "regrow", "reset_state"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} is true or false, got {getattr(self, key)!r}")
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a group's name is a word, got {self.name!r}")
        _ = self.times

    @property
    def times(self) -> PruneTimes:
        """When masks are updated."""
        return PruneTimes(self.start_step, self.end_step, self.frequency)


def check_groups(groups: object) -> None:
    """Refuse what is no list of mappings.

    Raises:
        ConfigError: something else.
    """
    fits = groups is None or (isinstance(groups, Sequence) and all(isinstance(group, Mapping) for group in groups))
    if not fits:
        raise ConfigError(f"groups is a list of mappings, one per layer group, got {groups!r}")


def resolve_groups(defaults: GroupSettings, groups: Sequence[Mapping[str, Any]] | None) -> list[GroupSettings]:
    """The settings of every group: ``defaults`` overridden by each mapping. No group: the defaults alone.

    Raises:
        ConfigError: an unknown key, two groups of one name, or a group's values out of range.
    """
    if not groups:
        return [defaults]
    accepted = {field.name for field in fields(GroupSettings)}
    resolved: list[GroupSettings] = []
    for number, overrides in enumerate(groups):
        values = dict(overrides)
        name = values.setdefault("name", f"group_{number}")
        unknown = set(values) - accepted
        if unknown:
            check_arguments(f"pruner group '{name}'", GroupSettings, values)
        if any(name == other.name for other in resolved):
            raise ConfigError(f"two pruner groups are called '{name}'")
        try:
            resolved.append(replace(defaults, **values))
        except ConfigError as error:
            raise type(error)(f"pruner group '{name}': {error}") from None
    return resolved


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} is a number, got {value!r}")
    return float(value)


def _rising(low: str, low_value: float, high: str, high_value: float) -> None:
    if low_value > high_value:
        raise ConfigError(f"{low}={low_value:g} is above {high}={high_value:g}")
