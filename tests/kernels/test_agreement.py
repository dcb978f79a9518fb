"""The comparisons that all kernel tests rest on must be able to fail, and the cases must be what they say."""

import math

import pytest
import torch

from tritprune.kernels import agreement, cases

CASES = cases.all_cases()


def test_cases_have_names_of_their_own():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert len(cases.cases_of("kth_score")) > 10


def test_a_case_makes_the_same_tensors_every_time():
    case = cases.cases_of("apply_masks_")[0]
    first, second = case.arguments(), case.arguments()
    assert first["tensors"][0].data_ptr() != second["tensors"][0].data_ptr()
    for one, other in zip(first["tensors"], second["tensors"], strict=True):
        assert torch.equal(one, other)


def test_layouts_are_what_they_say():
    tensor = torch.arange(12.0).view(3, 4)
    for layout, strides in (("transposed", (1, 3)), ("strided", (24, 3)), ("offset", (4, 1)), ("plain", (4, 1))):
        view = cases._laid_out(tensor, layout)
        assert torch.equal(view, tensor)
        assert view.stride() == strides
    assert cases._laid_out(tensor, "offset").data_ptr() % 16 == 4


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_one_wrong_bit_in_any_result_is_found(op):
    for case in cases.cases_of(op):
        expected = agreement.expected_results(case)
        agreement.assert_agrees(case, [result.clone() for result in expected], expected)
        for number, result in enumerate(expected):
            if result.numel() == 0:
                continue
            wrong = [entry.clone() for entry in expected]
            last = wrong[number][(-1,) * result.ndim]
            last.copy_(~last if last.dtype == torch.bool else 0 if bool(last != 0) else 1)
            with pytest.raises(AssertionError, match="1 of"):
                agreement.assert_agrees(case, wrong, expected)
        with pytest.raises(AssertionError, match="results, expected"):
            agreement.assert_agrees(case, [*expected, torch.zeros(1)], expected)


def test_same_bits():
    number = torch.tensor([1.0, math.nan, 0.0])
    agreement.assert_same_bits("here", number.clone(), number)
    for wrong in ([1.0 + 2**-23, math.nan, 0.0], [1.0, 2.0, 0.0], [1.0, math.nan, -0.0], [math.nan, math.nan, 0.0]):
        with pytest.raises(AssertionError, match="here: 1 of 3 differ"):
            agreement.assert_same_bits("here", torch.tensor(wrong), number)
    with pytest.raises(AssertionError, match=r"got torch.float64 \[3\], expected torch.float32 \[3\]"):
        agreement.assert_same_bits("here", number.double(), number)


def test_as_accurate():
    truth = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    expected = torch.tensor([1.0 + 1e-5, 2.0, math.inf])
    for fine in ([1.0 - 1.9e-5, 2.0, math.inf], [1.0, 2.0 + 1.9e-5, math.inf]):
        agreement.assert_as_accurate("here", torch.tensor(fine), expected, truth)
    for wrong in ([1.0 + 3e-5, 2.0, math.inf], [1.0, 2.0, 1e30], [1.0, math.nan, math.inf], [math.inf, 2.0, math.inf]):
        with pytest.raises(AssertionError, match="1 of 3 differ"):
            agreement.assert_as_accurate("here", torch.tensor(wrong), expected, truth)


def test_the_reference_is_as_accurate_as_fp32_allows():
    for case in cases.cases_of("accumulate_unit_scores_"):
        expected = agreement.expected_results(case)
        for result, truth in zip(expected, agreement.exact_unit_scores(case.arguments()), strict=False):
            finite = result.isfinite()
            arguments = case.arguments()
            rtol = 2**-8 if result.dtype == torch.bfloat16 else 2e-6
            atol = 1e-6 if arguments["form"] == "product" else 1e-44  # terms of a signed sum cancel
            if "denormal squares" in str(case):
                atol = max(atol, 1e-22)  # squares below 1e-38 keep few bits, those below 1e-45 none
            assert torch.allclose(result.double()[finite], truth[finite], rtol=rtol, atol=atol), str(case)
