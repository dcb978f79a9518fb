"""The names by which a Neural Compressor user knows a pruner, for loops that were written for it.

The hooks on the optimizer (:meth:`Pruner.attach`) are the way to prune. A loop that calls a pruner's functions itself
works as well: while the pruner is attached the functions do nothing, so that no step counts twice.

    for batch in batches:
        pruner.on_step_begin(step)
        loss(batch).backward()
        pruner.on_before_optimizer_step()   # scores
        optimizer.step()
        pruner.on_after_optimizer_step()    # masks
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.patterns import Pattern, WeightView
from tritprune.pruners.attachment import claim, release
from tritprune.pruners.settings import GroupSettings
from tritprune.schedules import Schedule

if TYPE_CHECKING:
    from tritprune.pruners.group import LayerGroup
    from tritprune.pruners.record import Record


class SpecNames:
    """Attributes and functions of a Neural Compressor pruner, on top of :class:`~tritprune.pruners.base.Pruner`.

    An attribute that is one setting of a layer group has the value that all groups share.
    """

    if TYPE_CHECKING:
        model: nn.Module
        step: int
        _groups: Sequence[LayerGroup]
        _views: list[WeightView]
        _record: Record
        _optimizer: Any
        _begin: Callable[[], None]
        _before_step: Callable[..., None]
        _after_step: Callable[..., None]

    _by_hand = False

    @property
    def groups(self) -> tuple[GroupSettings, ...]:
        """The settings of every layer group."""
        return tuple(group.settings for group in self._groups)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The pruned layers by dotted name."""
        return {view.name: view.module for view in self._views}

    @property
    def config(self) -> dict[str, Any]:
        """The settings by name, those that all groups share."""
        first, *rest = (vars(settings) for settings in self.groups)
        return {key: value for key, value in first.items() if all(other[key] == value for other in rest)}

    @property
    def pattern(self) -> Pattern:
        """The pattern that all groups share."""
        self._shared("pattern")
        return self._groups[0].pattern

    @property
    def scheduler(self) -> Schedule:
        """The schedule that all groups share."""
        self._shared("schedule")
        return self._groups[0].schedule

    @property
    def current_sparsity_ratio(self) -> float:
        """Zeros / elements of the masks in force, over the pruned layers; without a pass over the weights."""
        self._record.settle()
        counts = self._record.counts.values()
        return sum(count.zeros for count in counts) / sum(count.elements for count in counts)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self.step

    @property
    def start_step(self) -> int:
        """The first step at which a mask can change."""
        return min(settings.start_step for settings in self.groups)

    @property
    def end_step(self) -> int:
        """The last step at which a mask can change."""
        return max(settings.end_step for settings in self.groups)

    @property
    def update_frequency_on_step(self) -> int:
        """Optimizer steps between mask updates."""
        return self._shared("frequency")

    @property
    def target_sparsity_ratio(self) -> float:
        """The sparsity over all pruned layers in the end."""
        elements = sum(group.elements for group in self._groups)
        if len(self._groups) == 1:
            return self._groups[0].settings.target_sparsity
        return sum(group.settings.target_sparsity * group.elements for group in self._groups) / elements

    @property
    def max_sparsity_ratio_per_layer(self) -> float:
        """The hard cap of every layer."""
        return self._shared("max_layer_sparsity")

    def on_train_begin(self, dataloader: object = None) -> None:
        """Before the first step: a prune step at step 0 happens now. Does nothing while attached.

        Raises:
            ConfigError: another pruner is at work on one of the layers, or ``reset_state`` or a regularizer, which need
                the optimizer.
        """
        del dataloader
        if self._optimizer is not None or self._by_hand:
            return
        for setting in ("reset_state", "regularizer"):
            if any(getattr(settings, setting) for settings in self.groups):
                raise ConfigError(f"{setting} needs the optimizer: call attach(optimizer) instead of the functions")
        claim(self, self._views)
        self._by_hand = True
        self._begin()

    def on_epoch_begin(self, epoch: int) -> None:
        """Nothing: sparsity grows by optimizer steps."""

    def on_step_begin(self, local_step: int = 0) -> None:
        """As :meth:`on_train_begin`, if that was not called. Masks are updated after a step, not before the next."""
        del local_step
        self.on_train_begin()

    def on_before_optimizer_step(self) -> None:
        """Scores, from the gradients and from the weights before the update. Does nothing while attached."""
        if self._optimizer is None:
            self.on_train_begin()
            self._before_step(None, (), {})

    def on_after_optimizer_step(self) -> None:
        """One step more; masks are updated if due, and applied. Does nothing while attached."""
        if self._optimizer is None:
            self._after_step(None)

    def on_step_end(self) -> None:
        """Nothing."""

    def on_epoch_end(self) -> None:
        """Nothing."""

    def on_train_end(self) -> None:
        """Let go of the layers, as :meth:`Pruner.detach` does.

        Raises:
            NonFiniteScoreError: at the last mask update.
        """
        if self._by_hand:
            self._by_hand = False
            release(self, self._views)
            self._record.settle()

    def on_before_eval(self) -> None:
        """Nothing: a forward pass never prunes."""

    def on_after_eval(self) -> None:
        """Nothing."""

    def _shared(self, key: str) -> Any:
        """The value of a setting that all groups share."""
        values = [getattr(settings, key) for settings in self.groups]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{settings.name}: {getattr(settings, key)}" for settings in self.groups)
            raise ConfigError(f"{key} differs between the layer groups ({told}); pruner.groups has each")
        return values[0]


def by_modules(config: Any, modules: Any) -> tuple[str | Mapping[str, Any], nn.Module | None]:
    """A pruner's settings and model from a config and either a model or ``{dotted name: layer}``, in any order.

    Raises:
        ConfigError: the config is one of Neural Compressor.
    """
    if isinstance(config, nn.Module) or _are_modules(config):
        config, modules = modules, config
    if isinstance(config, Mapping) and "pruning_type" in config:
        raise ConfigError(
            "this is a Neural Compressor config; tritprune.from_neural_compressor(config, model) reads it"
        )
    if not isinstance(modules, Mapping):
        return config, modules
    settings = {"name": config} if isinstance(config, str) else dict(config)
    return {"include": tuple(modules), "exclude_head": False, **settings}, _holding(modules)


def _are_modules(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(m, nn.Module) for m in value.values())


def _holding(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A model that has these layers at these dotted names, and nothing else."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root
