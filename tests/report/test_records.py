"""Reading what a run left behind, in whatever state it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tritprune.errors import RunFolderError
from tritprune.report.charts import time_parts
from tritprune.report.records import Curves, Series, layer_series, read_run


def test_a_resumed_run_counts_each_step_once(run_folder: Callable[..., Path]) -> None:
    lines = [
        {"step": step, "stage": "prune", "loss/train": value}
        for step, value in [(1, 9.0), (2, 8.0), (2, 7.0), (3, 6.0)]
    ]
    _, curves = read_run(run_folder(None, lines))
    assert curves.series("loss/train") == Series((1, 2, 3), (9.0, 7.0, 6.0))


def test_control_is_kept_apart(run_folder: Callable[..., Path]) -> None:
    lines = [{"step": 1, "stage": "prune", "loss/train": 1.0}, {"step": 2, "stage": "control", "loss/train": 5.0}]
    _, curves = read_run(run_folder(None, lines))
    assert curves.series("loss/train") == Series((1,), (1.0,))
    assert curves.series("loss/train", control=True) == Series((2,), (5.0,))
    assert curves.stages() == [("prune", 1, 1), ("control", 2, 2)]


def test_nan_and_null_are_left_out_and_counted(run_folder: Callable[..., Path]) -> None:
    values = [1.0, float("nan"), float("inf"), None, True, "text", 2]
    lines = [{"step": step, "loss/train": value} for step, value in enumerate(values)]
    _, curves = read_run(run_folder(None, lines))
    assert curves.series("loss/train") == Series((0, 6), (1.0, 2))
    assert curves.non_finite("loss/train") == 5


def test_means_by_stage_add_up(run_folder: Callable[..., Path]) -> None:
    """A part that only some steps have counts as 0 in the others, so that parts sum to the whole."""
    times = [("prune", 10.0, 4.0), ("prune", 6.0, None), ("recover", 6.0, None)]
    lines = [
        {"step": step, "stage": stage, "time/step_ms": whole, **({} if mask is None else {"time/mask_ms": mask})}
        for step, (stage, whole, mask) in enumerate(times)
    ]
    _, curves = read_run(run_folder(None, [*lines, {"step": 9, "stage": "prune", "accuracy/eval": 0.5}]))
    assert time_parts(curves) == {
        "prune": {"mask": 2.0, "other": 6.0, "step": 8.0},
        "recover": {"other": 6.0, "step": 6.0},
    }


def test_damaged_lines_are_counted(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(None, [{"step": 1, "loss/train": 1.0}])
    with (folder / "curves.jsonl").open("a") as stream:
        stream.write('\n[1]\n{"loss/train": 1.0}\n{"step": 2, "loss/tr')
    _, curves = read_run(folder)
    assert len(curves.lines) == 1
    assert curves.unreadable == 3


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"'])
def test_a_damaged_result_is_a_failed_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    result, curves = read_run(tmp_path)
    assert result["status"] == "failed"
    assert "result.json" in result["error"]
    assert curves == Curves()


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"neither result\.json nor curves\.jsonl"):
        read_run(tmp_path)


def test_layers_in_the_order_of_the_model(run_folder: Callable[..., Path]) -> None:
    result: dict[str, Any] = {"layers": [{"name": "second"}, {"name": "first"}, {"name": "without a curve"}]}
    lines = [{"step": 1, "sparsity/first": 0.1, "sparsity/second": 0.2, "sparsity/global": 0.3, "sparsity/new": 0.4}]
    found, curves = read_run(run_folder(result, lines))
    assert [name for name, _ in layer_series(found, curves)] == ["second", "first", "new"]
