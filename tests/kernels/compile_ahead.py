"""A process of its own: every launch that the launchers make, compiled for GPUs that need not be there, and measured.

    echo '{"sm_90": ["bracket._sample_kernel(SIZED=False)"]}' | python tests/kernels/compile_ahead.py
    python tests/kernels/compile_ahead.py --probes sm_90 gfx942            # kernels that the gates must refuse

The launchers run on every case while a recorder stands in for the launch of a kernel, so that signatures, constants and
options come from real calls. Reads which variants to compile for which targets (a name that no launch has is passed
over), and prints one JSON object: the version of this Triton, the fingerprint of every variant, a covering choice of
variants, and target -> variant -> its figures, or ``{"error": ...}`` if it does not compile. gates.py runs this with
each supported Triton and judges what it prints. Test helper, not a test module: it must not be interpreted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import fingerprint
import machine_code
import probes
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tritprune.kernels import cases
from tritprune.kernels import triton as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """One kernel with its types, constants and options, as a launcher asked for it."""

    kernel: JITFunction
    types: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    aligned: tuple[int, ...]

    @property
    def name(self) -> str:
        """``module.kernel``."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def fingerprint(self) -> str:
        """What decides its machine code, next to Triton and target."""
        return fingerprint.of_launch(self.kernel, self.types, self.constants, self.options, self.aligned)

    def measure(self, target: GPUTarget) -> dict[str, Any]:
        """Compile, and read the figures off the machine code."""
        signature = dict(zip(self.kernel.arg_names, self.types, strict=True))
        attributes = {(place,): [["tt.divisibility", 16]] for place in self.aligned}
        source = ASTSource(self.kernel, signature, self.constants, attributes)
        return measured(source, target, self.options)


def measured(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of a source, or what the compiler had against it."""
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    threads = options.get("num_warps", 4) * target.warp_size
    return dataclasses.asdict(machine_code.figures(compiled, threads))


class Recorder:
    """Stands in for ``JITFunction.run``: keeps each distinct variant, launches none."""

    def __init__(self) -> None:
        self.variants: dict[str, Variant] = {}

    def __call__(self, kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        del warmup
        if callable(grid) or min(grid) < 1:
            raise ValueError(f"{kernel.__name__}: grid {grid}")
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        given |= {name: keywords.pop(name) for name in list(keywords) if name in kernel.arg_names}
        types, constants, aligned = [], {}, []
        for place, parameter in enumerate(kernel.params):
            value = given.get(parameter.name, parameter.default)
            kind = "constexpr" if parameter.is_constexpr else _type_of(value)
            types.append(kind)
            if kind == "constexpr":
                constants[parameter.name] = value
            elif not parameter.do_not_specialize and _is_aligned(value):
                aligned.append(place)
        variant = Variant(kernel, tuple(types), constants, keywords, tuple(aligned))
        self.variants.setdefault(repr((variant.name, types, constants, keywords, aligned)), variant)


def _type_of(value: Any) -> str:
    """Triton's name for the type of a launch argument; an integer 1 is a constant, as at a real launch."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def recorded() -> dict[str, Variant]:
    """Every launch that any case makes, by a name that says what is special about it."""
    recorder = Recorder()
    with mock.patch.object(JITFunction, "run", lambda *args, **named: recorder(*args, **named)):
        for case in cases.all_cases():
            case.run(getattr(kernels, case.op))
    return {name: variant for variant in recorder.variants.values() for name in [_named(variant, recorder)]}


def _named(variant: Variant, recorder: Recorder) -> str:
    """``module.kernel(CONSTANT=value, ...)``; types, alignment and options are named where they differ, too."""
    family = [other for other in recorder.variants.values() if other.name == variant.name]
    shown = [f"{name}={value}" for name, value in variant.constants.items()]
    if len({other.types for other in family}) > 1:
        shown.insert(0, " ".join(kind for kind in variant.types if kind != "constexpr"))
    if len({other.aligned for other in family}) > 1:
        shown.append(f"16 at {' '.join(map(str, variant.aligned))}")
    for option in sorted({name for other in family for name in other.options}):
        if len({repr(other.options.get(option)) for other in family}) > 1:
            shown.append(f"{option}={variant.options.get(option)}")
    return f"{variant.name}({', '.join(shown)})"


def covering(variants: dict[str, Variant]) -> list[str]:
    """Few variants in which each kernel meets each value of each constant that is not a size, aligned and not."""

    def traits(variant: Variant) -> set[tuple[str, ...]]:
        plain = {n: str(v) for n, v in variant.constants.items() if isinstance(v, bool) or not isinstance(v, int)}
        return {(variant.name,), *((variant.name, name, value) for name, value in plain.items())}

    missing = set().union(*map(traits, variants.values()))
    chosen: list[str] = []
    while missing:
        chosen.append(max(variants, key=lambda name: len(traits(variants[name]) & missing)))
        missing -= traits(variants[chosen[-1]])
    return chosen


def probed(target: GPUTarget) -> dict[str, Any]:
    """The figures of each gate's probe; on CUDA also the instructions of one as the disassembler counts them."""
    options = {"num_warps": 4}
    results = {gate: measured(probes.source(gate), target, options) for gate in probes.PROBES}
    if target.backend == "cuda":
        cubin = triton.compile(probes.source("per_byte"), target=target, options=options).asm["cubin"]
        results["per_byte"]["disassembled"] = len(machine_code.disassembled(cubin))
    return results


def main(arguments: Iterable[str] | None = None) -> None:
    """Compile what the input, or the command line, asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", nargs="+", metavar="TARGET", choices=TARGETS)
    options = parser.parse_args(arguments)
    if kernels.INTERPRETED:
        sys.exit("unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    if options.probes:
        json.dump({name: probed(TARGETS[name]) for name in options.probes}, sys.stdout)
        return
    asked: dict[str, list[str]] = json.load(sys.stdin)
    variants = recorded()
    found = {
        target: {name: variants[name].measure(TARGETS[target]) for name in names if name in variants}
        for target, names in asked.items()
    }
    fingerprints = {name: variant.fingerprint for name, variant in variants.items()}
    made = {"triton": triton.__version__, "fingerprints": fingerprints, "covering": covering(variants)}
    json.dump({**made, "figures": found}, sys.stdout)


if __name__ == "__main__":
    main()
