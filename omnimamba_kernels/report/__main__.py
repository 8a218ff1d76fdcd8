"""``python -m omnimamba_kernels.report triton``: what every Triton kernel becomes on each chip."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..backends import OPS
from ..triton_launch import TARGETS
from . import ahead, table
from .calls import calls


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; the exit status is 1 where a kernel breaks a rule, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m omnimamba_kernels.report", description=__doc__)
    parser.add_argument("backend", choices=["triton"])
    parser.add_argument("--op", action="append", choices=OPS, help="only this operation (may be repeated)")
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="only this chip (may be repeated)")
    parser.add_argument("--large", action="store_true", help="only the sizes that a GPU is measured at")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--processes", type=int, help="how many compile at once (default: one a processor)")
    arguments = parser.parse_args(argv)
    try:
        wanted = [call for op in arguments.op or OPS for call in calls(op) if call.large or not arguments.large]
        jobs = ahead.jobs(wanted, arguments.arch or TARGETS)
        jobs = [job for job in jobs if arguments.kernel is None or arguments.kernel in job.kernel]
        rows = list(ahead.compile_all(jobs, arguments.processes))
    except RuntimeError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        told = [{"error": found} if isinstance(found, str) else asdict(found) for _, found in rows]
        print(json.dumps([{**asdict(job), **told} for (job, _), told in zip(rows, told, strict=True)], indent=1))
    else:
        print(table.text(rows))
    return int(any(table.faults(job, found) for job, found in rows))


if __name__ == "__main__":
    sys.exit(main())
