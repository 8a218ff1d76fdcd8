"""What a compiled kernel needs of a chip, read from the assembler's log, the assembly and Triton's metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..triton_launch import Target

_MATRIX = {
    "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync", "mfma": r"\bv_mfma_",
}  # fmt: skip
_LAYOUTS = {"#ttg.nvidia_mma": "mma", "#ttg.amd_mfma": "mfma"}


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
    products: dict[str, int]  # those of the compiler's last form, each by the kind that it became; "none" if by none
    narrower: tuple[str, ...]  # tiles that wgmma would take and that became mma
    serialized: bool  # the assembler could not let wgmma run asynchronously
    programs: int  # that fit a multiprocessor together
    occupancy: float  # their share of the warps that a multiprocessor can hold

    def uses(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.matrix.items()) or "-"

    def reached(self) -> str:
        """Which kind the products became."""
        return ", ".join(f"{count} {name}" for name, count in self.products.items()) or "-"


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
    kinds, narrower = products(compiled.asm["ttgir"], target.arch, metadata.num_warps)
    return Resources(
        metadata.num_warps, metadata.num_stages, registers, spilled, stack, metadata.shared,
        {name: count for name, count in found.items() if count}, _dots(compiled.asm["ttir"]), kinds, narrower,
        "serialized" in log, programs, occupancy,
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
    return sum(not _plain(dot) for dot in re.findall(r"^.*\btt\.dot\b.*$", ttir, re.M))


def _plain(dot: str) -> bool:
    return re.search(r"xf32[^*]*\*[^*]*xf32", dot) is not None and "tf32" not in dot


def products(ttgir: str, arch: str, warps: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """By what each product is computed, from the compiler's last form before instructions, in which a product that was
    left to the ordinary units has a layout of theirs; and on sm_90 the tiles for which wgmma was passed over."""
    layouts = dict(re.findall(r"^(#\w+) = (#[\w.]+)<", ttgir, re.M))
    kinds, narrower = {}, []
    for line in re.findall(r"^.*\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b.*$", ttgir, re.M):
        kind, tile = "tcgen05", ()
        if "tc_gen5_mma" not in line:
            rows, columns, layout = re.search(r"tensor<(\d+)x(\d+)x\w+, (#\w+)>\s*(?:loc\(.*)?$", line).groups()
            kind = "wgmma" if "warp_group_dot" in line else _LAYOUTS.get(layouts[layout], "none")
            tile = (int(rows), int(columns))
        if kind == "none" and _plain(line):
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        if arch == "sm_90" and kind == "mma" and warps % 4 == 0 and tile[0] % 64 == 0 and tile[1] % 8 == 0:
            narrower.append(f"{tile[0]} x {tile[1]}")
    return kinds, tuple(narrower)


def resident(chip: Chip, warp: int, warps: int, registers: int, shared: int) -> tuple[int, float]:
    """How many programs a multiprocessor holds at once, and the share of its warps that they are."""
    a_warp = -(-registers * warp // chip.granule) * chip.granule
    by_registers = chip.files * (chip.registers // a_warp) // warps if a_warp else chip.programs
    by_shared = chip.shared_bytes // (shared + chip.reserved_bytes) if shared + chip.reserved_bytes else chip.programs
    programs = min(chip.programs, chip.warps // warps, by_registers, by_shared)
    return programs, programs * warps / chip.warps
