"""Rows from local data files: JSON, JSON lines, CSV, TSV, Parquet."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritprune.errors import DataError
from tritprune.tasks.base import require

Row = Mapping[str, Any]


def read_split(folder: Path, names: Sequence[str]) -> list[Row]:
    """The rows of one split.

    The file is ``<name>.<ending>`` for the first of ``names`` that has one, or shards ``<name>-*.<ending>``, read in
    the order of their names.

    Args:
        folder: where the files are.
        names: what the split may be called, first choice first ("validation", "dev").

    Raises:
        DataError: no such file, two that compete, or one that cannot be read; the message names the files.
    """
    for name in names:
        whole = [path for ending in READERS if (path := folder / f"{name}.{ending}").is_file()]
        shards = sorted(path for ending in READERS for path in folder.glob(f"{name}-*.{ending}"))
        if len(whole) > 1 or (whole and shards):
            raise DataError(f"which one is the split '{name}'? {', '.join(str(path) for path in whole + shards)}")
        if whole or shards:
            return [row for path in whole or shards for row in read_rows(path)]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(f"{folder} has no file {' or '.join(names)} that ends in {', '.join(READERS)}; it has: {there}")


def read_rows(path: Path) -> list[Row]:
    """The rows of one file as mappings from column to value.

    Raises:
        DataError: the file is not what its ending says, or has no rows.
    """
    try:
        rows = READERS[path.suffix.removeprefix(".")](path)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix.removeprefix('.')}: {error}") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{path} has no rows, or rows that are not objects with named columns")
    return rows


def _json(path: Path) -> list[Row]:
    """A list of objects, an object with such a list under ``data``, or one object a line."""
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return _json_lines(path)
    if isinstance(content, Mapping):
        return content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise ValueError(f"expected a list of objects, found {type(content).__name__}")
    return content


def _json_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _tsv(path: Path) -> list[Row]:
    """Tabs between columns and no quoting, as GLUE's own files are."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _parquet(path: Path) -> list[Row]:
    return require("pyarrow.parquet", "hf").read_table(path).to_pylist()


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    "json": _json,
    "jsonl": _json_lines,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}
"""File ending -> reader."""
