"""``python -m omnimamba_kernels.report triton`` or ``cuda``: what every kernel becomes on each chip."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..backends import OPS
from ..triton_launch import TARGETS
from . import ahead, cuda, table
from .calls import calls


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; the exit status is 1 where a kernel breaks a rule, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m omnimamba_kernels.report", description=__doc__)
    parser.add_argument("backend", choices=["triton", "cuda"])
    parser.add_argument("--op", action="append", choices=OPS, help="only this operation (may be repeated)")
    parser.add_argument("--arch", action="append", help="only this chip, e.g. sm_90 or sm_90a (may be repeated)")
    parser.add_argument("--large", action="store_true", help="triton: only the sizes that a GPU is measured at")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--processes", type=int, help="triton: how many compile at once (default: all)")
    arguments = parser.parse_args(argv)
    try:
        return _cuda(arguments) if arguments.backend == "cuda" else _triton(arguments)
    except RuntimeError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


def _triton(arguments: argparse.Namespace) -> int:
    unknown = set(arguments.arch or ()) - set(TARGETS)
    if unknown:
        raise RuntimeError(f"--arch: got {', '.join(unknown)}, expected some of {', '.join(TARGETS)}")
    wanted = [call for op in arguments.op or OPS for call in calls(op) if call.large or not arguments.large]
    jobs = ahead.jobs(wanted, arguments.arch or TARGETS)
    jobs = [job for job in jobs if arguments.kernel is None or arguments.kernel in job.kernel]
    rows = list(ahead.compile_all(jobs, arguments.processes))
    if arguments.json:
        print(json.dumps([{**asdict(job), **asdict(found)} for job, found in rows], indent=1))
    else:
        print(table.text(rows))
    return int(any(table.faults(job, found) for job, found in rows))


def _cuda(arguments: argparse.Namespace) -> int:
    rows = [
        kernel
        for kernel in cuda.kernels()
        if kernel.op in (arguments.op or (*OPS, "common"))
        and kernel.chip in (arguments.arch or [kernel.chip])
        and (arguments.kernel is None or arguments.kernel in kernel.name)
    ]
    print(json.dumps([asdict(kernel) for kernel in rows], indent=1) if arguments.json else cuda.text(rows))
    return int(any(cuda.faults(kernel) for kernel in rows))


if __name__ == "__main__":
    sys.exit(main())
