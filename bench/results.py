"""Rows, the file they are kept in, and reading it back."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One contender on one case. A time only where ``error`` is within ``error_bound``, else a ``reason``."""

    group: str
    case: str
    who: str
    seconds: float | None = None
    rounds: int = 0
    """Rounds kept, of all that were taken; the others were dropped because the machine itself was slow."""
    rounds_taken: int = 0
    error: float | None = None
    error_bound: float | None = None
    gb_s: float | None = None
    gflop_s: float | None = None
    floor: str | None = None
    """What the floor is made of: sgemm, copy or read."""
    floor_share: float | None = None
    """Time of the floor over this time: 1 is as fast as the measured rate allows."""
    far_share: float | None = None
    """Bytes over the speed of a copy from DRAM to DRAM, over this time; above 1 where the data stays in a cache."""
    times_ours: float | None = None
    """This time over ours, the median over interleaved rounds: above 1 we are faster."""
    spread: float | None = None
    """Half the distance between the quartiles of the rounds kept, each over its floor, as a share of their median."""
    tokens_s: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    reason: str | None = None


def length_of(case: str) -> int:
    """The tokens that a case names: the second number of 1 x 4096, the first of others."""
    numbers = [int(number) for number in re.findall(r"\d+", case)]
    return numbers[1] if " x " in case else numbers[0]


def find(rows: list[Row], group: str, case: str, who: str) -> Row | None:
    return next((row for row in rows if (row.group, row.case, row.who) == (group, case, who)), None)


def file_name(date: str, commit: str, *, quick: bool, complete: bool) -> str:
    """``<date>-<commit>.json``; a quick or partial run says so in its name and never becomes a README table."""
    return f"{date}-{commit}{'-quick' if quick else ''}{'' if complete else '-partial'}.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a reader sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> dict[str, Any]:
    """A result file, its rows as ``Row``."""
    content = json.loads(path.read_text())
    content["rows"] = [Row(**row) for row in content["rows"]]
    return content


def latest(folder: Path = FOLDER) -> Path | None:
    """The result of the most recent whole run, judged by the start time inside the files."""
    whole = [
        (content["started"], path)
        for path in folder.glob("*/*.json")
        if (content := json.loads(path.read_text())).get("complete") and not content["quick"]
    ]
    return max(whole)[1] if whole else None


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
