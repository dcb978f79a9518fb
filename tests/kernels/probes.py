"""Kernels that the compile gates must refuse, one a gate: a gate that cannot fail is none."""

import triton
import triton.language as tl
from triton.compiler import ASTSource


@triton.jit
def _broken_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """Shapes that do not fit: the compiler must refuse it."""
    tl.store(out_ptr + tl.arange(0, SIZE), tl.load(in_ptr + tl.arange(0, 2 * SIZE)) + n)


@triton.jit
def _spilled_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """More live values than a thread has registers."""
    at = tl.arange(0, SIZE)
    kept = tl.load(in_ptr + at)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(n):
        total += tl.load(in_ptr + i * SIZE + at) * kept
        kept += total
    tl.store(out_ptr + at, total + kept)


@triton.jit
def _shared_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """A sum over the block: warps meet in shared memory, at barriers."""
    tl.store(out_ptr, tl.sum(tl.load(in_ptr + tl.arange(0, SIZE)), 0) + n)


@triton.jit
def _narrow_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """An address out of a table, without a word on its alignment."""
    at = tl.arange(0, SIZE)
    values_ptr = tl.load(in_ptr.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + at, tl.load(values_ptr + at) + n)


@triton.jit
def _slow_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """Forty dependent square roots for each value read."""
    at = tl.arange(0, SIZE)
    value = tl.load(in_ptr + at)
    for _ in tl.static_range(40):
        value = tl.sqrt(value + n)
    tl.store(out_ptr + at, value)


_SIGNATURE = {"out_ptr": "*fp32", "in_ptr": "*fp32", "n": "i32", "SIZE": "constexpr"}
_ALIGNED = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}

PROBES = {
    "compiles": (_broken_kernel, 1024),
    "spilled": (_spilled_kernel, 16384),
    "registers": (_spilled_kernel, 4096),
    "shared": (_shared_kernel, 1024),
    "load": (_narrow_kernel, 1024),
    "per_byte": (_slow_kernel, 1024),
}
"""Gate -> a kernel that it refuses, and its size."""


def source(gate: str) -> ASTSource:
    """The probe of a gate, ready to be compiled."""
    kernel, size = PROBES[gate]
    return ASTSource(kernel, _SIGNATURE, {"SIZE": size}, _ALIGNED)
