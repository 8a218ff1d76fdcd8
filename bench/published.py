"""The paper's own figures (arXiv 2503.08686), and ours beside them in both protocols.

The paper's are of a 1.3B model on one RTX 4090 in fp16. The claims are those of its text; the curves are read off its
Figure 1, good to 1 to 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from .results import Row, find, ratio_text

FIGURE_1 = {
    4096: {"OmniMamba": (16.5, 8.50), "JanusFlow": (80, 5.16), "Show-o": (342, 7.10)},
    8192: {"OmniMamba": (33.0, 8.49), "JanusFlow": (155, 5.91), "Show-o": (1540, 7.56)},
    16384: {"OmniMamba": (66.3, 8.49), "JanusFlow": (268, 7.46), "Show-o": (8000, 11.86)},
    32768: {"OmniMamba": (134, 8.50), "JanusFlow": (651, 10.55)},
    65536: {"OmniMamba": (265, 10.58), "JanusFlow": (1998, 16.66)},
    102400: {"OmniMamba": (412, 13.81), "JanusFlow": (4230, 23.08)},
    131072: {"OmniMamba": (529, 16.65)},
}
"""Seconds and GB by tokens generated, batch 1. JanusFlow keeps a key-value cache, Show-o's text decoding does not."""
FASTER, LEANER = 119.2, 0.630
"""Against Show-o: times as fast at 16K tokens; less memory at 23K."""
AT_ONCE = 16
TABLE_3 = {"OmniMamba": 5.68, "JanusFlow": 1.02, "Show-o": 0.81}
"""Images a second, so many at once."""
OURS, CACHED, UNCACHED = "Mamba-2 130M", "Transformer 129M, KV cache", "Transformer 129M, no cache"
WHOLE, MEMORY_GROUP = "whole generation", "memory"
MEMORY_AT = 23 * 1024
"""Tokens at which the paper states its memory."""


def whole_case(total: int) -> str:
    return f"{total} tokens in all"


SPEED_CASE, MEMORY_CASE = whole_case(16384), f"generation at {MEMORY_AT} tokens"


@dataclass(frozen=True)
class Names:
    """Who generates: ours, a Transformer of the same size with a key-value cache, and one without."""

    ours: str
    cached: str
    uncached: str

    def __iter__(self):
        return iter((self.ours, self.cached, self.uncached))


def named(size: str) -> Names:
    """As a GPU's rows name them."""
    return Names(f"Mamba-2 {size}", f"Transformer {size}, KV cache", f"Transformer {size}, no cache")


SIZES = ("1.3B", "tiny")
"""On a GPU, and where its rows are tried without one."""


def names(rows: list[Row]) -> Names:
    """Those that a run has."""
    there = {row.who for row in rows}
    found = (named(size) for size in SIZES)
    return next((who for who in found if who.ours in there), Names(OURS, CACHED, UNCACHED))


def at_once_case(size: str) -> str:
    return f"{size}: draws {AT_ONCE} images of 256 tokens at once"


def gpu_images_case(size: str, tokens: int) -> str:
    return f"{size}, {AT_ONCE} images of {tokens} tokens at once"


@dataclass
class Published:
    """One figure of the paper; None where the run has not what it takes."""

    what: str
    claimed: str
    without_cache: str | None
    with_cache: str | None


def speed_ratio(rows: list[Row], peer: str) -> float | None:
    """How many times as long as ours the peer takes for 16K tokens."""
    row = find(rows, WHOLE, SPEED_CASE, peer)
    return row.times_ours if row and row.seconds else None


def memory_share(rows: list[Row], peer: str) -> float | None:
    """Our peak memory at 23K tokens over the peer's."""
    mine, theirs = (find(rows, MEMORY_GROUP, MEMORY_CASE, who) for who in (names(rows).ours, peer))
    if not (mine and theirs and mine.peak_bytes and theirs.peak_bytes):
        return None
    return mine.peak_bytes / theirs.peak_bytes


def beside(rows: list[Row]) -> list[Published]:
    """Each figure of the paper with ours, empty where none of ours was measured."""
    _, cached, uncached = names(rows)
    speed = [r and ratio_text(r) for r in (speed_ratio(rows, uncached), speed_ratio(rows, cached))]
    memory = [s and f"{1 - s:.1%} less" for s in (memory_share(rows, uncached), memory_share(rows, cached))]
    found = [
        Published("text generation at 16K tokens, against a Transformer", f"{FASTER}x", *speed),
        Published("memory at 23K tokens, against a Transformer", f"{LEANER:.1%} less", *memory),
    ]
    return found if any(p.without_cache or p.with_cache for p in found) else []


def drawing_at_once(rows: list[Row]) -> Row | None:
    """The fastest of ours that draws AT_ONCE images at once, in the 1.3B shape."""
    cases = (at_once_case("1.3B"), gpu_images_case("1.3B", 256))
    return min((row for row in rows if row.case in cases and row.seconds), key=lambda row: row.seconds, default=None)
