"""scripts/gpu where there is no GPU: it says so, knows its sections, and runs dry in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SECTIONS = ("equivalence", "capture", "offsets", "races", "smoke", "bench")


def gpu(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITPRUNE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["scripts/gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_nothing_is_run_and_the_exit_status_says_so(tmp_path):
    done = gpu("--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "scripts/gpu --dry" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_section_is_refused_with_the_known_ones():
    done = gpu("--dry", "racing")
    assert done.returncode == 2
    assert f"unknown section racing; sections: {', '.join(SECTIONS)}" in done.stderr


def test_sections_run_dry_and_their_results_say_that_no_gpu_saw_them(tmp_path):
    done = gpu("--dry", "capture", "offsets", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY, no kernel is proved" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dry"]
    assert results["passed"]
    assert results["device"] == "Triton's interpreter on the CPU"
    assert results["versions"]["torch"] == torch.__version__
    assert list(results["sections"]) == ["capture", "offsets"]
    assert all(check["passed"] for section in results["sections"].values() for check in section["checks"])


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu_checks"))
    import check
    import sections

    yield check, sections
    for path in (ROOT / "scripts" / "gpu_checks").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(("kind", "passed"), [("", True), ("<skipped/>", False), ("<failure/>", False)])
def test_a_gpu_test_that_was_skipped_or_failed_fails_the_section(checks, kind, passed, tmp_path, monkeypatch):
    check, sections = checks
    count = 2 * len(sections.cases.all_cases())

    def reported(*arguments, seconds):
        report = next(a.partition("=")[2] for a in arguments if a.startswith("--junitxml="))
        cases = "<testcase name='a'/>" * (count - 1) + f"<testcase name='last'>{kind}</testcase>"
        Path(report).write_text(f"<r>{cases}</r>", encoding="utf-8")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(sections, "_run", reported)
    place = check.Place(torch.device("cuda"), dry=False, out=tmp_path)
    assert all(result.passed for result in sections.equivalence(place)) == passed


def test_what_a_prune_step_gives_is_held_against_the_reference(checks):
    import capture

    step = capture.PruneStep([(16, 8)], torch.device("cpu"))
    step.fill(0)
    masks, _ = step.run()
    assert step.agrees(masks, 0)
    assert not step.agrees(masks, 1)
    masks[0][0, 0] ^= True
    assert not step.agrees(masks, 0)
