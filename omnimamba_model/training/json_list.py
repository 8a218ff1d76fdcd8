"""Where the items of a long JSON list lie, found in pieces of the file: memory holds a piece, and a longer string.

Between items the list must be JSON to the letter. Within one only strings and brackets are followed, to its end:
whoever reads the item will find what else is wrong with it, and with it alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20
"""Bytes read at a time."""
_BLANKS = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^ \t\r\n,\]]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_WITHIN = re.compile(rb'(?:[^"{}\[\]]+|"[^"\\]*(?:\\.[^"\\]*)*")*', re.DOTALL)
"""What stands between two brackets, with whole strings."""


def list_items(path: Path) -> Iterator[tuple[int, int]]:
    """Each item's offset and length in bytes; ValueError where the list is none, not JSON, or cut off."""
    with open(path, "rb") as file:
        text = _Text(file)
        if text.skip(_BLANKS) != b"[":
            raise ValueError(f"{path} must be a JSON list, and begins with {text.show()!r}")
        text.take(1)
        count, more = 0, text.skip(_BLANKS) != b"]"
        while more and text.next:
            begun = text.place
            if not _item(text, f"{path} is not JSON after {count} records"):
                break
            yield begun, text.place - begun
            count += 1
            more = text.skip(_BLANKS) == b","
            if more:
                text.take(1)
                text.skip(_BLANKS)
        if text.next == b"":
            raise ValueError(f"{path} is cut off after {count} records: its list is not closed")
        left = text.show()
        closed = text.next == b"]"
        text.take(1)
        if not closed or text.skip(_BLANKS):
            raise ValueError(f"{path} is not JSON after {count} records: {left!r} is left over")


class _Text:
    """A file from the present place on. ``next`` is its next byte, empty at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._held, self._at, self._before = file, b"", 0, 0
        self._more()

    @property
    def place(self) -> int:
        return self._before + self._at

    @property
    def next(self) -> bytes:
        return self._held[self._at : self._at + 1]

    def show(self) -> str:
        """The beginning of what comes."""
        while len(self._held) < self._at + 20 and self._more():
            pass
        return self._held[self._at : self._at + 20].decode("utf-8", "replace")

    def take(self, count: int) -> None:
        self._at += count
        if self._at >= len(self._held):
            self._more()

    def skip(self, pattern: re.Pattern[bytes]) -> bytes:
        """Pass all that the pattern, which takes whatever stands there, matches; the byte behind it."""
        while True:
            self._at = pattern.match(self._held, self._at).end()
            if self._at < len(self._held) or not self._more():
                return self.next

    def passed(self, pattern: re.Pattern[bytes]) -> bytes:
        """As ``skip``; what was passed."""
        parts = []
        while True:
            found = pattern.match(self._held, self._at)
            parts.append(found[0])
            self._at = found.end()
            if self._at < len(self._held) or not self._more():
                return b"".join(parts)

    def string(self) -> bool:
        """Pass a string, which begins here; False where the file ends within it, and then that is passed."""
        while (found := _STRING.match(self._held, self._at)) is None:
            if not self._more():
                self._at = len(self._held)
                return False
        self.take(found.end() - self._at)
        return True

    def _more(self) -> bool:
        """Drop what was passed and read on; False at the end of the file."""
        piece = self._file.read(max(PIECE, len(self._held) - self._at))  # doubled: a long string is not searched often
        self._before += self._at
        self._held, self._at = self._held[self._at :] + piece, 0
        return bool(piece)


def _item(text: _Text, wrong: str) -> bool:
    """Pass one item; False where the file ends within it."""
    if text.next == b'"':
        return text.string()
    if text.next not in (b"{", b"["):
        _scalar(text, wrong)
        return True
    depth = 0
    while True:
        depth += 1 if text.next in (b"{", b"[") else -1
        text.take(1)
        if not depth:
            return True
        while text.skip(_WITHIN) == b'"':  # a string that goes on in the next piece
            text.string()
        if not text.next:
            return False


def _scalar(text: _Text, wrong: str) -> None:
    said = text.show()
    try:
        json.loads(text.passed(_SCALAR).decode("utf-8", "replace"), parse_int=str)  # an int of any length
    except ValueError as error:
        raise ValueError(f"{wrong}: {said!r}: {error}") from None
