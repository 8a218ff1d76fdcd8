"""Every operation against its peers on one device: ``python -m bench.gpu_ops OP --out FILE``.

On a GPU in bfloat16 at the sizes of ``<op>/cases.py``'s GPU tables, on a CPU in float32 at a few small ones. Each
contender is checked against float64 before it is timed; one that cannot run, or is wrong, gets its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .gpu_clock import Clock
from .gpu_problems import OPERATIONS, Problem

NO_TIME = "no time left"


def measure(problem: Problem, clock: Clock, rates: dict[str, float], until: float) -> list[dict[str, Any]]:
    """A row for each contender: a time beside a passed check, or the reason why there is none."""
    floor = max(problem.bytes / rates["copy"], problem.flops / rates["matmul"])
    limit = "memory" if problem.bytes / rates["copy"] >= problem.flops / rates["matmul"] else "matrix units"
    rows: list[dict[str, Any]] = []
    ours = None
    for who, make in problem.contenders.items():
        row = {"group": problem.group, "case": problem.case, "who": who, "floor": floor, "limit": limit}
        rows.append(row)
        if time.monotonic() > until:
            row["reason"] = NO_TIME
            continue
        call = found = None  # what the contender before held is freed
        before = clock.held()
        try:
            call, start = make(), time.perf_counter()
            found = call()
            clock.wait()
            row["first_call"] = time.perf_counter() - start
            row["error"] = problem.errors.get(who, problem.error)(found)
            found = None
            clock.held()
            if not row["error"] <= problem.bound:
                row["reason"] = f"failed its check: relative error {row['error']:.1e}, {problem.bound:.0e} accepted"
                continue
            with clock.watched(row):
                row["seconds"] = clock.median(call)
            row["peak_bytes"] = clock.peak() - before
            row.update(clock.more(call, row["seconds"], problem.graph))
        except Exception as error:  # a peer may fail in any way; its words are kept
            row["reason"] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}"
            )
            if clock.cuda:
                torch.cuda.empty_cache()
            continue
        row["floor_share"] = floor / row["seconds"]
        ours = ours or row["seconds"]
        row["times_ours"] = row["seconds"] / ours
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_ops", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPERATIONS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write, after every problem")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which nothing new is begun")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    clock = Clock(device, 0.3 if device.type == "cuda" else 0.2)
    rates, rows = clock.rates(), []
    for problem in OPERATIONS[options.op](device):
        rows += measure(problem, clock, rates, until)
        options.out.write_text(json.dumps({"rates": rates, "rows": rows}, indent=1))
        del problem
    return 0


if __name__ == "__main__":
    sys.exit(main())
