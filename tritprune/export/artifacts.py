"""A model as an ONNX file or a ``torch.export`` program, held against the model itself before it gets its name.

Sizes that the model takes at other values (batch, length of a sequence) stay variable: those that differ between the
inputs that the certificate makes from the example inputs. The outputs on all of these inputs are compared.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """

    kind: str
    path: str
    bytes: int
    max_abs_difference: float
    tolerance: float
    inputs: int


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

    def read(temporary: Path) -> Callable[..., Sequence[Tensor]]:
        runtime = import_module("onnxruntime")
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(*tensors: Tensor) -> list[Tensor]:
            fed = dict(zip(call.input_names, (tensor.numpy() for tensor in tensors), strict=True))
            known = {entry.name for entry in session.get_inputs()}  # an input that nothing reads is not in the file
            return [torch.from_numpy(made) for made in session.run(None, {n: a for n, a in fed.items() if n in known})]

        return run

    return _export("onnx", call, Path(path), write, read)


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
        lambda temporary: torch.export.load(temporary).module(),
    )


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
        single = given.form == "tensor"
        names = list(given.tensors())
        self.input_names = ["input"] if single else [f"input_{n}" if n.isdigit() else n for n in names]
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
    read: Callable[[Path], Callable[..., Sequence[Tensor]]],
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
            try:
                largest, tolerance = _compare(kind, call, read(temporary))
            except (TritpruneError, OSError):
                raise
            except Exception as error:  # whatever the runtime lacks
                raise TraceError(
                    f"the {kind} file of {type(call.model).__name__} does not run: {type(error).__name__}: "
                    f"{(str(error).splitlines() or ['no message'])[0]}"
                ) from error
        size = temporary.stat().st_size
        temporary.replace(path)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return Artifact(kind, str(path), size, largest, tolerance, len(call.forms))


def _compare(kind: str, call: _Call, run: Callable[..., Sequence[Tensor]]) -> tuple[float, float]:
    """The largest difference over all inputs, and the tolerance.

    Raises:
        CertificateError: an output differs by more.
    """
    largest, dtypes = 0.0, set[torch.dtype]()
    for form in call.forms:
        expected = call.outputs(form)
        dtypes |= {tensor.dtype for tensor in expected.values()}
        with torch.no_grad():
            made: Mapping[str, Tensor] = dict(zip(expected, run(*form.tensors().values()), strict=True))
        found = largest_difference(expected, made)
        if not found.within:
            on = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in form.tensors().items())
            raise CertificateError(
                f"the {kind} file's outputs are not the model's: '{found.where}' differs by {found.largest:.2e} "
                f"where {found.allowed:.2e} is allowed, on inputs {on}; nothing was written"
            )
        largest = max(largest, found.largest)
    return largest, max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


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
