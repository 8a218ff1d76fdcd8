"""Every operation against its peers on one device: ``python -m bench.gpu_ops OP --out FILE``.

On a GPU in bfloat16 at the sizes of ``<op>/cases.py``'s GPU tables, on a CPU in float32 at a few small ones. Each
contender is checked against float64 before it is timed; one that cannot run, or is wrong, gets its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .gpu_clock import Clock
from .gpu_problems import OPERATIONS, Problem
from .gpu_problems.common import Call, Steps
from .measure import spread

NO_TIME = "no time left"


def measure(problem: Problem, clock: Clock, rates: dict[str, float], until: float) -> list[dict[str, Any]]:
    """A row for each contender: a time beside a passed check, or the reason why there is none."""
    rows: list[dict[str, Any]] = []
    ours = None
    for who, make in problem.contenders.items():
        row = {"group": problem.group, "case": problem.case, "who": who, "ours": who in problem.ours}
        row |= floor(problem, who, rates)
        row |= {"note": problem.note} if problem.note else {}
        rows.append(row)
        if time.monotonic() > until:
            row["reason"] = NO_TIME
            continue
        try:
            _time(problem, who, make, clock, row)
        except Exception as error:  # a peer may fail in any way; its words are kept
            row["reason"] = said(error)
        if "seconds" in row:
            ours = ours or (counted(row, problem) if row["ours"] else None)
            _compared(row, ours, problem)
        elif clock.cuda:
            torch.cuda.empty_cache()
    return rows


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def floor(problem: Problem, who: str, rates: dict[str, float]) -> dict[str, Any]:
    """What the contender cannot do without, and the seconds of it at the rates, by whichever takes longer."""
    moved, flops = problem.needs.get(who, (problem.bytes, problem.flops))
    times = {"memory": moved / rates["copy"], "matrix units": flops / rates["matmul"]}
    limit = max(times, key=times.get)
    return {"bytes": moved, "flops": flops, "floor": times[limit], "limit": limit}


def _time(problem: Problem, who: str, make: Callable[[], Call], clock: Clock, row: dict[str, Any]) -> None:
    """Fills in what one contender's check and calls gave."""
    before = clock.held()
    call, start = make(), time.perf_counter()
    found = call()
    clock.wait()
    row["first_call"] = time.perf_counter() - start
    row["error"], row["error_bound"] = problem.errors.get(who, problem.error)(found), problem.bound
    found = None  # what the check held is freed
    clock.held()
    if not row["error"] <= problem.bound:
        row["reason"] = f"failed its check: relative error {row['error']:.1e}, {problem.bound:.0e} accepted"
        return
    with clock.watched(row):
        taken = times(clock, call)
    row["seconds"], row["rounds"], row["spread"] = statistics.median(taken), len(taken), spread(taken)
    row["peak_bytes"] = clock.peak() - before
    if not isinstance(call, Steps):
        row.update(clock.more(call, row["seconds"], problem.graph, problem.energy))


def times(clock: Clock, call: Call) -> list[float]:
    """Seconds of each call; of Steps the sum of their medians, which is one."""
    if not isinstance(call, Steps):
        return clock.times(call)
    as_run = clock.replayed if call.replayed else lambda step: step
    return [sum(count * clock.median(as_run(step)) for count, step in call.parts)]


def counted(row: dict[str, Any], problem: Problem) -> float:
    """The seconds that rates and ratios are of: the graph's where the problem asks for one and it could be had."""
    return row.get("graph_seconds", row["seconds"]) if problem.graph else row["seconds"]


def _compared(row: dict[str, Any], ours: float | None, problem: Problem) -> None:
    """No ratio where none of ours has a time."""
    taken = counted(row, problem)
    row["floor_share"] = row["floor"] / taken
    if ours:
        row["times_ours"] = taken / ours
    row["gb_s"], row["gflop_s"] = (row[kind] / taken / 1e9 for kind in ("bytes", "flops"))
    if problem.tokens:
        row["tokens_s"] = problem.tokens / taken


def run(op: str, clock: Clock, until: float, out: Path) -> int:
    """Measures an operation's problems and writes what there is after each; 1 where some could not be made or
    measured, of which ``lost`` tells."""
    found: dict[str, Any] = {"rates": clock.rates(), "rows": []}
    problems, more = OPERATIONS[op](clock.device), True
    while more:
        try:
            problem = next(problems)
            found["rows"] += measure(problem, clock, found["rates"], until)
            del problem
        except StopIteration:
            more = False
        except Exception as error:
            traceback.print_exc()
            found.setdefault("lost", []).append(said(error))
        out.write_text(json.dumps(found, indent=1))
    return 1 if "lost" in found else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_ops", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPERATIONS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write, after every problem")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which nothing new is begun")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    clock = Clock(device, 0.3 if device.type == "cuda" else 0.2)
    with clock.beside():
        return run(options.op, clock, until, options.out)


if __name__ == "__main__":
    sys.exit(main())
