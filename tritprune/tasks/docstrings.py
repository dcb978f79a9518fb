"""The docstrings of the installed standard library, read from its sources.

Nothing is imported or executed: each ``.py`` file is parsed with :mod:`ast`. So reading cannot have side effects, sees
private and nested definitions, works under ``python -OO``, and depends on the Python version, not on the platform.
"""

import ast
import functools
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tritprune.errors import DataError

EXCLUDED = frozenset(
    (
        "antigravity",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
        "venv",
    )
)
"""Jokes, generated tables, vendored or optional parts: not on every machine, or not documentation."""

MIN_WORDS = 6
"""Shorter docstrings ("Return the value.") fit any module."""

_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def normalise(text: str) -> str:
    """The key under which texts count as the same: lower case, numbers as 0, only letters and numbers kept."""
    return re.sub(r"[^a-z0]+", " ", re.sub(r"\d+", "0", text.lower())).strip()


@functools.cache
def module_docstrings() -> dict[str, tuple[str, ...]]:
    """The distinct docstrings of each public top-level module or package of the standard library, sorted.

    A package's files and a module's pure-Python twin (``_pydecimal`` for ``decimal``) count to it. White space is
    collapsed. A docstring has at least six words; of those that are the same after :func:`normalise` one stays; one
    that occurs in several modules says nothing about any and is dropped from all.

    Raises:
        DataError: this Python has no library sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, str]] = {}
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and name not in EXCLUDED:
            texts = sorted({" ".join(text.split()) for path in _sources(root, name) for text in _docstrings(path)})
            found[name] = {normalise(text): text for text in texts if len(normalise(text).split()) >= MIN_WORDS}
    modules_with = Counter(key for texts in found.values() for key in texts)
    distinct = {
        name: tuple(sorted(text for key, text in texts.items() if modules_with[key] == 1))
        for name, texts in found.items()
    }
    if not any(distinct.values()):
        raise DataError(f"no docstrings under {root}: this Python was installed without the library's .py files")
    return distinct


def _sources(root: Path, name: str) -> Iterator[Path]:
    """The files of a module, sorted; tests left out."""
    for path in (root / f"{name}.py", root / f"_py{name}.py"):
        if path.is_file():
            yield path
    for path in sorted((root / name).rglob("*.py")):
        if not {"test", "tests"} & set(path.relative_to(root).parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(path.read_bytes(), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            text = ast.get_docstring(node)
            if text:
                yield text
