"""The same result in a terminal of 100 columns, and one table over a sweep."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tritprune.report import console_epilogue, console_table, sweep_table

MINUS = "\N{MINUS SIGN}"


def printed(*renderables: RenderableType, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return text


def cells(text: str, name: str) -> list[str]:
    """The first line of a row, by columns."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [part for part in line.split("  ") if part.strip()]


def test_table(result: dict[str, Any]) -> None:
    text = printed(console_table(result))
    assert [part.strip() for part in cells(text, "slim")] == [
        "slim",
        "0.697",
        "82.4% of 6.0M",
        "18.1M",
        "72.6 MB",
        "7.79",
        "114",
    ]
    assert [part.strip() for part in cells(text, "zeros stored")] == [
        "zeros stored",
        f"{MINUS}4.0 points",
        "42.1% of 22.7M",
        "9.17 to 10.0",
        "144 to 153",
    ]
    assert "4x1 at 90%: accuracy 0.697 against 0.737 dense" in text
    assert "9,555,148 of 10,616,832" in " ".join(text.split())
    assert "Sparsity = zeros / weights, of the prunable layers and of all parameters" in " ".join(text.split())


def test_table_of_less(result: dict[str, Any]) -> None:
    assert "Nothing was measured" in printed(console_table({}))
    for row in result["rows"]:
        row["latency"] = row["sparsity"] = row["bytes"] = None
    text = printed(console_table(result))
    assert "0.697" in text
    result["rows"] = [{}, {"model": "[bold]x[/bold]", "metrics": {"accuracy": float("nan")}}]
    assert "[bold]x[/bold]" in printed(console_table(result)), "rich markup in a name was obeyed"


def test_epilogue(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = printed(console_epilogue(result, tmp_path / "outputs" / "run")).splitlines()
    assert [line.split() for line in lines] == [
        ["report", "outputs/run/report.html"],
        ["curves", "wandb", "sync", "outputs/run/wandb/offline-run-20261121_091403-3f9c1d2a"],
        ["model", "import", "tritprune;", "model", "=", 'tritprune.load("outputs/run/slim")'],
        ["again", "python", "-m", "tritprune", "experiment=bert_4x1"],
    ]
    result["artifacts"]["wandb"] = "https://wandb.ai/x/runs/1"
    assert "curves  https://wandb.ai/x/runs/1" in printed(console_epilogue(result, "run"))


def test_epilogue_of_a_run_that_stopped(tmp_path: Path) -> None:
    stopped = {"status": "interrupted", "error": "SIGTERM at step 301", "command": "python -m tritprune experiment=x"}
    text = printed(console_epilogue(stopped, tmp_path))
    assert "interrupted  SIGTERM at step 301" in text
    assert "python -m tritprune experiment=x resume=auto" in text
    stopped["command"] += " resume=auto"
    assert printed(console_epilogue(stopped, tmp_path)).count("resume=auto") == 1
    assert "unknown" in printed(console_epilogue({}, tmp_path))


@pytest.fixture
def jobs(result: dict[str, Any]) -> list[dict[str, Any]]:
    def job(criterion: str, sparsity: str, **values: Any) -> dict[str, Any]:
        words = ["experiment=digits_4x1", f"criterion={criterion}", f"pruner.target_sparsity={sparsity}"]
        return {**result, "overrides": words, **values}

    return [
        job("magnitude", "0.5"),
        job("snip_momentum", "0.9", rows=result["rows"][:2]),
        job("snip", "1.2", rows=[], status="failed", error="target_sparsity must be in [0, 1),\ngot 1.2 | no"),
    ]


def test_sweep(jobs: list[dict[str, Any]]) -> None:
    table, markdown, text = sweep_table(jobs)
    shown = printed(table)
    assert shown.startswith("experiment=digits_4x1")
    assert [part.strip() for part in cells(shown, "1 ")] == [
        "1",
        "snip_momentum",
        "0.9",
        "0.697",
        "0.737",
        "90.00%",
        "22.7M",
        "9.45",
        "147",
        "finished",
    ]
    assert "3 jobs, 1 of them not finished" in shown
    assert "job 2: target_sparsity must be in [0, 1), got 1.2 | no" in shown

    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| job | criterion | target_sparsity | accuracy | dense | sparsity | parameters |")
    assert len(rows) == 5
    assert rows[4].endswith("| failed: target_sparsity must be in [0, 1), got 1.2 \\| no |")

    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["status"] for row in read] == ["finished", "finished", "failed"]
    assert [row["model"] for row in read] == ["slim", "pruned", ""]
    assert read[0]["overrides"] == "experiment=digits_4x1 criterion=magnitude pruner.target_sparsity=0.5"
    assert (read[0]["zeros"], read[0]["prunable"], read[0]["accuracy"]) == ("9555148", "10616832", "0.697")
    assert read[0]["latency_32_median_ms"] == "113.9"
    assert read[2]["error"] == "target_sparsity must be in [0, 1),\ngot 1.2 | no"


def test_sweep_of_nothing_and_of_one(jobs: list[dict[str, Any]]) -> None:
    assert "0 jobs" in printed(sweep_table([])[0])
    assert "criterion" in sweep_table(jobs[:1])[1]
    assert "unknown" in printed(sweep_table([{}, {"overrides": None, "status": None}])[0])


def test_keys_with_the_same_end_keep_their_names() -> None:
    jobs = [{"overrides": [f"a.x={value}", f"b.x={value}"], "status": "finished"} for value in (1, 2)]
    assert "| job | a.x | b.x |" in sweep_table(jobs)[1]
