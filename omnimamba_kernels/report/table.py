"""The report as text, and the rules that it is judged by."""

from __future__ import annotations

from ..triton_launch import TARGETS
from .ahead import Job
from .resources import Resources

_HEADER = ("op", "kernel", "chip", "warps", "stages", "registers", "spilled", "shared", "matrix instructions",
           "programs", "occupancy", "first call", "fault")  # fmt: skip


def faults(job: Job, found: Resources | str) -> list[str]:
    """Which rules a compiled kernel breaks."""
    if isinstance(found, str):
        return [f"does not compile: {found.strip().splitlines()[-1]}"]
    allowed, _ = job.budget()
    target = TARGETS[job.arch]
    broken = []
    if found.spilled > allowed:
        broken.append(f"spills {found.spilled} bytes a thread, {allowed} allowed")
    if found.shared > target.shared_bytes:
        broken.append(f"needs {found.shared} bytes of shared memory, the chip has {target.shared_bytes}")
    if found.dots and not found.matrix:
        broken.append("has products, and none reaches the matrix units")
    if not found.programs:
        broken.append("does not fit a multiprocessor")
    return broken


def text(rows: list[tuple[Job, Resources | str]]) -> str:
    """One line a compiled kernel, in aligned columns."""
    lines = [_HEADER, *(_line(job, found) for job, found in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _line(job: Job, found: Resources | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return job.op, job.kernel, job.arch, *["-"] * 8, job.call, "; ".join(faults(job, found))
    return (
        job.op, job.kernel, job.arch, str(found.warps), str(found.stages), str(found.registers), str(found.spilled),
        str(found.shared), found.uses() + " (serialized)" * found.serialized, str(found.programs),
        f"{found.occupancy:.0%}", job.call, "; ".join(faults(job, found)),
    )  # fmt: skip
