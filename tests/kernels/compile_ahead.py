"""A process of its own: every launch that the launchers make, compiled for a GPU that need not be there.

    python tests/kernels/compile_ahead.py sm_90 [--representative] [--probe spill|broken]

The launchers run on every case with the one launching function replaced by a recorder, so that signatures come from
real calls. Prints one JSON object: variant -> {"fault": null or what is wrong, and figures of the machine code}.
On CUDA targets a variant must compile, use no stack and no local memory (no spills), as ``cuobjdump`` of the triton
wheel reports, and load wide where it was promised aligned addresses; on HIP targets it must compile without spilled
vector registers. ``--representative`` takes one variant of each kernel, alignment, type and orientation instead of
every block, form and reduction too. ``--probe`` compiles a kernel that must be refused instead: a gate that cannot
fail is none. Test helper, not a test module: it must not be interpreted.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritprune.kernels import cases
from tritprune.kernels import triton as kernels
from tritprune.kernels.triton import multi_tensor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _spilling_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """Far more live values than registers."""
    at = tl.arange(0, SIZE)
    kept = tl.load(in_ptr + at)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(n):
        total += tl.load(in_ptr + i * SIZE + at) * kept
        kept += total
    tl.store(out_ptr + at, total + kept)


@triton.jit
def _broken_kernel(out_ptr, in_ptr, n, SIZE: tl.constexpr):  # noqa: N803
    """Shapes that do not fit: the compiler must refuse it."""
    tl.store(out_ptr + tl.arange(0, SIZE), tl.load(in_ptr + tl.arange(0, 2 * SIZE)) + n)


class Recorder:
    """Stands in for ``multi_tensor.launch``; keeps one source per distinct kernel, signature and constants."""

    def __init__(self) -> None:
        self.variants: dict[str, ASTSource] = {}

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs == 0:
            return
        names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        expected = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        if len(names) != len(arguments) or expected != set(constants):
            raise TypeError(f"{kernel.__name__}: {len(arguments)} arguments and {sorted(constants)}")
        types = dict(zip(names, map(_type_of, arguments), strict=True))
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        pointers = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"}
        shown = ", ".join([*types.values(), *(f"{name}={value}" for name, value in constants.items())])
        module = kernel.fn.__module__.rpartition(".")[2]
        self.variants.setdefault(
            f"{module}.{kernel.__name__}({shown})", ASTSource(kernel, signature, constants, pointers)
        )


def _type_of(argument: Any) -> str:
    """Triton's name for the type of a launch argument; none of ours is a plain integer."""
    if isinstance(argument, float):
        return "fp32"
    return {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32"}[argument.dtype]


def recorded() -> dict[str, ASTSource]:
    """The sources of every launch that any case makes."""
    recorder = Recorder()
    launch = multi_tensor.launch
    multi_tensor.launch = recorder
    try:
        for case in cases.all_cases():
            case.run(getattr(kernels, case.op))
    finally:
        multi_tensor.launch = launch
    return recorder.variants


def representatives(variants: dict[str, ASTSource]) -> dict[str, ASTSource]:
    """One variant per kernel and constants other than those that only change how often something is repeated."""
    chosen: dict[str, tuple[str, ASTSource]] = {}
    for name, source in variants.items():
        chosen.setdefault(re.sub(r"\b(N|M|FORM|REDUCE|HAS_STATE|PASS=[123])=?\w*", "", name), (name, source))
    return dict(chosen.values())


def probes(name: str | None) -> Iterator[tuple[str, ASTSource]]:
    """A kernel that the gate must refuse."""
    if name:
        kernel = {"spill": _spilling_kernel, "broken": _broken_kernel}[name]
        signature = {"out_ptr": "*fp32", "in_ptr": "*fp32", "n": "i32", "SIZE": "constexpr"}
        yield f"probe {name}", ASTSource(kernel, signature, {"SIZE": 16384})


def inspect(source: ASTSource, target: GPUTarget) -> dict[str, Any]:
    """Compile, and read the figures off the machine code."""
    try:
        compiled = triton.compile(source, target=target, options=OPTIONS)
    except Exception as error:
        return {"fault": f"does not compile: {type(error).__name__}: {error}"}
    figures = cuda_figures(compiled.asm["cubin"]) if target.backend == "cuda" else hip_figures(compiled.asm["amdgcn"])
    if target.backend == "cuda":
        figures["WIDE"] = len(re.findall(r"ld\.global\S*\.v[248]\.", compiled.asm["ptx"]))
    spilled = {name: figures[name] for name in ("STACK", "LOCAL", "vgpr_spill_count") if figures.get(name)}
    narrow = figures.get("WIDE") == 0 and source.constants.get(_place(source, "ALIGNED")) is True
    narrow = narrow and source.constants.get(_place(source, "M"), 1) == 1
    return {"fault": f"spills: {spilled}" if spilled else "no wide load" if narrow else None, **figures}


def _place(source: ASTSource, name: str) -> tuple[int, ...]:
    """Where ``ASTSource`` files a constant."""
    return (source.fn.arg_names.index(name),) if name in source.fn.arg_names else ()


def cuda_figures(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL in bytes and registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise FileNotFoundError(f"{tool}: the triton wheel has no cuobjdump, so spills cannot be checked")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}
    if figures.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise ValueError(f"cuobjdump reported no resource usage:\n{shown}")
    return figures


def hip_figures(assembly: str) -> dict[str, int]:
    """Registers used and spilled."""
    figures = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    if figures.keys() != {"vgpr_count", "vgpr_spill_count"}:
        raise ValueError("the assembly states no register usage")
    return figures


if __name__ == "__main__":
    if kernels.INTERPRETED:
        sys.exit("unset TRITON_INTERPRET")
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--representative", action="store_true")
    parser.add_argument("--probe", choices=("spill", "broken"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = dict(probes(options.probe)) if options.probe else recorded()
    sources = representatives(sources) if options.representative else sources
    json.dump(
        {name: inspect(source, TARGETS[options.target]) for name, source in sources.items()}, sys.stdout, indent=1
    )
