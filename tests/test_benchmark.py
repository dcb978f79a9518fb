"""scripts/bench: it runs, it checks before it times, and its counts count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmark"))
    import clock
    import problems
    import steps  # noqa: F401 (found by its name)

    yield clock, problems
    for name in ("clock", "masked_steps", "problem", "problems", "rivals", "steps"):
        sys.modules.pop(name, None)


def test_every_problem_is_timed_shown_and_saved(tmp_path):
    command = [
        "scripts/bench",
        "peers",
        "--set",
        "tiny",
        "--device",
        "cpu",
        "--no-compile",
        "--repeats",
        "2",
        "--cached",
    ]
    done = subprocess.run(
        [*command, "--out", tmp_path],
        cwd=ROOT,
        env={**os.environ, "TRITPRUNE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "peers_cpu_fp32.jsonl").read_text().splitlines()]
    assert len({row["problem"] for row in rows}) == 15
    assert {"tritprune", "neural_compressor", "foreach", "kthvalue", "topk", "sort", "asp"} <= {
        row["contender"] for row in rows
    }
    for row in rows:
        assert row["floor_ms"] > 0
        assert row["times"]["p10"] <= row["times"]["median"] <= row["times"]["p90"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["problem"] in done.stdout
        if row["contender"] != "tritprune again":
            assert row["counts"]["ops"] > 0
        if row["contender"] == "tritprune":
            assert row["counts"]["launches"] == 0 < row["counts"]["launches_on_a_gpu"]
    assert "not measured" not in done.stdout
    assert (tmp_path / "peers_cpu_fp32.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(benchmark, monkeypatch):
    _, problems = benchmark
    wrong = problems.Problems([(8, 16)], torch.device("cpu"), peers=False)
    monkeypatch.setattr(problems.kernels, "n_in_m_masks", lambda scores, n, m: [score > 2 for score in scores])
    (problem,) = wrong.all(["2:4 masks"])
    with pytest.raises(AssertionError, match="layer 0 differs"):
        problem.check()


def test_counts_see_operations_reads_and_memory(benchmark):
    clock, _ = benchmark
    source = torch.ones(1000)
    counts = clock.count(lambda: (source + 1).sum().item())
    assert (counts.ops, counts.host_reads) == (3, 1)
    assert counts.allocated == 4000 + 4
    in_place = clock.count(lambda: source.add_(1))
    assert (in_place.ops, in_place.allocated) == (1, 0)


def test_a_list_of_numbers_is_a_host_read(benchmark):
    clock, _ = benchmark
    assert clock.count(lambda: torch.ones(3).tolist()).host_reads == 1


def test_the_launches_of_a_gpu_step_are_counted_without_one(benchmark):
    clock, _ = benchmark
    made = sys.modules["steps"].Steps([(16, 8), (8, 24)], torch.device("cpu"), peers=False)
    for problem in made.all():
        problem.check()
        run = problem.contenders["tritprune"]
        assert clock.count(run).launches == 0
        with clock.forced_backend("triton"):
            few = clock.count(run, stub=True).launches
        assert 2 <= few <= 30, problem.name
    assert {problem.name for problem in made.all()} == {"plain step", "mask update"}


def test_a_step_that_leaves_too_much_is_not_timed(benchmark, monkeypatch):
    made = sys.modules["steps"].Steps([(16, 8), (8, 24)], torch.device("cpu"), peers=False)
    (problem,) = made.all(["mask update"])
    monkeypatch.setattr(sys.modules["steps"], "SPARSITY", 0.9)
    with pytest.raises(AssertionError, match=r"steps: 256 zeros, 288 are asked for"):
        problem.check()
