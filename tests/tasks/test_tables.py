import csv
import json
from pathlib import Path

import pytest

from tritprune.errors import DataError
from tritprune.tasks.tables import READERS, read_rows, read_split

ROWS = [{"sentence": 'good, "fine"', "label": 1}, {"sentence": "bäd", "label": 0}]


def write(folder: Path, name: str, ending: str, rows=ROWS) -> Path:
    path = folder / f"{name}.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    elif ending == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", sorted(READERS))
def test_every_ending_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    write(tmp_path, "train", ending)
    rows = read_split(tmp_path, ("train",))
    assert [{**row, "label": int(row["label"])} for row in rows] == ROWS


def test_shapes_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_rows(path) == ROWS
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read_rows(path) == ROWS
    path.write_text(json.dumps(ROWS[0]))
    assert read_rows(path) == ROWS[:1]


def test_shards_in_order_and_the_second_name(tmp_path: Path) -> None:
    write(tmp_path, "dev-00001-of-00002", "parquet", ROWS[1:])
    write(tmp_path, "dev-00000-of-00002", "parquet", ROWS[:1])
    assert read_split(tmp_path, ("validation", "dev")) == ROWS


def test_no_file(tmp_path: Path) -> None:
    write(tmp_path, "test", "json")
    with pytest.raises(DataError, match=r"has no file validation or dev that ends in json, .*; it has: test\.json"):
        read_split(tmp_path, ("validation", "dev"))


def test_two_files_compete(tmp_path: Path) -> None:
    write(tmp_path, "train", "json")
    write(tmp_path, "train", "csv")
    with pytest.raises(DataError, match=r"which one is the split 'train'\?.*train\.json, .*train\.csv"):
        read_split(tmp_path, ("train",))


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("json", b'[{"sentence": "cut'),
        ("json", b'"text"'),
        ("json", b"[]"),
        ("jsonl", b'{"sentence": "a"}\n{"sent'),
        ("jsonl", b"1\n2\n"),
        ("csv", b"sentence,label\n"),
        ("csv", b'sentence,label\n"open,1\n'),
        ("tsv", b"\xff\xfe\x00"),
        ("parquet", b"PAR1 cut"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"train.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.{ending} (cannot be read as {ending}|has no rows)"):
        read_split(tmp_path, ("train",))
