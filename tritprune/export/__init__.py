"""A model that leaves the run: saved so that it loads again anywhere, and as ONNX or a torch.export program."""

from tritprune.export.artifacts import EXPORTERS, FILES, Artifact, export_onnx, export_program, require
from tritprune.export.library_config import even_widths
from tritprune.export.saved_model import builder_of, load_model, loads_with, save, save_model

__all__ = [
    "EXPORTERS",
    "FILES",
    "Artifact",
    "builder_of",
    "even_widths",
    "export_onnx",
    "export_program",
    "load_model",
    "loads_with",
    "require",
    "save",
    "save_model",
]
