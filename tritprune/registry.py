"""name -> class, and a plain config mapping -> object, with errors that show the choices.

One generic :class:`Registry` serves criteria, patterns, schedules, pruners, tasks, trackers and models. A class's own
signature is the schema of its config: there is no second list of keys that could drift from the code.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from tritprune.errors import ConfigError, UnknownNameError

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The tail of an error message: the nearest known name, if one is near, and all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}known: {', '.join(sorted(known))}"


class Registry(Generic[T]):
    """Classes (or functions) of one kind by name.

    Args:
        kind: what is registered, as error messages call it ("criterion").

    Example:
        >>> criteria = Registry[object]("criterion")
        >>> @criteria.register("magnitude")
        ... class Magnitude: ...
        >>> criteria.build({"name": "magnitude"})  # doctest: +ELLIPSIS
        <...Magnitude object at ...>
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that files a class under ``name``.

        Raises:
            ConfigError: the name is taken by something else.
        """

        def add(entry: C) -> C:
            taken = self._entries.get(name)
            if taken is not None and _origin(taken) != _origin(entry):
                raise ConfigError(f"{self.kind} '{name}' is registered already, by {_origin(taken)}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> Callable[..., T]:
        """The class that is filed under ``name``.

        Raises:
            UnknownNameError: no such name; the message lists the known ones.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(f"unknown {self.kind} '{name}'; {did_you_mean(str(name), self.names())}") from None

    def build(self, config: str | Mapping[str, Any], **extra: Any) -> T:
        """Make the object that ``config`` names: ``"snip"`` or ``{"name": "snip", **arguments}``.

        Args:
            config: a name, or a mapping with ``name`` and keyword arguments of that class.
            extra: arguments that the caller supplies beside the config.

        Raises:
            UnknownNameError: unknown name.
            ConfigError: unknown or missing argument; the message lists the accepted ones.
        """
        arguments: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        name = arguments.pop("name", None)
        if name is None:
            raise ConfigError(f"{self.kind} has no name; {did_you_mean('', self.names())}")
        entry = self.get(name)
        check_arguments(f"{self.kind} '{name}'", entry, {**arguments, **extra})
        return entry(**arguments, **extra)

    def names(self) -> tuple[str, ...]:
        """The known names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def check_arguments(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Hold ``arguments`` against a signature.

    Raises:
        ConfigError: a key that the signature lacks, or a required one that is missing.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in arguments:
        if key not in accepted:
            raise ConfigError(f"{what} has no key '{key}'; {did_you_mean(key, accepted)}")
    required = [p.name for p in parameters if p.default is p.empty and p.name in accepted]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ConfigError(f"{what} needs {', '.join(missing)}")


def _origin(entry: Callable[..., Any]) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"


models: Registry[Any] = Registry("model")
"""Model constructors by name: what a saved model's manifest names, so that it can be built again on loading."""
