"""The sentences are computed from the numbers: each claim is checked against numbers that would make it false."""

from pathlib import Path
from typing import Any

import pytest

from tritprune.report import words
from tritprune.report.page import page
from tritprune.report.records import Curves

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.count(22713216), "22.7M"),
        (words.count(999), "999"),
        (words.count(None), words.MISSING),
        (words.count(float("nan")), words.MISSING),
        (words.count(True), words.MISSING),
        (words.digits(22713216), "22,713,216"),
        (words.size_on_disk(90868376), "90.9 MB"),
        (words.size_on_disk(12), "12 B"),
        (words.percent(0.9), "90.0%"),
        (words.short_percent(0.9), "90%"),
        (words.short_percent(0.875), "87.5%"),
        (words.three(4.312), "4.31"),
        (words.three(43.12), "43.1"),
        (words.three(431.2), "431"),
        (words.signed(-4.04), f"{MINUS}4.0"),
        (words.signed(4.04), "+4.0"),
        (words.signed(-0.04), "0.0"),
        (words.duration(0.31), "0.3 s"),
        (words.duration(452.3), "7 min 32 s"),
        (words.duration(7384), "2 h 03 min"),
        (words.join(["a", "b", "c"]), "a, b and c"),
        (words.join(["a"]), "a"),
        (words.join([]), ""),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written == expected


def test_verdict(result: dict[str, Any]) -> None:
    assert words.verdict(result) == (
        f"4x1 at 90%: accuracy 0.697 against 0.737 dense ({MINUS}4.0 points). "
        "The slim model has 18.1M of 22.7M parameters and is 1.21x faster at batch 1 and 1.30x at batch 32. "
        "Random masks at the same budget reach 0.512."
    )


def test_training_after_slimming_is_told_with_its_three_accuracies(result: dict[str, Any]) -> None:
    tuned = {**result["rows"][2], "model": "tuned", "metrics": {"accuracy": 0.712, "loss": 1.01}}
    result["rows"].insert(3, tuned)
    result |= {"after_slim": 100, "artifacts": {**result["artifacts"], "tuned": "tuned"}}
    said = words.verdict(result)
    assert said.startswith(f"4x1 at 90%: accuracy 0.712 against 0.737 dense ({MINUS}2.5 points). ")
    assert "at batch 32. 100 steps after slimming took its accuracy from 0.697 to 0.712. Random" in said
    text = page(result, Curves(), Path("run"))
    for expected in ("slim, trained further", "slim/ as it was cut; tuned/ is slim/ after 100 more steps", "run/tuned"):
        assert expected in text


def timed(row: dict[str, Any], median: float, low: float, high: float) -> None:
    for batch in ("1", "32"):
        row["latency"][batch] = {"median_ms": median, "p10_ms": low, "p90_ms": high, "repeats": 50}


@pytest.mark.parametrize(
    ("slim", "expected"),
    [
        ((5.0, 4.9, 5.1), "is 2.00x faster at batch 1 and 2.00x at batch 32"),
        ((20.0, 19.0, 21.0), "is slower here (0.50x) at batch 1 and 0.50x at batch 32"),
        ((9.9, 9.0, 11.0), "is no faster here (1.01x, within the spread) at batch 1"),
        ((9.5, 9.4, 10.2), "is no faster here (1.05x, within the spread) at batch 1"),
    ],
)
def test_speed_is_claimed_only_beyond_the_spread(
    result: dict[str, Any], slim: tuple[float, float, float], expected: str
) -> None:
    timed(result["rows"][0], 10.0, 9.8, 10.3)
    timed(result["rows"][2], *slim)
    assert expected in words.verdict(result)


@pytest.mark.parametrize(
    ("slim", "said"),
    [
        ((5.0, 4.9, 5.1), "2.00x faster"),
        ((20.0, 19.0, 21.0), "slower here: 0.50x"),
        ((9.9, 9.0, 11.0), "no faster here: 1.01x"),
    ],
)
def test_the_page_has_a_verdict_for_each_batch_size(
    result: dict[str, Any], slim: tuple[float, float, float], said: str
) -> None:
    timed(result["rows"][0], 10.0, 9.8, 10.3)
    timed(result["rows"][2], *slim)
    assert words.pace(words.speed(result, "1")) == said
    text = page(result, Curves(), Path("run"))
    assert text.count(f'<small class="verdict">{said}</small>') == 2
    kind = said.partition(":")[0]
    assert (f"{kind}: " in text) == (kind in ("slower here", "no faster here"))


def test_exported_files_are_shown_with_their_difference(result: dict[str, Any]) -> None:
    result["exports"] = [
        {"kind": "onnx", "path": "slim.onnx", "bytes": 74e6, "max_abs_difference": 9.54e-7, "inputs": 4},
        {"kind": "torch_export", "path": "slim.pt2", "bytes": 74e6, "max_abs_difference": 0.0, "inputs": 4},
    ]
    text = page(result, Curves(), Path("run"))
    assert "onnx: slim.onnx (74.0 MB, differs by at most 9.5e-07 on 4 inputs)" in text
    assert "torch_export: slim.pt2 (74.0 MB, same outputs on 4 inputs)" in text
    assert words.agreement({}) == "not compared"


def test_what_even_widths_cost_is_said(result: dict[str, Any]) -> None:
    assert words.evened_out(result) == ""
    result["slim"] |= {"loads": "from_pretrained: yes", "uniform": {"widths": {"intermediate_size": 1485}}}
    result["slim"]["uniform"]["parameters_put_back"] = 4490190
    said = "evened out to intermediate_size 1485: 4,490,190 parameters put back"
    assert words.evened_out(result) == said
    assert f"from_pretrained: yes; {said}" in page(result, Curves(), Path("run"))


def test_no_verdict_without_times(result: dict[str, Any]) -> None:
    del result["rows"][0]["latency"]["1"]
    assert words.pace(words.speed(result, "1")) == ""


def test_no_gain_is_said(result: dict[str, Any]) -> None:
    result["rows"][2]["parameters"] = result["rows"][0]["parameters"]
    assert "The slim model is no smaller (22.7M parameters)" in words.verdict(result)
    del result["rows"][2]
    assert "neither smaller nor faster" in words.verdict(result)


def test_a_broken_certificate_is_said(result: dict[str, Any]) -> None:
    result["slim"]["certificate"]["holds"] = False
    assert "do not use it" in words.verdict(result)


def test_verdict_of_less(result: dict[str, Any]) -> None:
    assert words.verdict({}) == "Nothing was measured before the run ended."
    del result["rows"][1:]
    assert words.verdict(result) == "Dense accuracy 0.737; the run ended before a pruned model was measured."


def test_a_metric_by_another_name(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        row["metrics"] = {"loss": 1.0, "matthews_correlation": row["metrics"]["accuracy"]}
    assert "matthews correlation 0.697 against 0.737" in words.verdict(result)
    assert words.sampling_note(result) == ""


def test_pattern_labels(result: dict[str, Any]) -> None:
    def label(*layers: dict[str, str]) -> str:
        return words.pattern_label({"name": "run", "layers": list(layers)})

    assert label({"pattern": "4x1", "unit": "4x1"}) == "4x1"
    assert label({"pattern": "2:4", "unit": "1x1"}) == "2:4"
    assert label({"pattern": "block", "unit": "channelx1"}) == "channelx1"
    assert label({"pattern": "heads", "unit": "head"}, {"pattern": "4x1", "unit": "4x1"}) == "heads + 4x1"
    assert label() == "run"


def test_each_pattern_has_its_own_sparsity_in_the_headline(result: dict[str, Any]) -> None:
    result["layers"] = [
        {"pattern": "head", "unit": "head", "zeros": 3, "elements": 9},
        {"pattern": "channelx1", "unit": "384x1", "zeros": 5, "elements": 10},
        {"pattern": "head", "unit": "head", "zeros": 0, "elements": 3},
    ]
    assert words.verdict(result).startswith("heads at 25% and channelx1 at 50%: accuracy 0.697 against")
    del result["layers"][1]
    assert words.verdict(result).startswith("heads at 90%: ")  # of one pattern, the share of the table


@pytest.mark.parametrize(
    ("ratio", "low", "high", "kind"),
    [(1.52, 1.31, 1.7, "faster"), (1.52, 0.9, 1.7, "as fast"), (0.8, 0.7, 0.9, "slower"), (0.98, 0.7, 1.0, "as fast")],
)
def test_rounds_decide_on_the_speed_where_there_are_ratios(
    result: dict[str, Any], ratio: float, low: float, high: float, kind: str
) -> None:
    """However wide the spread: the machine was as busy for both models of a round."""
    timed(result["rows"][0], 100.0, 10.0, 1000.0)
    timed(result["rows"][2], 100.0, 10.0, 1000.0)
    for batch in ("1", "32"):
        result["rows"][2]["latency"][batch] |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    assert words.speed(result, "32") == (ratio, kind)
    result["rows"][2]["latency"]["32"]["repeats"] = 5
    assert words.speed(result, "32") == (ratio, "as fast")


def test_sampling_note(result: dict[str, Any]) -> None:
    assert "about 2.2 points" in words.sampling_note(result)
    result["data"]["n_eval"] = None
    assert words.sampling_note(result) == ""


def test_what_the_training_loss_is_made_of_is_said(result: dict[str, Any]) -> None:
    """A distilled run's loss falls where distillation begins, a calibrated one's goes nowhere: both need a word."""
    curves = Curves(tuple({"step": n, "stage": "prune", "loss/train": 1.0} for n in range(3)))
    text = page(result, curves, Path("run"))
    assert "distillation from the dense model has weight 0.7 in the training loss" in text
    result["config"]["pruner"]["name"] = "retrain_free"
    assert "While it calibrates, no weight moves" in page(result, curves, Path("run"))
    result["config"] = {"training": {"distillation": {"weight": 0.0}}}
    text = page(result, curves, Path("run"))
    assert "distillation from" not in text
    assert "While it calibrates" not in text
