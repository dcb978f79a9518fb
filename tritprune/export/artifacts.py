"""A model as an ONNX file or a ``torch.export`` program, held against the model itself before it gets its name.

Sizes that the model takes at other values (batch, length of a sequence) stay variable: those that differ between the
inputs that the certificate makes from the example inputs. The outputs on all of these inputs are compared.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tritprune.errors import (
    CertificateError,
    ConfigError,
    MissingPackageError,
    RunFolderError,
    TraceError,
    TritpruneError,
)
from tritprune.export.saved_model import sha256_of
from tritprune.registry import did_you_mean
from tritprune.slimming.check_inputs import derive_inputs
from tritprune.slimming.comparison import TOLERANCES, largest_difference
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of

ONNX_LIMIT = 2 * 1024**3  # bytes: one file of protocol buffers
OPSET = 18
FILES = {"onnx": "slim.onnx", "torch_export": "slim.pt2"}
"""What a run writes, by the word in ``slimmer.save_as``."""


@dataclass(frozen=True)
class Artifact:
    """A file that gives the model's outputs.

    Args:
        kind: "onnx" or "torch_export".
        path: the file.
        bytes: its size.
        max_abs_difference: the largest absolute difference of any output on any input.
        tolerance: what is allowed, relative to max(1, max |output|).
        inputs: number of inputs that were compared.
        sha256: SHA-256 of the file, in hexadecimal digits.
    """

    kind: str
    path: str
    bytes: int
    max_abs_difference: float
    tolerance: float
    inputs: int
    sha256: str


def export_onnx(model: nn.Module, inputs: Any, path: str | os.PathLike[str], *, opset: int = OPSET) -> Artifact:
    """Write ``model`` as one ONNX file and compare it in onnxruntime.

    Args:
        model: left as it is.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; names become the file's inputs.
        path: the file; replaced if it is there.
        opset: version of ONNX's operator set.

    Raises:
        MissingPackageError: onnx, onnxscript or onnxruntime is missing.
        ConfigError: more weights than one file holds, or a dtype that NumPy does not know.
        TraceError: the model cannot be exported.
        CertificateError: the file's outputs differ; nothing is written then.
        RunFolderError: the file cannot be written.
    """
    require("onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise ConfigError(f"the model has {size / 1e9:.1f} GB of weights, one ONNX file holds 2; use export_program")
    if any(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values()):
        raise ConfigError("the model is in bfloat16, which onnxruntime's inputs and outputs do not know; use .float()")
    call = _Call(model, inputs)

    def write(program: Any, temporary: Path) -> None:
        torch.onnx.export(
            program, (), str(temporary), input_names=call.input_names, output_names=call.output_names,
            opset_version=opset, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip

    return _export("onnx", call, Path(path), write)


def export_program(model: nn.Module, inputs: Any, path: str | os.PathLike[str]) -> Artifact:
    """Write ``model`` as a ``torch.export`` program, load it afresh and compare.

    ``torch.export.load(path).module()(*tensors)`` runs it, with neither tritprune nor the model's code.

    Args:
        model: left as it is.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        path: the file; replaced if it is there.

    Raises:
        TraceError: the model cannot be exported.
        CertificateError: the program's outputs differ; nothing is written then.
        RunFolderError: the file cannot be written.
    """
    return _export(
        "torch_export",
        _Call(model, inputs),
        Path(path),
        lambda program, temporary: torch.export.save(program, temporary),
    )


def _read_onnx(path: Path) -> Callable[[ModelInputs], Sequence[Tensor]]:
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {entry.name for entry in session.get_inputs()}  # an input that nothing reads is not in the file

    def run(inputs: ModelInputs) -> list[Tensor]:
        fed = zip(_names(inputs), (tensor.numpy() for tensor in inputs.tensors().values()), strict=True)
        return [torch.from_numpy(made) for made in session.run(None, {n: a for n, a in fed if n in known})]

    return run


def _read_program(path: Path) -> Callable[[ModelInputs], Sequence[Tensor]]:
    program = torch.export.load(path).module()
    return lambda inputs: program(*inputs.tensors().values())


READERS: dict[str, Callable[[Path], Callable[[ModelInputs], Sequence[Tensor]]]] = {
    "onnx": _read_onnx,
    "torch_export": _read_program,
}
"""How a file of each kind is run."""


def check_artifact(
    kind: str, path: str | os.PathLike[str], cases: Iterable[tuple[ModelInputs, Mapping[str, Tensor]]]
) -> float:
    """Run a file on inputs whose outputs are known.

    Args:
        kind: "onnx" or "torch_export".
        path: the file.
        cases: inputs, and the outputs that the file should give.

    Returns:
        The largest absolute difference of any output.

    Raises:
        ConfigError, MissingPackageError: as :func:`require`.
        TraceError: the file does not run.
        CertificateError: an output differs by more than the tolerance of its dtype.
    """
    require(kind)
    path = Path(path)
    largest = 0.0
    with quiet(), _running(kind, path.name):
        run = READERS[kind](path)
        for inputs, expected in cases:
            largest = max(largest, _compare(f"{path.name}'s outputs are not the saved model's", run, inputs, expected))
    return largest


@contextmanager
def _running(kind: str, what: str) -> Iterator[None]:
    """Name the file where the runtime fails.

    Raises:
        TraceError: whatever the runtime lacks.
    """
    try:
        yield
    except (TritpruneError, OSError):
        raise
    except Exception as error:  # runtimes raise errors of any kind
        raise TraceError(
            f"the {kind} file of {what} does not run: {type(error).__name__}: "
            f"{(str(error).splitlines() or ['no message'])[0]}"
        ) from error


EXPORTERS: dict[str, Callable[..., Artifact]] = {"onnx": export_onnx, "torch_export": export_program}


def require(kind: str) -> None:
    """Refuse a kind of artifact that cannot be made here, before time is spent.

    Raises:
        ConfigError: an unknown kind.
        MissingPackageError: a package for it is missing.
    """
    if kind not in EXPORTERS:
        raise ConfigError(f"slimmer.save_as: unknown kind of file '{kind}'; {did_you_mean(kind, list(EXPORTERS))}")
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"an ONNX file needs {package} ({error}); pip install 'tritprune[onnx]'"
            ) from error


class _Call:
    """A copy of the model that takes and returns tensors by position, and inputs of several shapes for it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = copy.deepcopy(model).cpu().eval()
        config = getattr(self.model, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]
        given = ModelInputs.of(inputs)
        given = given.with_tensors({name: tensor.cpu() for name, tensor in given.tensors().items()})
        with quiet():
            self.forms = derive_inputs(self.model, given)
            outputs = self.outputs(given)
        # an example with sizes of 1 would fix them
        self.example = max(self.forms, key=lambda form: min(min(t.shape, default=1) for t in form.tensors().values()))
        self.input_names = _names(given)
        self.output_names = list(outputs)

    def outputs(self, form: ModelInputs) -> dict[str, Tensor]:
        """The model's own outputs."""
        with evaluating(self.model):
            return {name: tensor.contiguous() for name, tensor in tensors_of(form.call(self.model)).items()}

    def program(self) -> Any:
        """The model through ``torch.export``, with the sizes that differ between the forms left variable."""
        tensors = self.example.tensors()
        shapes = {name: [form.tensors()[name].shape for form in self.forms] for name in tensors}
        variable = tuple(
            {dim: Dim.DYNAMIC for dim in range(len(sizes[0])) if len({size[dim] for size in sizes}) > 1}
            for sizes in shapes.values()
        )
        with torch.no_grad():
            return torch.export.export(
                _Flat(self.model, self.example), tuple(tensors.values()), dynamic_shapes=(variable,), strict=False
            )


def _names(inputs: ModelInputs) -> list[str]:
    """The inputs' names in an ONNX file."""
    if inputs.form == "tensor":
        return ["input"]
    return [f"input_{name}" if name.isdigit() else name for name in inputs.tensors()]


class _Flat(nn.Module):
    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs.tensors(), tensors, strict=True))
        return tuple(tensors_of(self.inputs.with_tensors(given).call(self.model)).values())


def _export(
    kind: str,
    call: _Call,
    path: Path,
    write: Callable[[Any, Path], None],
) -> Artifact:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet():
            try:
                program = call.program()
                write(program, temporary)
            except OSError:
                raise
            except Exception as error:  # whatever the exporter meets in a model of any kind
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise TraceError(
                    f"{type(call.model).__name__} cannot be exported as {kind}: {type(error).__name__}: "
                    f"{lines[0] if lines else 'no message'}"
                ) from error
            with _running(kind, type(call.model).__name__):
                run = READERS[kind](temporary)
                cases = [(form, call.outputs(form)) for form in call.forms]
                about = f"the {kind} file's outputs are not the model's"
                largest = max(_compare(about, run, form, expected, "; nothing was written") for form, expected in cases)
        digest = sha256_of(temporary)
        size = temporary.stat().st_size
        temporary.replace(path)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    dtypes = {tensor.dtype for _, expected in cases for tensor in expected.values()}
    tolerance = max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    return Artifact(kind, str(path), size, largest, tolerance, len(call.forms), digest)


def _compare(
    about: str,
    run: Callable[[ModelInputs], Sequence[Tensor]],
    inputs: ModelInputs,
    expected: Mapping[str, Tensor],
    after: str = "",
) -> float:
    """The largest difference of an output.

    Raises:
        CertificateError: it is more than the tolerance.
    """
    with torch.no_grad():
        made: Mapping[str, Tensor] = dict(zip(expected, run(inputs), strict=True))
    found = largest_difference(expected, made)
    if not found.within:
        on = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())
        raise CertificateError(
            f"{about}: '{found.where}' differs by {found.largest:.2e} where {found.allowed:.2e} is allowed, "
            f"on inputs {on}{after}"
        )
    return found.largest


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' talk about their own insides away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
