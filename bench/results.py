"""Rows, the file they are kept in, and reading it back."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field, fields
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
    rate: float | None = None
    """What the machine itself reached of that around it, in FLOP/s or byte/s: the median of the rounds kept."""
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
    first_call: float | None = None
    """Of a GPU, as all that follows: seconds of the first call, what it compiles included."""
    graph_seconds: float | None = None
    """The same calls replayed as a CUDA graph."""
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttled: list[str] = field(default_factory=list)
    """What held the clocks back while it was timed."""
    joules: float | None = None
    """Energy a call, by the driver's counter."""

    @property
    def narrow(self) -> bool:
        """Whether its values have 16 bits, which its case's name then ends in."""
        return self.case.endswith((", bf16", ", fp16"))


def ratio_text(ratio: float) -> str:
    """A ratio in words: three digits of it, never as a power of ten."""
    return f"{ratio:.3g}x" if ratio < 999.5 else f"{float(f'{ratio:.3g}'):,.0f}x"


def length_of(case: str) -> int:
    """The tokens that a case names: the second number of 1 x 4096, the first of others."""
    numbers = [int(number) for number in re.findall(r"\d+", case)]
    if len(numbers) < 1 + (" x " in case):
        raise ValueError(f"the case {case!r} names no length")
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


def read(path: Path) -> dict[str, Any]:
    """A JSON object as it is kept; ValueError that names the file where there is none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): it was cut off or changed; delete it or get it anew"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def load(path: Path) -> dict[str, Any]:
    """A result file, its rows as ``Row``; ValueError that says what is wrong with a file that is none."""
    content = read(path)
    try:
        content["rows"] = [_sound(Row(**row)) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of pytest bench: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no result of pytest bench: {error}") from error
    return content


def _sound(row: Row) -> Row:
    """The row, where it has names and each of its figures is one; else ValueError that says which is not."""
    for name, value in vars(row).items():
        known = _KINDS[name]
        if not isinstance(value, known) or isinstance(value, bool):
            raise ValueError(f"{row.group}, {row.case}, {row.who}: {name} is {value!r}")
        if isinstance(value, float) and not math.isfinite(value) and name not in ("error", "error_bound"):
            raise ValueError(f"{row.group}, {row.case}, {row.who}: {name} is {value}")
        if name in ("seconds", "floor_share", "times_ours", "tokens_s", "rate") and value is not None and value <= 0:
            raise ValueError(f"{row.group}, {row.case}, {row.who}: {name} is {value}, expected more than 0")
    return row


_OF_A_FIELD = {"str": (str,), "float": (float, int), "int": (int,), "list[str]": (list,), "None": (type(None),)}
_KINDS = {f.name: sum((_OF_A_FIELD[kind] for kind in f.type.split(" | ")), ()) for f in fields(Row)}
"""What each field of a row may be."""
_SECTIONS = {
    "started": str, "seconds": (int, float), "machine": dict, "rates": dict, "demo": dict, "claims": list,
    "exponents": list,
}  # fmt: skip


def load_run(path: Path, *sections: str) -> dict[str, Any]:
    """``load`` of a file that has these parts of what a run of pytest bench writes; all of them, for tables to be made
    of it, where none is named."""
    content = load(path)
    for name in sections or _SECTIONS:
        kind = _SECTIONS[name]
        if not isinstance(content.get(name), kind):
            said = f"has no {name}" if name not in content else f"{name} is {content[name]!r}"
            raise ValueError(f"{path} is no result of pytest bench: it {said}")
    return content


def is_whole(content: dict[str, Any]) -> bool:
    """Whether it is of a whole run, which alone makes the README's tables."""
    return bool(content.get("complete")) and not content.get("quick", True)


def latest(folder: Path = FOLDER, gpu: bool = False) -> Path | None:
    """The result of the most recent whole run on a CPU or a GPU, judged by the start time inside the files."""
    whole = [
        (content["started"], path)
        for path in folder.glob("*/*.json")
        if is_whole(content := read(path)) and bool(content.get("gpu")) == gpu
    ]
    return max(whole)[1] if whole else None


def chosen(parser: ArgumentParser, path: Path | None, *sections: str) -> tuple[Path, dict[str, Any]]:
    """The result file that a command was given, or the latest whole run; what is wrong with it ends the command, as
    does a part that it lacks of those that ``load_run`` looks for."""
    try:
        path = path or latest()
        if path is None:
            parser.error("no whole run under bench/results: run pytest bench/ first")
        return path, load_run(path, *sections)
    except ValueError as error:
        parser.error(str(error))


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
