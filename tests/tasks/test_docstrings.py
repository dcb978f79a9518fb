import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from tritprune.errors import DataError
from tritprune.tasks import docstrings
from tritprune.tasks.docstrings import EXCLUDED, MIN_WORDS, module_docstrings, normalise


def test_reads_what_the_library_documents() -> None:
    found = module_docstrings()
    assert " ".join(ast.get_docstring.__doc__.split()) in found["ast"]
    assert sum(len(texts) for texts in found.values()) > 3000
    assert not EXCLUDED & found.keys()
    assert not [name for name in found if name.startswith("_")]


def test_no_text_occurs_twice_and_none_is_short() -> None:
    keys = [normalise(text) for texts in module_docstrings().values() for text in texts]
    assert len(set(keys)) == len(keys)
    assert min(len(key.split()) for key in keys) >= MIN_WORDS


@pytest.mark.parametrize("text", ["The  2nd\nitem, please", "the 17nd ITEM please.", "THE 2nd item -- please"])
def test_normalise(text: str) -> None:
    assert normalise(text) == "the 0nd item please"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the standard library: real names, contents of the test's own."""
    names = frozenset({"decimal", "json", "csv", "_csv", "this"})
    monkeypatch.setattr(docstrings, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(tmp_path)}))
    monkeypatch.setattr(docstrings, "sys", SimpleNamespace(stdlib_module_names=names))
    return tmp_path


def read(library: Path, files: dict[str, str]) -> dict[str, tuple[str, ...]]:
    for name, content in files.items():
        path = library / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content, encoding="utf-8")
    return {name: texts for name, texts in module_docstrings.__wrapped__().items() if texts}


CSV = r'''
class A:
    """One two three four five class."""
    def _f(self):
        """One two  three
        four five method."""
        async def g():
            """One two three four five nested: \d."""
raise SystemExit("never executed")
'''


def test_collects_private_and_nested_definitions_twins_and_packages(library: Path) -> None:
    files = {
        "csv.py": CSV,
        "_csv.py": '"""One two three four five private module."""',
        "_pydecimal.py": '"""One two three four five twin."""',
        "json/tool.py": '"""One two three four five package."""',
        "json/tests/helper.py": '"""One two three four five tests."""',
        "this.py": '"""One two three four five excluded."""',
        "other.py": '"""One two three four five no library module."""',
    }
    assert read(library, files) == {
        "csv": (
            "One two three four five class.",
            "One two three four five method.",
            "One two three four five nested: \\d.",
        ),
        "decimal": ("One two three four five twin.",),
        "json": ("One two three four five package.",),
    }


def test_what_several_modules_say_is_dropped_from_all_and_what_one_repeats_stays_once(library: Path) -> None:
    shared = 'def f():\n    """Close the file and return 1."""\n'
    repeated = 'def {}():\n    """Read {} lines from the file."""\n'
    files = {
        "csv.py": shared + repeated.format("g", 10) + repeated.format("h", 20),
        "decimal.py": shared.replace("1", "2").replace("Close", "close"),
    }
    assert read(library, files) == {"csv": ("Read 20 lines from the file.",)}


def test_a_library_without_sources_is_an_error(library: Path) -> None:
    with pytest.raises(DataError, match=r"no docstrings under .*without the library's \.py files"):
        read(library, {})
