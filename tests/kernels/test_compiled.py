"""The numba loops against the reference, on every case, with one thread and with two."""

import math

import pytest
import torch

from tritprune.kernels import agreement, cases, compiled
from tritprune.kernels.compiled import thresholds, work

OPS = sorted({case.op for case in cases.all_cases()})


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(work, "PIECE", 64)  # several pieces even of small layers


@pytest.mark.parametrize("poison", [0x00, 0xFF])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("threads")
def test_compiled_loops_agree_with_the_reference(op, poison, monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(poison)
        return tensor

    expected = {case.name: agreement.expected_results(case) for case in cases.cases_of(op)}
    monkeypatch.setattr(torch, "empty", poisoned)
    for case in cases.cases_of(op):
        agreement.assert_agrees(case, case.run(getattr(compiled, op)), expected[case.name])


@pytest.mark.parametrize("bracket", [(5.0, 6.0), (-math.inf, math.inf)], ids=["missed", "too wide"])
def test_a_sample_that_misleads_costs_more_passes_only(bracket, monkeypatch):
    monkeypatch.setattr(thresholds, "_ROOM", 16)
    monkeypatch.setattr(thresholds, "_bracket", lambda layers, share: bracket)
    for case in cases.cases_of("kth_score"):
        agreement.assert_agrees(case, case.run(compiled.kth_score), agreement.expected_results(case))


def test_a_forked_process_starts_threads_of_its_own():
    work._pools[99] = work.ThreadPoolExecutor(1)
    work._forget_threads()
    assert not work._pools
