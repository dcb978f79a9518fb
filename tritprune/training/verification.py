"""Is a finished run still what it says? Every file, mask and model is held against what was recorded.

Nothing is trained or written. The models are loaded from the run folder, so a fresh process proves what a user gets.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tritprune.errors import CertificateError, CheckpointError, MissingPackageError, TritpruneError
from tritprune.export import FILES, check_artifact, load_model
from tritprune.pruners import MaskSet
from tritprune.slimming import certify, check_saved, count_parameters, saved_cases, saved_inputs, state_sha256
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of
from tritprune.training.after_slim import SLIM_MASKS, TUNED, TUNING
from tritprune.training.checkpoint import CERTIFICATE, EXPORTS, MASKS, PRUNED, PRUNING, RESULT, SLIM, SLIMMING


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        what: what was held against what.
        holds: whether it is as recorded.
        detail: the figures, or the first file, layer or module that differs.
    """

    what: str
    holds: bool
    detail: str


def verify_run(folder: Path, plugins: tuple[str, ...] = ()) -> list[Finding]:
    """Check files against hashes, masks against the pruned model, and the slim model against the certificate.

    Args:
        folder: a run folder.
        plugins: modules of your own that hold or register the model's class.

    Raises:
        CheckpointError: it is no run folder, or the run ended before it had a pruned model.
    """
    if not (folder / "run.json").is_file():
        raise CheckpointError(f"verify={folder}: no run is there; give the folder that holds report.html and pruned/")
    if not (folder / PRUNING).is_file():
        raise CheckpointError(f"verify={folder}: the run has no pruned model yet, so there is nothing to verify")
    return list(_Verification(folder, plugins).findings())


class _Verification:
    def __init__(self, folder: Path, plugins: tuple[str, ...]) -> None:
        self.folder, self.plugins = folder, plugins
        self.models: dict[str, nn.Module] = {}

    def findings(self) -> Iterator[Finding]:
        """Each check in turn; a check whose models cannot be loaded is not made, the finding before it says why."""
        pruning = self._read(PRUNING)
        slimmed = any((self.folder / name).exists() for name in (SLIMMING, SLIM, CERTIFICATE))
        if slimmed:
            yield self._held("files: SHA-256 as recorded", self._files)
        for name in (PRUNED, *([SLIM] if slimmed else [])):
            yield self._held(f"{name}/: hashes, and the model loads", lambda name=name: self._loads(name))
        if slimmed and self.models:
            yield self._held("weights and counts: as certified", self._states)
        if PRUNED in self.models:
            yield self._held("masks: as recorded, and pruned/ is zero there", lambda: self._masks(pruning))
        if not slimmed:
            result = self._read(RESULT) if (self.folder / RESULT).is_file() else {}
            rows = [row.get("model") for row in _mappings(result, "rows")]
            none = result.get("status") == "finished" and SLIM not in rows
            missing = "slim/ and its records are missing: they were removed, or the run did not get that far"
            yield Finding("slim model", none, "this run has none (slimmer=none)" if none else missing)
            return
        if SLIM in self.models:
            yield self._held("slim/: the outputs of the certificate", lambda: self._outputs(SLIM))
        if PRUNED in self.models:
            yield self._held("pruned/: the outputs of the certificate", lambda: self._outputs(PRUNED))
        if {PRUNED, SLIM} <= self.models.keys():
            yield self._held("slim/ against pruned/, module by module", self._modules)
        try:
            ended_with, exported = self._told(), self._exported()
        except CheckpointError as error:
            yield Finding(f"{RESULT} and {EXPORTS}: what the run made", False, str(error))
            return
        if TUNED in ended_with or any((self.folder / name).exists() for name in (SLIM_MASKS, TUNED, TUNING)):
            yield self._held(f"{TUNED}/: hashes, and the model loads", lambda: self._loads(TUNED))
            if TUNED in self.models:
                yield self._held(f"{TUNED}/: the certified slim model, trained further", self._trained_further)
        for kind, slim_file in FILES.items():
            for model in (SLIM, TUNED):
                name = slim_file.replace(SLIM, model)
                if (self.folder / name).exists() or name in exported or name in ended_with:
                    yield self._held(
                        f"{name}: SHA-256, and the outputs of {model}/",
                        lambda kind=kind, name=name, model=model: self._file(kind, name, model, exported.get(name)),
                    )

    def _held(self, what: str, check: Callable[[], str]) -> Finding:
        try:
            return Finding(what, True, check())
        except TritpruneError as error:
            return Finding(what, False, str(error))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.folder / name} is damaged: it holds no mapping")
        return content

    def _files(self) -> str:
        return self._unchanged(self._read(CERTIFICATE).get("files"), CERTIFICATE)

    def _unchanged(self, recorded: Any, record: str) -> str:
        """Files against the hashes that a record keeps."""
        if not isinstance(recorded, dict) or not recorded:
            raise CheckpointError(f"{record} records no hashes of files: the run is of an older version")
        for name, expected in recorded.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{name} is missing")
            _hashed(path, name, expected)
        return ", ".join(recorded)

    def _loads(self, name: str) -> str:
        self.models[name] = load_model(self.folder / name, plugins=self.plugins)
        return type(self.models[name]).__name__

    def _masks(self, pruning: dict[str, Any]) -> str:
        masks, model = MaskSet.load(self.folder / MASKS), self.models[PRUNED]
        if masks.digest() != pruning.get("digest"):
            raise CheckpointError(f"{MASKS} holds other masks than those that {PRUNING} recorded")
        zeros = _zeros(masks, model, PRUNED)
        return f"{zeros:,} weights in {len(masks)} layers are pruned and zero"

    def _trained_further(self) -> str:
        """From the certificate's slim model to the final one: hashes, the same shapes, zeros where masks prune."""
        record, tuned = self._read(TUNING), self.models[TUNED]
        certified = _at(self._read(CERTIFICATE), "models_sha256", "slim")
        if record.get("slim_sha256") != certified:
            raise CheckpointError(
                f"{TUNING} says that {TUNED}/ came from another slim model than {CERTIFICATE} certifies"
            )
        self._unchanged(record.get("files"), TUNING)
        if state_sha256(tuned) != record.get("tuned_sha256"):
            raise CheckpointError(f"{TUNED}/ has other weights than those that {TUNING} recorded")
        made, given = (self._read(f"{name}/manifest.json") for name in (TUNED, SLIM))
        if any(made[key] != given[key] for key in ("class", "builder", "widths")):
            raise CheckpointError(f"{TUNED}/manifest.json builds another model than {SLIM}/manifest.json")
        zeros = _zeros(MaskSet.load(self.folder / SLIM_MASKS), tuned, TUNED)
        return f"widths as in {SLIM}/, {count_parameters(tuned):,} parameters, {zeros:,} of them pruned and zero"

    def _outputs(self, name: str) -> str:
        cases = len(saved_inputs(self.folder))
        if not check_saved(self.models[name], self.folder):
            raise CertificateError(f"{name}/ does not give the outputs that {CERTIFICATE} certifies")
        return f"{cases} inputs, every output within the tolerance"

    def _told(self) -> set[str]:
        """The models and files that the result says the run ended with; empty if it has not ended."""
        result = self._read(RESULT) if (self.folder / RESULT).is_file() else {}
        rows = {str(row["model"]) for row in _mappings(result, "rows") if "model" in row}
        return rows | _by_path(result, "exports").keys()

    def _exported(self) -> dict[str, dict[str, Any]]:
        """What the run recorded of the files that it made of the slim model, by name; empty if it made none."""
        return _by_path(self._read(EXPORTS), "files") if (self.folder / EXPORTS).is_file() else {}

    def _file(self, kind: str, name: str, model: str, recorded: dict[str, Any] | None) -> str:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if recorded is None:
            raise CheckpointError(f"{EXPORTS} knows nothing of {name}")
        if not recorded.get("sha256"):
            raise CheckpointError(f"{EXPORTS} records no hash of {name}: the run is of an older version")
        _hashed(path, name, str(recorded["sha256"]))
        try:
            cases = saved_cases(self.folder)
            if model == TUNED:
                cases = [(inputs, self._outputs_now(TUNED, inputs)) for inputs, _ in cases]
            return f"{len(cases)} inputs, largest difference {check_artifact(kind, path, cases):.1e}"
        except MissingPackageError as error:
            return f"SHA-256 as recorded; not run here: {error}"

    def _outputs_now(self, name: str, inputs: ModelInputs) -> dict[str, Tensor]:
        if name not in self.models:
            raise CheckpointError(f"{name}/ does not load, so there is nothing to compare with")
        with evaluating(self.models[name]):
            return tensors_of(inputs.call(self.models[name]))

    def _states(self) -> str:
        certificate, said = self._read(CERTIFICATE), list[str]()
        for name, model in self.models.items():
            key, found = {PRUNED: "masked", SLIM: "slim"}[name], count_parameters(model)
            recorded = _at(certificate, "parameters", key)
            if found != recorded:
                raise CheckpointError(f"{name}/ has {found:,} parameters, {CERTIFICATE} says {recorded}")
            if state_sha256(model) != _at(certificate, "models_sha256", key):
                raise CheckpointError(f"{name}/ has other weights than those that {CERTIFICATE} certifies")
            said.append(f"{name} {found:,}")
        return f"parameters: {', '.join(said)}"

    def _modules(self) -> str:
        found = certify(self.models[PRUNED], self.models[SLIM], saved_inputs(self.folder))
        compared = sum(check.modules for check in found.checks)
        return f"{compared} module outputs within the tolerance, largest difference {found.largest_in_modules:.1e}"


def _hashed(path: Path, name: str, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(f"{name} was changed: its SHA-256 is {found[:16]}..., not {expected[:16]}...")


def _at(record: dict[str, Any], *keys: str) -> Any:
    """The value under nested keys; None where there is none."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mappings(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The mappings in a record's list; none where it has no such list."""
    value = record.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _by_path(record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {str(entry["path"]): entry for entry in _mappings(record, key) if "path" in entry}


def _zeros(masks: MaskSet, model: nn.Module, where: str) -> int:
    """How many weights the masks prune; each is held against the model.

    Raises:
        CheckpointError: a layer that the mask is not for, or a pruned weight that is not zero.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, layer in masks.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or tuple(weight.shape) != layer.weight_shape:
            raise CheckpointError(f"'{name}' of {where}/ is not the layer that its mask is for")
        alive = int((weight.detach()[~layer.element_mask()] != 0).sum())
        if alive:
            raise CheckpointError(f"'{name}' has {alive:,} weights in {where}/ where its mask prunes")
    return sum(layer.zeros() for layer in masks.values())
