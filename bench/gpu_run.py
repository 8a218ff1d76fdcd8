"""A run on a GPU as a session of pytest: every operation in a process of its own, its rows as the reports know them."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from . import gpu_check, gpu_claims
from .gpu_check import Part
from .gpu_ops import NO_TIME
from .measure import Bench
from .results import Row

ORDER = (
    "ssd_scan",
    "models",
    "generation",
    "prefill",
    "gated_norm",
    "causal_conv1d",
    "state_update",
    "lora_linear",
    "mamba_mixer",
)
"""What must be shown comes first."""
HEAVY = {"ssd_scan": 2.0, "models": 2.0, "generation": 2.0}
"""Shares of the time that is left; of the others 1."""
RESERVE = 0.95
TAIL = 30
"""Lines of an operation's log that are kept where it failed or ran out of time."""
FLOORS = {"memory": "copy", "matrix units": "bf16 matmul"}
_KEPT = {field.name for field in dataclasses.fields(Row)} - {"floor"}


class GpuRun:
    """What the operations' processes found, and the time that is left for the others."""

    def __init__(self, bench: Bench, seconds: float) -> None:
        self.bench, self.until = bench, time.monotonic() + RESERVE * seconds
        self.found: list[dict[str, Any]] = []
        self.parts: list[Part] = []

    def measure(self, op: str) -> Part:
        """All rows of one operation; it may take its share of what is left."""
        rest = sum(HEAVY.get(name, 1.0) for name in ORDER[ORDER.index(op) :])
        seconds = max(1.0, self.until - time.monotonic()) * HEAVY.get(op, 1.0) / rest
        with tempfile.TemporaryDirectory(prefix="omnimamba-") as folder:
            part, found = gpu_check.run_benchmark(op, Path(folder), seconds)
            if part.status != "ok":
                part.detail += tail(Path(folder) / f"bench-{op}.log")
        self.parts.append(part)
        for kind, rate in found["rates"].items():
            self.bench.rates.history[f"gpu {kind}"].append(rate)
        self.found += found["rows"]
        self.bench.rows += map(as_row, found["rows"])
        return part

    def whole(self) -> bool:
        """Whether nothing failed and time was left for everything."""
        return all(part.status == "ok" for part in self.parts) and not any(
            row.get("reason") == NO_TIME for row in self.found
        )

    def claims(self) -> list[dict[str, Any]]:
        """As a CPU's are kept."""
        judged = [claim for name in ("cuda", "triton") for claim in gpu_claims.judge(self.found, name)]
        return [{"what": f"{c.pop('what')}: {c.pop('by')}", "passed": c.pop("met"), **c} for c in judged]


def tail(log: Path) -> str:
    """The last lines of a log, below a line of their own; nothing of one that is missing or empty."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else []
    return "\n".join(["", *lines])


def as_row(found: dict[str, Any]) -> Row:
    """A row as bench.gpu_ops writes it; rates of nothing are none."""
    row = Row(**{name: value for name, value in found.items() if name in _KEPT})
    row.gb_s, row.gflop_s = row.gb_s or None, row.gflop_s or None
    row.floor, row.rounds_taken = FLOORS[found["limit"]], row.rounds
    if "graph_reason" in found:
        row.note = f"{row.note}; no graph: {found['graph_reason']}".lstrip("; ")
    return row
