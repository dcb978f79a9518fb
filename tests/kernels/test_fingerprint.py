"""The fingerprint of a launch: everything that changes the machine code changes it, and nothing else does."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fingerprint

KERNEL = '''
import triton
import triton.language as tl

ROWS = tl.constexpr(4)
other = "text"


@triton.jit
def twice(x):
    return x + x


@triton.jit
def a_kernel(out_ptr, n, BLOCK: tl.constexpr):
    """What it does."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, twice(tl.load(out_ptr + at)) * ROWS, mask=at[:, None] < n)
'''


def kernel(folder, text):
    path = folder / f"kernels_{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.a_kernel


def test_the_text_counts_and_that_of_what_it_calls_and_names(tmp_path):
    plain = fingerprint.of_kernel(kernel(tmp_path, KERNEL))
    for old, new in (
        ("* ROWS", "- ROWS"),
        ("return x + x", "return x * 2"),
        ("constexpr(4)", "constexpr(5)"),
        ("constexpr(4)", "constexpr(4.0)"),
        ("@triton.jit\ndef a_kernel", "@triton.jit(do_not_specialize=[1])\ndef a_kernel"),
        ("x + x", "tl.abs(x)"),
    ):
        assert old in KERNEL
        assert fingerprint.of_kernel(kernel(tmp_path, KERNEL.replace(old, new))) != plain, new
    for old, new in (
        ("\n\n\n@triton.jit\ndef a_kernel", "\n\n\n# lower\n\n\n@triton.jit\ndef a_kernel"),
        ("    at =", "    # [BLOCK]\n    at ="),
        ('"""What it does."""', '"""Said in other words."""'),
        ('"text"', '"another"'),
        ("    tl.store(out_ptr + at, ", "    tl.store(\n        out_ptr + at,\n        "),
    ):
        assert old in KERNEL
        assert fingerprint.of_kernel(kernel(tmp_path, KERNEL.replace(old, new))) == plain, new


def test_types_constants_options_and_alignments_count(tmp_path):
    launched = kernel(tmp_path, KERNEL)
    launch = (("*fp32", "i32", "constexpr"), {"BLOCK": 64}, {"num_warps": 4}, (0,))
    changed = [
        (("*bf16", "i32", "constexpr"), *launch[1:]),
        (launch[0], {"BLOCK": 128}, *launch[2:]),
        (launch[0], {"BLOCK": True}, *launch[2:]),
        (*launch[:2], {"num_warps": 8}, (0,)),
        (*launch[:3], (0, 1)),
    ]
    prints = {fingerprint.of_launch(launched, *each) for each in (launch, *changed)}
    assert len(prints) == len(changed) + 1
    assert fingerprint.of_launch(launched, *launch) in prints


def test_what_it_does_not_understand_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"ROWS is a dict: say in .*fingerprint\.py what that means"):
        fingerprint.of_kernel(kernel(tmp_path, KERNEL.replace("tl.constexpr(4)", "{}")))
