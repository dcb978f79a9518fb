"""Figures of a compiled kernel, read off its machine code: what the compile gates compare.

Instructions are counted once each, as the bytes that the program text asks for are: loops weigh the same on both sides.
"""

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

RESERVED_SHARED = 1024
"""Bytes of shared memory that sm_90 and later keep for themselves, whoever asks."""

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_TRAILING_NOP = 0x918


@dataclass(frozen=True)
class Figures:
    """One compiled kernel.

    Args:
        registers: of a thread (vector registers on AMD).
        spilled: bytes of stack and local memory; on AMD spilled registers and private bytes.
        shared: bytes of shared memory that the kernel asked for.
        barriers: of a block.
        load: bytes of the narrowest load of a block of values (a scalar out of a table is none); 0 if there is none.
        instructions: of a thread.
        per_byte: thread instructions per byte that the program loads or stores.
    """

    registers: int
    spilled: int
    shared: int
    barriers: int
    load: int
    instructions: int
    per_byte: float


def figures(compiled: Any, threads: int) -> Figures:
    """The figures of what ``triton.compile`` returned.

    Args:
        compiled: for a CUDA or a HIP target.
        threads: of a program.
    """
    asked, scalars = memory_of(compiled.asm["ttir"])
    if "cubin" in compiled.asm:
        return _of_cuda(compiled, asked, scalars, threads)
    return _of_hip(compiled, asked, threads)


def memory_of(ttir: str) -> tuple[int, dict[int, int]]:
    """Bytes that loads and stores of blocks move, and how many scalar loads there are of each width."""
    asked, scalars = 0, dict.fromkeys((1, 2, 4, 8), 0)
    for operation, shape, kind in re.findall(
        r"tt\.(load|store) .* : (?:tensor<((?:\d+x)+))?!tt\.ptr<(\w+)>.*? loc\(", ttir
    ):
        size = _BYTES[kind]
        if not shape and operation == "load":
            scalars[size] += 1
        elif shape:
            for length in shape.rstrip("x").split("x"):
                size *= int(length)
            asked += size
    return asked, scalars


def _of_cuda(compiled: Any, asked: int, scalars: dict[int, int], threads: int) -> Figures:
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    used = _resource_usage(cubin)
    loads: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v([248]))?\.[bsuf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits) // 8
        loads[width] = loads.get(width, 0) + 1
    blocks = [width for width, count in loads.items() if count > scalars.get(width, 0)]
    count = instructions_of(cubin)
    return Figures(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        barriers=len(re.findall(r"\b(?:bar|barrier)\.sync", ptx)),
        load=min(blocks, default=0),
        instructions=count,
        per_byte=round(count * threads / asked, 2) if asked else 0.0,
    )


def _of_hip(compiled: Any, asked: int, threads: int) -> Figures:
    assembly = compiled.asm["amdgcn"]
    stated = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    needed = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    if not stated.keys() >= set(needed):
        raise ValueError(f"the assembly does not state {', '.join(sorted(set(needed) - stated.keys()))}")
    widths = re.findall(r"\b(?:global|buffer|flat)_load_[su]?(byte|short|dword(?:x\d)?)", assembly)
    count = len(re.findall(r"^\t(?!s_nop|s_code_end)[a-z]+_[a-z0-9_]+\b", assembly, re.MULTILINE))
    return Figures(
        registers=stated["vgpr_count"],
        spilled=sum(stated[name] for name in needed[1:]),
        shared=compiled.metadata.shared,
        barriers=len(re.findall(r"\bs_barrier\b", assembly)),
        load=min((_AMD_BYTES[width] for width in widths), default=0),
        instructions=count,
        per_byte=round(count * threads / asked, 2) if asked else 0.0,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one kernel."""
    shown = _cuobjdump(cubin, "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}
    if found.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise ValueError(f"cuobjdump reported no resource usage:\n{shown}")
    return found


def instructions_of(cubin: bytes) -> int:
    """Machine instructions, without the branch to itself and the padding after the last exit.

    An instruction of sm_70 and later has 16 bytes; counting them in the ELF file costs nothing, while the disassembler
    takes half a second a kernel. A test holds this count against the disassembler's.
    """
    table, entry, sections, names = (*struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A))
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + number * entry) for number in range(sections)]
    strings = headers[names][4]
    total = 0
    for name, _, _, _, offset, size in headers:
        if cubin[strings + name :].startswith(b".text."):
            codes = [struct.unpack_from("<H", cubin, at)[0] & 0xFFF for at in range(offset, offset + size, 16)]
            while codes and codes[-1] == _TRAILING_NOP:
                codes.pop()
            total += len(codes) - 1
    return total


def disassembled(cubin: bytes) -> list[str]:
    """The instructions as the disassembler of the Triton wheel names them, the same ones left out."""
    names = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", _cuobjdump(cubin, "-sass"), re.MULTILINE
    )
    while names and names[-1] == "NOP":
        names.pop()
    return names[:-1]


def _cuobjdump(cubin: bytes, question: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise FileNotFoundError(f"{tool}: the Triton wheel has no cuobjdump, so its machine code cannot be checked")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, question, file.name], capture_output=True, text=True, check=True).stdout
