"""A model that leaves the run: saved so that it loads again anywhere, and as ONNX or a torch.export program."""

from tritprune.export.artifacts import EXPORTERS, FILES, Artifact, check_artifact, export_onnx, export_program, require
from tritprune.export.builders import builder_of
from tritprune.export.even_widths import even_widths
from tritprune.export.loading import load_model, loads_with
from tritprune.export.saved_model import save, save_model

__all__ = [
    "EXPORTERS",
    "FILES",
    "Artifact",
    "builder_of",
    "check_artifact",
    "even_widths",
    "export_onnx",
    "export_program",
    "load_model",
    "loads_with",
    "require",
    "save",
    "save_model",
]
