"""What every benchmark asks, and how its files are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Scores = dict[str, Any]
"""Figures by name, nested by part; percentages where nothing else is said."""


@dataclass(frozen=True)
class Question:
    """``key`` is its own alone. ``truth``: the answers that people gave, empty where they are kept secret."""

    key: str
    image: Path
    text: str
    truth: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        """TypeError where a file had something else than texts."""
        for text in (self.key, self.text, *self.truth, self.group):
            if not isinstance(text, str):
                raise TypeError(f"question, answers and kind must be texts, got {text!r}")


Pairs = Sequence[tuple[Question, str | None]]
"""Questions and what the model said; None is no answer, which is a wrong one, whatever is asked."""


@dataclass(frozen=True)
class Benchmark:
    """``read`` takes the benchmark's files, its folder of images, and its file of answers where that is one of its own.

    ``ending`` is what is put behind every question by default.
    """

    read: Callable[[Sequence[Path], Path, Path | None], list[Question]]
    score: Callable[[Pairs], Scores]
    ending: str = "\nAnswer the question using a single word or phrase."


def read_json(path: Path) -> Any:
    """ValueError where the file holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON: {error}") from error


def read_text(path: Path) -> str:
    """ValueError where the file is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def share(right: int, of: int) -> float:
    """Percent; 0 of nothing."""
    return 100 * right / of if of else 0.0
