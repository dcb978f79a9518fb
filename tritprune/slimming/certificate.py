"""Proof that a slim model gives the masked model's outputs, module by module and end to end, on fixed inputs.

The proof can be saved and held against a model that was loaded in another process.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import CertificateError, CheckpointError, RunFolderError
from tritprune.slimming.comparison import TOLERANCES, Difference, difference, largest_difference, sha256
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of
from tritprune.slimming.multihead import SlimMultiheadAttention

RECORD, TENSORS = "certificate.json", "certificate.safetensors"
RULE = "max |masked - slim| <= tolerance * max(1, max |masked|), per tensor"


@dataclass(frozen=True)
class Check:
    """One input and what came of it.

    Args:
        inputs: the input's shapes by name.
        outputs: the end-to-end difference of each output by name.
        modules: number of module outputs that were compared; those of another shape in the slim model are not.
        largest_in_modules: the largest absolute difference among these.
    """

    inputs: dict[str, list[int]]
    outputs: dict[str, Difference]
    modules: int
    largest_in_modules: float


@dataclass(frozen=True)
class Certificate:
    """That the slim model's outputs are those of the masked model; it exists only where that holds.

    Args:
        tolerance: relative tolerance of the outputs' dtype; see ``RULE``.
        max_abs_difference: the largest absolute difference of any output on any input.
        inputs_sha256: hash of all inputs.
        outputs_sha256: hash of the slim model's outputs on all inputs.
        parameters: number of parameters of the masked and of the slim model.
        models_sha256: hash of the state of the masked and of the slim model; see :func:`state_sha256`.
        checks: one entry for each input.
        given: the inputs.
        outputs: the slim model's outputs on each of them.
    """

    tolerance: float
    max_abs_difference: float
    inputs_sha256: str
    outputs_sha256: str
    parameters: tuple[int, int]
    models_sha256: tuple[str, str]
    checks: list[Check]
    given: list[ModelInputs] = field(repr=False)
    outputs: list[dict[str, Tensor]] = field(repr=False)
    holds: bool = True

    def summary(self) -> dict[str, Any]:
        """The certificate in plain values for reports: ``holds``, ``max_abs_difference``, ``tolerance``, ..."""
        return {
            "holds": self.holds,
            "max_abs_difference": self.max_abs_difference,
            "tolerance": self.tolerance,
            "rule": RULE,
            "inputs": len(self.checks),
            "modules_compared": sum(check.modules for check in self.checks),
            "parameters": {"masked": self.parameters[0], "slim": self.parameters[1]},
            "models_sha256": {"masked": self.models_sha256[0], "slim": self.models_sha256[1]},
            "inputs_sha256": self.inputs_sha256,
            "outputs_sha256": self.outputs_sha256,
        }

    @property
    def largest_in_modules(self) -> float:
        """The largest absolute difference of any module's output on any input."""
        return max((check.largest_in_modules for check in self.checks), default=0.0)

    def save(self, folder: str | Path, *, files: Sequence[str] = ()) -> None:
        """Write ``certificate.json`` and ``certificate.safetensors`` (inputs and slim outputs) into ``folder``.

        Args:
            folder: made if it is missing.
            files: names of files in ``folder`` whose SHA-256 the record keeps: what the certificate is about.

        Raises:
            RunFolderError: the folder cannot be written, or a file cannot be read.
        """
        from safetensors import SafetensorError  # here: slimming itself needs no more than torch
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {f"{i}/in/{name}": t for i, given in enumerate(self.given) for name, t in given.tensors().items()}
        tensors |= {f"{i}/out/{name}": t for i, made in enumerate(self.outputs) for name, t in made.items()}
        calls = [
            {"form": given.form, "values": {n: None if isinstance(v, Tensor) else v for n, v in given.values.items()}}
            for given in self.given
        ]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / (TENSORS + ".tmp")
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
            record = {
                **self.summary(),
                "checks": [asdict(check) for check in self.checks],
                "calls": calls,
                "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
                "tensors_sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(),
            }
            temporary.replace(folder / TENSORS)
            written = folder / (RECORD + ".tmp")
            written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.copymode(written, folder / TENSORS)  # safetensors makes files that only their owner reads
            written.replace(folder / RECORD)
        except (OSError, SafetensorError) as error:
            raise RunFolderError(f"the certificate cannot be written to {folder}: {error}") from error


def certify(model: nn.Module, slim: nn.Module, checks: Sequence[ModelInputs]) -> Certificate:
    """Run both models on every input and compare every output and every module that has the same output shape.

    Args:
        model: the masked model.
        slim: the model that was cut; module names as in ``model``.
        checks: the inputs.

    Raises:
        CertificateError: something differs; the message names the first module that does.
    """
    done: list[Check] = []
    outputs: list[dict[str, Tensor]] = []
    for inputs in checks:
        check, made = _check(model, slim, inputs)
        done.append(check)
        outputs.append(made)
    dtypes = {tensor.dtype for made in outputs for tensor in made.values() if tensor.is_floating_point()}
    return Certificate(
        tolerance=max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0),
        max_abs_difference=max(d.largest for check in done for d in check.outputs.values()),
        inputs_sha256=sha256({f"{i}/{n}": t for i, given in enumerate(checks) for n, t in given.tensors().items()}),
        outputs_sha256=sha256({f"{i}/{n}": t for i, made in enumerate(outputs) for n, t in made.items()}),
        parameters=(count_parameters(model), count_parameters(slim)),
        models_sha256=(state_sha256(model), state_sha256(slim)),
        checks=done,
        given=list(checks),
        outputs=outputs,
    )


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's parameters and persistent buffers."""
    return sha256({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def check_saved(model: nn.Module, folder: str | Path) -> bool:
    """Whether ``model`` gives the outputs of the certificate that was saved in ``folder``, within its tolerance.

    Raises:
        CheckpointError: the certificate is missing or damaged.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for inputs, expected in saved_cases(folder):
        placed = inputs.with_tensors({name: tensor.to(device) for name, tensor in inputs.tensors().items()})
        try:
            with evaluating(model):
                made = tensors_of(placed.call(model))
        except (RuntimeError, TypeError, ValueError):  # another model: it does not even take these inputs
            return False
        if not largest_difference(expected, {name: tensor.cpu() for name, tensor in made.items()}).within:
            return False
    return True


def saved_inputs(folder: str | Path) -> list[ModelInputs]:
    """The inputs of the certificate that was saved in ``folder``.

    Raises:
        CheckpointError: the certificate is missing or damaged.
    """
    return [inputs for inputs, _ in saved_cases(folder)]


def saved_cases(folder: str | Path) -> list[tuple[ModelInputs, dict[str, Tensor]]]:
    """The inputs of the certificate that was saved in ``folder``, and the slim model's outputs on each of them.

    Raises:
        CheckpointError: the certificate is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        if found != record["tensors_sha256"]:
            raise CheckpointError(f"{folder / TENSORS} is damaged: its SHA-256 is {found}, not what {RECORD} says")
        tensors = load_file(folder / TENSORS)
        cases: list[tuple[ModelInputs, dict[str, Tensor]]] = []
        for i, call in enumerate(record["calls"]):
            parts: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}}
            for side, chosen in parts.items():
                start = f"{i}/{side}/"
                chosen.update({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
            given = ModelInputs(call["form"], call["values"]).with_tensors(parts["in"])
            cases.append((given, {name: parts["out"][name] for name in record["checks"][i]["outputs"]}))
        for key, sides in (
            ("inputs_sha256", [given.tensors() for given, _ in cases]),
            ("outputs_sha256", [made for _, made in cases]),
        ):
            if sha256({f"{i}/{name}": t for i, side in enumerate(sides) for name, t in side.items()}) != record[key]:
                raise CheckpointError(f"the certificate in {folder} is damaged: its tensors are not those of {key}")
    except FileNotFoundError as error:
        raise CheckpointError(f"no certificate in {folder}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the certificate in {folder} is damaged: {type(error).__name__} {error}") from error
    return cases


def _check(model: nn.Module, slim: nn.Module, inputs: ModelInputs) -> tuple[Check, dict[str, Tensor]]:
    shapes = {name: list(tensor.shape) for name, tensor in inputs.tensors().items()}
    on = "on inputs " + ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    expected, modules = _run(model, inputs)
    undefined = [name for name, tensor in expected.items() if tensor.is_floating_point() and bool(tensor.isnan().any())]
    if undefined:
        raise CertificateError(f"the masked model itself gives NaN in {', '.join(undefined)} {on}: nothing to certify")
    made, slim_modules, failure = _attempt(slim, inputs)
    if failure is not None:
        where = next((key for key in modules if key not in slim_modules), "")
        raise CertificateError(f"the slim model does not run {on}: first in {_named(where)}: {failure}") from failure
    largest, compared = 0.0, 0
    for key, reference in modules.items():
        other = slim_modules.get(key)
        if other is None or other.shape != reference.shape:
            continue
        compared += 1
        found = difference(reference, other)
        if not found.within:
            raise CertificateError(_message(f"first in {_named(key)}", found, on))
        largest = max(largest, found.largest)
    overall = largest_difference(expected, made)
    if not overall.within:
        raise CertificateError(_message(f"in output '{overall.where}', in no module that can be compared", overall, on))
    ends = {name: difference(tensor, made[name], name) for name, tensor in expected.items()}
    return Check(shapes, ends, compared, largest), made


def _message(where: str, found: Difference, on: str) -> str:
    return (
        f"the slim model's outputs are not the masked model's: they differ {where}, "
        f"by {found.largest:.2e} where {found.allowed:.2e} is allowed, {on}"
    )


def _named(key: str) -> str:
    name = key.partition("#")[0]
    return f"module '{name}'" if name else "the model as a whole"


def _attempt(
    model: nn.Module, inputs: ModelInputs
) -> tuple[dict[str, Tensor], dict[str, Tensor], RuntimeError | ValueError | TypeError | IndexError | None]:
    modules: dict[str, Tensor] = {}
    try:
        return (*_run(model, inputs, modules), None)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return {}, modules, error


def _run(
    model: nn.Module, inputs: ModelInputs, modules: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's outputs, and every module's outputs as ``name#call/path`` in the order in which they were made."""
    seen: dict[str, Tensor] = {} if modules is None else modules
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, SlimMultiheadAttention):
                output = output[:1]  # the probabilities are those of the heads that are left
            seen.update({f"{name}#{calls[name]}/{path}": tensor for path, tensor in tensors_of(output).items()})

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with evaluating(model):
            made = {name: tensor.detach().clone() for name, tensor in tensors_of(inputs.call(model)).items()}
    finally:
        for handle in handles:
            handle.remove()
    return made, seen
