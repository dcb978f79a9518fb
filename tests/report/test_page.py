"""``report.html``: what is on it, what it must not contain, and that nothing missing or hostile breaks it."""

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tritprune.errors import RunFolderError
from tritprune.report import console_epilogue, console_table, heatmap_png, sweep_table, write_report
from tritprune.report.markup import Html, tag
from tritprune.report.origin import as_yaml
from tritprune.report.page import page
from tritprune.report.records import Curves, read_run

EMPTY = {"meta", "br"}


class Reader(HTMLParser):
    """Reads a page as strictly as a page of ours deserves: every element is closed, in order; ids and links kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"a script in <{tag} {name}>"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.links.append((tag, value or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, full_run: tuple[dict[str, Any], list[dict[str, Any]]]) -> str:
    folder = tmp_path_factory.mktemp("run")
    (folder / "result.json").write_text(json.dumps(full_run[0]))
    (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in full_run[1]))
    path = write_report(folder)
    assert path == folder / "report.html"
    assert sorted(file.name for file in folder.iterdir()) == ["curves.jsonl", "report.html", "result.json"]
    return path.read_text()


def test_everything_is_on_the_page(full: str) -> None:
    text = Reader(full).text
    for expected in (
        "4x1 at 90%: accuracy 0.697 against 0.737 dense",
        "9,555,148 of 10,616,832 prunable weights",
        "90.0% of 10.6M prunable",
        "88.7% of 10.8M linear and conv",
        "42.1% of 22.7M parameters",
        "82.4% of 6.0M prunable",
        "7.56 to 8.26",
        "72.6 MB",
        "standard error of one accuracy is about 2.2 points",
        "achieved 90.0%",
        "bert.encoder.layer.5.output.dense",
        "36 pruned layers",
        "matched by exclude: bert.pooler.*",
        "Certified: the slim model gives the masked model's outputs",
        "3.8e-06, tolerance 1.0e-04",
        "9,216 \N{RIGHTWARDS ARROW} 4,179 in 6 places",
        "the output is added to 13 residual branches",
        "python -m tritprune experiment=bert_4x1",
        "tritprune.load(",
        "target_sparsity: 0.9",
        "torch 2.13.0",
        "9d1c6b0f5e2a47c3b8f0d4e6a1b2c3d4e5f60718293a4b5c6d7e8f9012345678",
        "3f9c1d2a7b8e4f50a1c2d3e4f5a6b7c8d9e0f1a2 , with uncommitted changes",
        "AMD EPYC 9B14",
        "Scores and masks take 14.3 of",
    ):
        assert expected in text, expected
    assert "failed" not in text


def test_the_page_is_self_contained(full: str) -> None:
    reader = Reader(full)
    assert set(reader.tags).isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for name, target in reader.links:
        assert target.startswith(("#", "data:image/png;base64,")) or name == "a", (name, target)
    assert "http" not in full.replace("https://", "http://").split("</style>")[1].replace("data:image", "")
    assert re.findall(r"@import|@font-face|url\((?!#)", full) == []
    assert len(full) < 300_000


def test_ids_are_unique_and_lead_somewhere(full: str) -> None:
    reader = Reader(full)
    assert len(reader.ids) == len(set(reader.ids))
    targets = re.findall(r"url\(#([^)]+)\)", full) + [target[1:] for _, target in reader.links if target[0] == "#"]
    assert targets
    assert set(targets) <= set(reader.ids)


def test_charts_follow_the_page(full: str) -> None:
    """Each colour that a chart uses is one that the style sheet gives, in light, dark and print."""
    used = set(re.findall(r"var\(--(\w+)\)", full))
    style = full.split("<style>")[1].split("</style>")[0]
    assert "#00fe" not in full, "a stand-in colour was left"
    assert {"blue", "green", "orange", "ink", "muted"} <= used
    for name in used:
        assert f"--{name}:" in style
    assert len(re.findall(r"<svg ", full)) == 6
    assert "<text" in full
    assert "DejaVu" not in full
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_same_numbers_same_bytes(
    run_folder: Callable[..., Path], result: dict[str, Any], curves: list[dict[str, Any]]
) -> None:
    folder = run_folder(result, curves)
    first = write_report(folder).read_bytes()
    image = heatmap_png(folder)
    assert image is not None
    drawn = image.read_bytes()
    program = f"from tritprune.report import *; write_report({str(folder)!r}); heatmap_png({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (folder / "report.html").read_bytes() == first
    assert image.read_bytes() == drawn


HOSTILE = "<script>alert('x')</script> & \"$\\alpha$\" #00fe00 \u6f22\U0001f600 </style>"


def damage(record: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy with every string that a user could have written replaced."""
    if isinstance(record, dict):
        return {key: damage(value, replace) for key, value in record.items()}
    if isinstance(record, list):
        return [damage(value, replace) for value in record]
    return replace(record)


def test_nothing_that_a_user_writes_becomes_markup(
    run_folder: Callable[..., Path], result: dict[str, Any], curves: list[dict[str, Any]]
) -> None:
    bad = damage(result, lambda value: HOSTILE if isinstance(value, str) else value)
    bad |= {"name": HOSTILE, "error": HOSTILE, "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    bad["artifacts"] = {HOSTILE: "javascript:alert(1)", "slim": HOSTILE}
    for row, model in zip(bad["rows"], ("dense", "pruned", "slim", HOSTILE), strict=True):
        row["model"] = model
        row["metrics"] = {HOSTILE: 0.5}
    lines = [{**line, f"sparsity/{HOSTILE}": 0.5, "stage": HOSTILE} for line in curves[::50]]
    text = write_report(run_folder(bad, lines)).read_text()
    reader = Reader(text)
    assert "script" not in reader.tags
    assert text.count("</style>") == 1
    assert not any("javascript" in target for _, target in reader.links)
    assert "<script>alert('x')</script>" in reader.text


@pytest.mark.parametrize("status", ["failed", "interrupted", None])
def test_a_run_that_did_not_finish_says_so_first(
    run_folder: Callable[..., Path], result: dict[str, Any], curves: list[dict[str, Any]], status: str | None
) -> None:
    result.update(status=status, error="score of layer 3 is NaN", rows=result["rows"][:1], slim=None)
    lines = [{**line, "loss/train": float("nan") if line["step"] > 10 else 1.0} for line in curves[:40]]
    text = Reader(write_report(run_folder(result, lines)).read_text()).text
    words = {"failed": "This run failed.", "interrupted": "was interrupted", None: "has no end on record"}[status]
    assert text.index(words) < text.index("score of layer 3 is NaN") < text.index("Results")
    assert "the run ended before a pruned model was measured" in text
    assert "python -m tritprune experiment=bert_4x1 resume=auto" in text
    assert "Not drawn because they are NaN or infinite: 30 values of loss/train" in text


def test_a_page_of_nothing(run_folder: Callable[..., Path]) -> None:
    folder = run_folder({"status": "failed"}, [])
    assert "Nothing was measured" in Reader(write_report(folder).read_text()).text
    assert heatmap_png(folder) is None


def test_curves_alone(run_folder: Callable[..., Path], curves: list[dict[str, Any]]) -> None:
    folder = run_folder(None, curves[240:260])
    text = Reader(write_report(folder).read_text()).text
    assert "has no end on record" in text
    assert "Sparsity of each layer" in text
    assert heatmap_png(folder) == folder / "heatmap.png"


@pytest.mark.parametrize(
    "key", ["rows", "layers", "excluded", "slim", "config", "versions", "data", "machine", "artifacts"]
)
@pytest.mark.parametrize("junk", ["absent", None, [], {}, "text", 3, [None, 1, "x", {}]])
def test_each_part_may_be_missing_or_of_another_kind(result: dict[str, Any], key: str, junk: Any) -> None:
    if junk == "absent":
        del result[key]
    else:
        result[key] = junk
    Reader(page(result, Curves(), Path("run")))


@given(seed=st.integers(0, 2**32))
def test_any_part_may_be_anything(fresh_result: Callable[[], dict[str, Any]], seed: int) -> None:
    """Values all over the result replaced by junk of other kinds: the page is still a page, and so is the table."""
    chance = random.Random(seed)
    junk = (None, "", "text", -1, 0, 1e300, float("nan"), float("inf"), True, [], {}, [None], {"a": None})

    def spoil(record: Any) -> Any:
        if chance.random() < 0.04:
            return chance.choice(junk)
        if isinstance(record, dict):
            return {key: spoil(value) for key, value in record.items()}
        return [spoil(value) for value in record] if isinstance(record, list) else record

    spoilt = {key: spoil(value) for key, value in fresh_result().items()}
    Reader(page(spoilt, Curves(), Path("run")))
    console = Console(width=100, file=io.StringIO())
    console.print(console_table(spoilt), console_epilogue(spoilt, "run"), sweep_table([spoilt, fresh_result()])[0])


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-300, 1e99, 1e308, -1e308, float("nan")])
@pytest.mark.parametrize("steps", [(0,), (5, 5), (3, 900)])
def test_charts_of_extreme_values(run_folder: Callable[..., Path], value: float, steps: tuple[int, ...]) -> None:
    keys = (
        "loss/train",
        "loss/eval",
        "accuracy/eval",
        "sparsity/global",
        "sparsity/target",
        "sparsity/layer",
        "masks/flip_rate",
    )
    times = ("time/step_ms", "time/forward_ms", "time/score_ms")
    lines = [
        {"step": step, "stage": "prune", **dict.fromkeys((*keys, *times), value * (1 + k))}
        for k, step in enumerate(steps)
    ]
    folder = run_folder(None, lines)
    Reader(write_report(folder).read_text())
    heatmap_png(folder)


def test_a_folder_that_cannot_be_written(
    run_folder: Callable[..., Path], result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(result)
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    result["name"] = "another"
    (folder / "result.json").write_text(json.dumps(result))

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(RunFolderError, match=r"report\.html cannot be written: No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "result.json"]


def test_many_layers(run_folder: Callable[..., Path], result: dict[str, Any]) -> None:
    result["layers"] = [
        {**result["layers"][index % 36], "name": f"model.layers.{index}.proj", "group": str(index % 2)}
        for index in range(300)
    ]
    lines = [
        {"step": 20 * k, **{f"sparsity/{layer['name']}": 0.09 * k for layer in result["layers"]}} for k in range(10)
    ]
    text = write_report(run_folder(result, lines)).read_text()
    assert "300 pruned layers" in Reader(text).text
    assert len(text) < 400_000


def test_curves_of_a_long_run_stay_small(run_folder: Callable[..., Path]) -> None:
    lines = [
        {"step": step, "stage": "prune", "loss/train": 1 / (1 + step), "sparsity/global": step / 30000}
        for step in range(30000)
    ]
    folder = run_folder({"status": "finished"}, lines)
    assert len(write_report(folder).read_text()) < 150_000
    _, curves = read_run(folder)
    assert len(curves.series("loss/train")) == 30000


def test_report_imports_no_matplotlib() -> None:
    program = "import sys, tritprune.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_markup_escapes_by_construction() -> None:
    assert tag("p", "<b>", Html("<i>x</i>"), None, class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<i>x</i></p>'
    assert tag("details", "x", open=True, hidden=None) == "<details open>x</details>"


def test_config_as_yaml() -> None:
    config = {
        "a": {"b": [1, {"c": None, "d": "x: y"}], "e": []},
        "f": True,
        "g": 3e-4,
        "h": "",
        "i": {},
        "j": [[1], "no"],
    }
    assert as_yaml(config) == [
        "a:",
        "  b:",
        "    - 1",
        "    - c: null",
        "      d: 'x: y'",
        "  e: []",
        "f: true",
        "g: 0.0003",
        "h: ''",
        "i: {}",
        "j:",
        "  - - 1",
        "  - no",
    ]


def test_a_block_that_went_as_a_whole_is_said(result: dict[str, Any], run_folder: Callable[..., Path]) -> None:
    result["slim"]["cuts"][-1]["after"] = 0
    text = write_report(run_folder(result)).read_text(encoding="utf-8")
    assert text.count("12 → 0, block removed") == 1
    assert text.count("block removed") == 1
