"""What a compiled kernel needs of a chip, read from the assembler's log, the assembly and Triton's metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..triton_launch import Target

_MATRIX = {
    "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync", "mfma": r"\bv_mfma_",
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor shares among the programs on it."""

    warps: int
    programs: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, for each program
    registers: int  # in each of ``files`` register files
    files: int
    granule: int  # registers are dealt out to a warp in multiples of this


# NVIDIA: CUDA programming guide, technical specifications by compute capability. AMD: CDNA3 instruction set, a SIMD's
# register file is 512 vector registers a lane, accumulators among them.
_NVIDIA = {
    "sm_80": Chip(64, 32, 167_936, 1024, 65_536, 1, 256),
    "sm_90": Chip(64, 32, 233_472, 1024, 65_536, 1, 256),
    "sm_100": Chip(64, 32, 233_472, 1024, 65_536, 1, 256),
    "sm_120": Chip(48, 24, 102_400, 1024, 65_536, 1, 256),
}
_CHIPS = {**_NVIDIA, "gfx942": Chip(32, 32, 65_536, 0, 512 * 64, 4, 8 * 64)}


@dataclass(frozen=True)
class Resources:
    """``registers`` and ``spilled`` bytes a thread, ``shared`` bytes a program, matrix instructions by kind."""

    warps: int
    stages: int
    registers: int
    spilled: int
    stack: int
    shared: int
    matrix: dict[str, int]
    dots: int  # products in the source that matrix units can take
    serialized: bool  # the assembler could not let wgmma run asynchronously
    programs: int  # that fit a multiprocessor together
    occupancy: float  # their share of the warps that a multiprocessor can hold

    def uses(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.matrix.items()) or "-"


def read(compiled: Any, log: str, target: Target) -> Resources:
    """Everything about a ``triton.compile`` result; ``log`` is what ptxas said of it."""
    assembly, metadata = compiled.asm.get("ptx") or compiled.asm["amdgcn"], compiled.metadata
    if "ptx" in compiled.asm:
        registers, spilled, stack = _ptxas(log)
    else:
        registers = _amd(assembly, "vgpr_count")
        stack = _amd(assembly, "private_segment_fixed_size")
        spilled = 4 * _amd(assembly, "vgpr_spill_count")
        if stack:  # without memory of its own, scalar registers were spilled to lanes of vector registers
            spilled += 4 * _amd(assembly, "sgpr_spill_count")
    programs, occupancy = resident(_CHIPS[target.arch], target.warp, metadata.num_warps, registers, metadata.shared)
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in _MATRIX.items()}
    return Resources(
        metadata.num_warps, metadata.num_stages, registers, spilled, stack, metadata.shared,
        {name: count for name, count in found.items() if count}, _dots(compiled.asm["ttir"]), "serialized" in log,
        programs, occupancy,
    )  # fmt: skip


def _ptxas(log: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and stack of the kernel; the frame is printed before the register count."""
    used = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    count = re.search(r"Used (\d+) registers", log)
    if used is None or count is None:
        raise RuntimeError(f"ptxas said nothing of registers and spills: {log[:500]!r}")
    return int(count[1]), max(int(used[2]), int(used[3])), int(used[1])


def _amd(assembly: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])


def _dots(ttir: str) -> int:
    """tl.dot calls whose operands are not plain float32: those are computed by the ordinary units, by request."""
    dots = re.findall(r"^.*\btt\.dot\b.*$", ttir, re.M)
    return sum(not re.search(r"xf32[^*]*\*[^*]*xf32", dot) or "tf32" in dot for dot in dots)


def resident(chip: Chip, warp: int, warps: int, registers: int, shared: int) -> tuple[int, float]:
    """How many programs a multiprocessor holds at once, and the share of its warps that they are."""
    a_warp = -(-registers * warp // chip.granule) * chip.granule
    by_registers = chip.files * (chip.registers // a_warp) // warps if a_warp else chip.programs
    by_shared = chip.shared_bytes // (shared + chip.reserved_bytes) if shared + chip.reserved_bytes else chip.programs
    programs = min(chip.programs, chip.warps // warps, by_registers, by_shared)
    return programs, programs * warps / chip.warps
