"""Files on disk as records, read one at a time; only their places are kept in memory.

| file | a record |
| --- | --- |
| .jsonl | an object a line |
| .json | an object of the one list, as LLaVA's files are |
| .tar | WebDataset: members with one name up to its first dot; NAME.json is the object, NAME.jpg and such its picture |

Files are named by patterns (``shards/*.tar``) or as WebDataset does: ``shard-{000..012}.tar``, ``{train,more}.jsonl``,
``a.tar::b.tar``.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from .json_list import list_items

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
PICTURE = "picture bytes"
"""The field of a record that holds its picture's file, where a shard brought it along."""


class BadRecord(ValueError):
    """A record that cannot be used; training passes it over and counts it."""


class NoneUsable(ValueError):
    """Not one of a lesson's records can be used."""

    passed_over: Counter[str]
    """Why not, and how often that was met for the batch."""

    @classmethod
    def of(cls, count: int, passed_over: Counter[str]) -> NoneUsable:
        worst = "; ".join(list(passed_over)[:3])
        error = cls(f"none of {count} records can be used, for example: {worst}")
        error.passed_over = passed_over
        return error


class Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Record i; BadRecord where it is damaged."""
        ...


class Places:
    """Stretches of a file, 16 bytes of memory each: offsets and lengths."""

    def __init__(self, found: Iterable[tuple[int, int]]) -> None:
        self._numbers = array("q")
        for place in found:
            self._numbers.extend(place)

    def __len__(self) -> int:
        return len(self._numbers) // 2

    def __getitem__(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self._numbers[2 * i], self._numbers[2 * i + 1]


class Slices:
    """Records that are stretches of one file, which is read through once for their places, and never held."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self) -> Iterator[tuple[int, int]]:
        """Each record's offset and length in bytes."""
        raise NotImplementedError

    @cached_property
    def places(self) -> Places:
        return Places(self.find())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return as_object(read_slice(self.path, *self.places[i]), f"{self.path}, record {i}")


class JsonLines(Slices):
    def find(self) -> Iterator[tuple[int, int]]:
        start = 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    yield start, len(line)
                start += len(line)


class JsonList(Slices):
    def find(self) -> Iterator[tuple[int, int]]:
        """ValueError where it is no list, or where its brackets and strings do not close; what else may be wrong
        within a record is that record's matter."""
        return list_items(self.path)


class Shard:
    """A tar file of WebDataset."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def places(self) -> tuple[Places, Places]:
        """Where each sample's object lies, and where its picture; a length below 0 where it has none."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(self.path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which tarfile keeps
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if member.isfile():
                    found.setdefault(f"{folder}/{stem}", {})[ending.lower()] = member.offset_data, member.size
            end = tar.offset  # tarfile stops without a word where a later header is damaged or missing
        with open(self.path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{self.path} is damaged or cut off after {len(found)} samples")
        kinds = (("json",), PICTURES)
        return tuple(
            Places(next((members[e] for e in endings if e in members), (0, -1)) for members in found.values())
            for endings in kinds
        )

    def __len__(self) -> int:
        return len(self.places[0])

    def __getitem__(self, i: int) -> dict[str, Any]:
        (record, picture), where = (places[i] for places in self.places), f"{self.path}, sample {i}"
        if record[1] < 0:
            raise BadRecord(f"{where}: has no .json")
        made = as_object(read_slice(self.path, *record), where)
        return made if picture[1] < 0 else made | {PICTURE: read_slice(self.path, *picture)}


class Joined:
    """Records of several files, one file after another."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        which = bisect_right(self.ends, i)
        return self.parts[which][i - (self.ends[which - 1] if which else 0)]


MOST_NAMES = 100_000
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_KINDS = {".jsonl": JsonLines, ".json": JsonList, ".tar": Shard}


def open_records(patterns: Iterable[str | Path]) -> tuple[Joined, dict[str, str]]:
    """The records of all files that the names stand for, and each unreadable file with the reason.

    ValueError where a pattern names nothing, a file is of no known kind, or no record is left.
    """
    given, parts, bad = list(map(str, patterns)), [], {}
    for pattern in (spelled for name in given for spelled in spelled_out(name)):
        names = sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise ValueError(f"{pattern} names no file")
        for path in map(Path, names):
            if path.suffix not in _KINDS:
                raise ValueError(f"{path} must end in one of {', '.join(_KINDS)}")
            part = _KINDS[path.suffix](path)
            try:
                len(part)
            except (OSError, ValueError, tarfile.TarError) as error:
                bad[str(path)] = str(error)
            else:
                parts.append(part)
    records = Joined(parts)
    if not len(records):
        raise ValueError(f"no record in {', '.join(given)}{f'; unreadable: {bad}' if bad else ''}")
    return records, bad


def spelled_out(name: str) -> list[str]:
    """The names that one with braces or ``::`` stands for; of one between ``::`` each once.

    ValueError where they are more than ``MOST_NAMES``.
    """
    if os.path.lexists(name):
        return [name]
    parts = [list(islice(_without_braces(part), MOST_NAMES + 1)) for part in name.split("::")]
    if sum(map(len, parts)) > MOST_NAMES:
        raise ValueError(f"{name} stands for more than {MOST_NAMES:,} files")
    return [spelled for part in parts for spelled in dict.fromkeys(part)]


def _without_braces(name: str) -> Iterator[str]:
    found = _BRACES.search(name)
    if found is None:
        yield name
        return
    first, last, listed = found.groups()
    if listed is None:
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(map(len, (first, last))) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices: Iterable[str] = (f"{i:0{width}}" for i in range(int(first), int(last) + step, step))
    else:
        choices = listed.split(",")
    for choice in choices:
        yield from _without_braces(name[: found.start()] + choice + name[found.end() :])


def read_slice(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            found = file.read(size)
    except OSError as error:
        raise BadRecord(f"{path}: {error}") from error
    if len(found) < size:
        raise BadRecord(f"{path} ends within the record at {offset}")
    return found


def as_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRecord(f"{where}: must be an object, got {type(record).__name__}")
    return record
