"""What became slower between two runs: ``python -m bench.compare A.json B.json``; exits with 1 if anything did.

A row's noise is the spread of its own rounds, which interleave with those of its rivals. Each time is first divided by
what the machine's own rate would allow (the share of the floor), so that a slower machine is no regression. A row is
flagged where B's median lies above A's by more than THREE times both spreads together, and by FEWEST at least. Ours
that are flagged are regressions; peers' are told apart and fail nothing: their code is not what changed here. A row of
ours that A timed and B tried but could not, a wrong result's too, is a regression as well. Nothing in both is an error.

Two files of instruction counts (bench.instructions) are compared too: there is no noise in them, a share for what the C
library does otherwise is all that is allowed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omnimamba_kernels.backends import NAMES

from . import instructions, results
from .measure import ENOUGH
from .results import Row
from .tables import table

THREE, FEWEST = 3.0, 0.05
"""Spreads, and the least change that counts."""


def changes(before: list[Row], after: list[Row], alike: bool = True) -> list[tuple[Row, float, float | None]]:
    """(row of ``after``, its time over that of the same row before, the change that noise explains), for every row that
    both runs timed; None where a run kept no spread, for lack of rounds. Of two devices that are not ``alike``, rows
    without a floor say nothing."""
    known = {(r.group, r.case, r.who): r for r in before if r.seconds}
    found = []
    for row in after:
        old = known.get((row.group, row.case, row.who))
        if old is None or not row.seconds:
            continue
        if old.floor_share and row.floor_share and old.floor == row.floor:
            ratio = old.floor_share / row.floor_share
        elif not alike:
            continue
        else:
            ratio = row.seconds / old.seconds
        measured = old.spread is not None and row.spread is not None
        noise = max(FEWEST, THREE * (old.spread**2 + row.spread**2) ** 0.5) if measured else None
        found.append((row, ratio, noise))
    return found


def slower(found: list[tuple[Row, float, float | None]]) -> list[tuple[Row, float, float]]:
    return [(row, ratio, noise) for row, ratio, noise in found if noise is not None and ratio > 1 + noise]


def lost(before: list[Row], after: list[Row]) -> list[Row]:
    """Rows of ours in ``after`` without the time that they had before."""
    known = {(r.group, r.case, r.who) for r in before if r.seconds and mine(r)}
    return [row for row in after if not row.seconds and (row.group, row.case, row.who) in known]


def mine(row: Row) -> bool:
    """Whether it is ours: a backend's, or what a case's ratios are to."""
    return row.who in NAMES or row.times_ours == 1.0 or row.who.startswith("ours")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    try:
        both = [results.read(path) for path in (options.before, options.after)]
        if all("counts" in content for content in both):
            return instructions.compare(*both)
        a, b = results.load(options.before), results.load(options.after)
    except ValueError as error:
        parser.error(str(error))
    devices = [device(content) for content in (a, b)]
    alike = devices[0] == devices[1]
    found, gone = changes(a["rows"], b["rows"], alike), lost(a["rows"], b["rows"])
    if not found and not gone:
        parser.error(f"{options.before} and {options.after} have no row in common that both timed")
    flagged = slower(found)
    ours = [change for change in flagged if mine(change[0])]
    unknown = sum(noise is None for _, _, noise in found)
    if not alike:
        print(f"two devices, {' and '.join(devices)}: shares of their floors are compared, times are not")
    for title, some in (("ours", ours), ("peers', no regression", [c for c in flagged if not mine(c[0])])):
        if some:
            lines = [[r.group, r.case, r.who, f"{ratio:.2f}x", f"{noise:.0%}"] for r, ratio, noise in some]
            print(f"slower, {title}:\n{table(['operation', 'case', 'by', 'time, of before', 'noise'], lines)}")
    if gone:
        lines = [[r.group, r.case, r.who, r.reason or ""] for r in gone]
        print(f"timed before and no more, ours:\n{table(['operation', 'case', 'by', 'reason'], lines)}")
    print(
        f"{len(found)} rows in both, {len(ours)} of ours slower beyond their noise, {len(flagged) - len(ours)} of "
        f"peers; {unknown} could not be judged: one of the runs kept fewer than {ENOUGH} rounds of them"
    )
    return int(bool(ours or gone))


def device(content: dict[str, Any]) -> str:
    """With its number of threads, where that is kept."""
    about = content.get("machine", {})
    threads = f" with {about['threads']} threads" if "threads" in about else ""
    return f"{about.get('device', 'an unknown one')}{threads}"


if __name__ == "__main__":
    sys.exit(main())
