"""A process of its own: the cases of one operation in Triton's interpreter against the reference.

    TRITON_INTERPRET=1 python tests/kernels/run_interpreted.py kth_score

Each case runs twice, with opposite bytes in all memory that a launcher leaves uninitialised; both runs must agree with
the reference. Prints one JSON object: case name -> null, or what is wrong. Test helper, not a test module:
the interpreter replaces ``triton.jit`` for the whole process and must be chosen before the kernels are imported.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tritprune.kernels import agreement, cases
from tritprune.kernels import triton as kernels


@contextmanager
def poisoned(byte: int) -> Iterator[None]:
    """Every ``torch.empty`` hands out memory full of this byte."""
    empty = torch.empty

    def full(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(byte)
        return tensor

    torch.empty = full
    try:
        yield
    finally:
        torch.empty = empty


def verdict(case: cases.Case) -> str | None:
    """None if both runs agree with the reference, else what went wrong."""
    expected = agreement.expected_results(case)
    for byte in (0x00, 0xFF):
        try:
            with poisoned(byte):
                actual = case.run(getattr(kernels, case.op))
            agreement.assert_agrees(case, actual, expected)
        except AssertionError as error:
            return f"poison {byte:#x}: {error}"
        except Exception:
            return f"poison {byte:#x}: {traceback.format_exc()}"
    return None


if __name__ == "__main__":
    if not kernels.INTERPRETED:
        sys.exit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    json.dump({case.name: verdict(case) for case in cases.cases_of(sys.argv[1])}, sys.stdout)
