"""Which implementation of an operation runs.

``auto`` takes the Triton kernels for tensors on a CUDA or HIP device; on the CPU the loops compiled by numba where that
is installed, else the reference. A forced backend either runs or raises :class:`BackendError`: no silent fallback.
"""

import functools
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from tritprune.errors import BackendError, ConfigError
from tritprune.registry import did_you_mean

BACKENDS = ("auto", "torch", "numba", "triton")

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)
_backend = "auto"


def get_backend() -> str:
    """The backend in force: ``auto``, ``torch``, ``numba`` or ``triton``."""
    return _backend


def set_backend(name: str) -> None:
    """Choose the backend for every operation from now on.

    Args:
        name: ``auto`` (Triton on CUDA and HIP devices, numba on the CPU where it is installed, else torch), ``torch``,
            ``numba`` or ``triton``.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"unknown kernel backend '{name}'; {did_you_mean(name, BACKENDS)}")
    _backend = name


@contextmanager
def use_backend(name: str) -> Generator[None]:
    """As :func:`set_backend` within a ``with`` block; the backend before it comes back after it.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


class Op(Generic[P, T]):
    """An operation with a reference in torch, and its twins in numba and Triton of the same name and signature.

    Args:
        reference: the specification; its name finds the twins in ``tritprune.kernels.compiled`` and ``.triton``.
        check: takes the same arguments and raises ValueError where their shapes do not fit.
        traced: what stands for the operation in a graph of ``torch.compile`` (``library.py``); None: the graph breaks.
    """

    def __init__(
        self, reference: Callable[P, T], check: Callable[P, None], traced: Callable[P, T] | None = None
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.check = check
        self.traced = traced
        functools.update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the operation on the backend in force; nothing of it is recorded for autograd."""
        if self.traced is not None and torch.compiler.is_compiling():
            return self.traced(*args, **kwargs)
        self.check(*args, **kwargs)
        device = _device_of(self.name, (*args, *kwargs.values()))
        backend = _choose(self.name, device)
        _log.debug("%s runs on backend %s for device %s", self.name, backend, device)
        run = self.implementation(backend, device)
        with torch.no_grad():
            return run(*args, **kwargs)

    def implementation(self, backend: str, device: torch.device | str = "cpu") -> Callable[P, T]:
        """The reference or one of its twins; ``device`` is only named in the error.

        Args:
            backend: ``torch``, ``numba`` or ``triton``.
            device: where the tensors are.

        Raises:
            BackendError: triton is not installed.
        """
        if backend == "numba":
            return cast("Callable[P, T]", getattr(import_module("tritprune.kernels.compiled"), self.name))
        return self.reference if backend == "torch" else self.launcher(device)

    def launcher(self, device: torch.device | str = "cuda") -> Callable[P, T]:
        """The Triton twin of the reference; ``device`` is only named in the error.

        Raises:
            BackendError: triton is not installed.
        """
        return cast("Callable[P, T]", getattr(_triton(self.name, torch.device(device)), self.name))

    def __repr__(self) -> str:
        return f"Op({self.name})"


def _choose(op: str, device: torch.device) -> str:
    """``torch``, ``numba`` or ``triton`` for tensors on ``device``."""
    if _backend == "torch":
        return "torch"
    if _backend == "auto":
        if device.type == "cpu":
            return "numba" if _has_numba() else "torch"
        return "triton" if device.type == "cuda" and not _triton(op, device).INTERPRETED else "torch"
    if _backend == "numba":
        _require_numba(op, device)
        return "numba"
    interpreted = bool(_triton(op, device).INTERPRETED)
    if device.type == ("cpu" if interpreted else "cuda"):
        return "triton"
    where = "the Triton interpreter (TRITON_INTERPRET=1) runs" if interpreted else "Triton kernels run"
    raise BackendError(
        f"{op}: backend 'triton' cannot run on device '{device}': {where} on {'CPU' if interpreted else 'CUDA or HIP'} "
        f"tensors only; what would work: backend 'torch' or 'auto', or "
        + (
            "CPU tensors"
            if interpreted
            else "tensors on a CUDA or HIP device, or TRITON_INTERPRET=1 before Python starts"
        )
    )


@functools.cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def _require_numba(op: str, device: torch.device) -> None:
    """Refuse what numba cannot do."""
    if device.type != "cpu":
        raise BackendError(
            f"{op}: backend 'numba' cannot run on device '{device}': its loops are compiled for the CPU; "
            "what would work: backend 'triton' or 'auto' there, or CPU tensors"
        )
    if not _has_numba():
        raise BackendError(
            f"{op}: backend 'numba' cannot run on device '{device}': the package numba is not installed; "
            "what would work: pip install 'tritprune[cpu]', or backend 'torch'"
        )


def _triton(op: str, device: torch.device) -> Any:
    """The module of launchers, imported on first need only."""
    try:
        return import_module("tritprune.kernels.triton")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise BackendError(
            f"{op}: backend 'triton' cannot run on device '{device}': the package triton is not installed; "
            "what would work: pip install triton, or backend 'torch'"
        ) from None


def _device_of(op: str, arguments: tuple[object, ...]) -> torch.device:
    """The one device of all tensors among the arguments; the CPU if there is none.

    Raises:
        ValueError: tensors on several devices.
    """
    devices: set[torch.device] = set()
    for argument in arguments:
        entries = cast("list[object]", argument) if isinstance(argument, list | tuple) else [argument]
        devices.update(entry.device for entry in entries if isinstance(entry, Tensor))
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else torch.device("cpu")
