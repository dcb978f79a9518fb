"""A model that leaves the run: saved so that it loads again anywhere, and as ONNX or a torch.export program."""

from tritprune.export.library_config import even_widths
from tritprune.export.saved_model import builder_of, load_model, loads_with, save, save_model

__all__ = ["builder_of", "even_widths", "load_model", "loads_with", "save", "save_model"]
