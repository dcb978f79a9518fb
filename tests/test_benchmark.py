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

    yield clock, problems
    for name in ("clock", "problems", "rivals"):
        sys.modules.pop(name, None)


def test_every_problem_is_timed_shown_and_saved(tmp_path):
    command = ["scripts/bench", "peers", "--set", "small", "--device", "cpu", "--no-compile", "--repeats", "2"]
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
    assert len({row["problem"] for row in rows}) == 8
    assert {"tritprune", "neural_compressor", "foreach", "kthvalue", "topk", "sort", "asp"} <= {
        row["contender"] for row in rows
    }
    for row in rows:
        assert row["floor_ms"] > 0
        assert row["times"]["p10"] <= row["times"]["median"] <= row["times"]["p90"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["problem"] in done.stdout
    assert (tmp_path / "peers_cpu_fp32.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(benchmark, monkeypatch):
    _, problems = benchmark
    wrong = problems.Problems([(8, 16)], torch.device("cpu"), peers=False)
    monkeypatch.setattr(problems.kernels, "n_in_m_masks", lambda scores, n, m: [score > 2 for score in scores])
    (problem,) = wrong.all(["2:4"])
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
