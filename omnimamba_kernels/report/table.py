"""The report as text, and the rules that it is judged by."""

from __future__ import annotations

from ..triton_launch import TARGETS
from .ahead import Job
from .resources import Resources

_HEADER = ("op", "kernel", "chip", "warps", "stages", "registers", "spilled", "shared", "products", "instructions",
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
    broken += _products(job, found)
    if not found.programs:
        broken.append("does not fit a multiprocessor")
    return broken


def _products(job: Job, found: Resources) -> list[str]:
    """Whether each product reaches the matrix units, as the compiler says and as the instructions show."""
    missed, total = found.products.get("none", 0), sum(found.products.values())
    broken = []
    if missed:
        broken.append(f"{missed} of {total} products miss the matrix units")
    if found.dots and not total:
        broken.append(f"{found.dots} products are lost")
    for kind, count in found.products.items():
        if kind != "none" and found.matrix.get(kind, 0) < count:
            broken.append(f"{count} products, {found.matrix.get(kind, 0)} {kind} instructions")
    allowed, _ = job.narrower()
    if len(found.narrower) > allowed:
        tiles = ", ".join(sorted(set(found.narrower)))
        broken.append(
            f"{len(found.narrower)} products of {tiles} became mma, {allowed} allowed: wgmma takes such tiles"
        )
    return broken


def text(rows: list[tuple[Job, Resources | str]]) -> str:
    """One line a compiled kernel, in aligned columns."""
    lines = [_HEADER, *(_line(job, found) for job, found in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _line(job: Job, found: Resources | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return job.op, job.kernel, job.arch, *["-"] * 9, job.call, "; ".join(faults(job, found))
    return (
        job.op, job.kernel, job.arch, str(found.warps), str(found.stages), str(found.registers), str(found.spilled),
        str(found.shared), found.reached(), found.uses() + " (serialized)" * found.serialized, str(found.programs),
        f"{found.occupancy:.0%}", job.call, "; ".join(faults(job, found)),
    )  # fmt: skip
