"""A scaling model: time and memory of a shape from counted bytes and FLOPs and measured rates, and how right it is.

    python -m bench.scaling [RESULT.json]        checked against a run, then extrapolated with an H200's data sheet
    python -m bench.scaling --flops 2.2e15 --bandwidth 8e12 --link 900e9 --gpus 1 8 72

A part (bench.counts) takes the longer of its FLOPs and its bytes over the rates of its kind; a shape takes the sum of
its parts. The rates come from the run itself: what single operations reached, and, of torch's attention, what its
shortest cases did. These rows are not checked again; layers, prefill, decode and whole generations are.
A machine that others use too is not equally fast all the time. So every row has the machine's own rate around it: an
operation's rate is brought to the run's median machine by it, and a prediction to the moment of the row it is for.

Everything beyond a measured length or on another machine is a prediction, and is labelled so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omnimamba_model import MambaConfig

from . import counts, results
from .chips import LARGE, Cluster, Rates, extrapolated, prefill
from .claims import Claim
from .counts import FLOAT, Decoder, Part
from .integrated import positions
from .published import CACHED, OURS, UNCACHED
from .results import Row, length_of
from .tables import duration, table

MOST_ERROR = 0.20
SHORTEST = 4096
"""Up to here the peer's rows set its rates; beyond they are checked."""
PRODUCT_ROWS = 1024
SMALL = MambaConfig.preset("130m")
PEER = Decoder()


@dataclass
class Checked:
    """A measured row and what the model says of it."""

    row: Row
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)


STREAMS = ("causal_conv1d", "gated_norm")
STEADY = ("sgemm", "read")
"""Rates that tell how fast the machine is: a copy's depends on its size, a 16-bit product's on what a cache holds."""


def moment(row: Row, content: dict[str, Any]) -> float:
    """How fast the machine was around the row, of what it was in the median of the run; 1 where that is not known."""
    known = content["rates"].get(row.floor) if row.rate and row.floor in STEADY else None
    return row.rate / known["median"] if known else 1.0


def _median(content: dict[str, Any], field: str, group: str, case: str = "") -> float | None:
    """Of our rows in fp32 activations, on the run's median machine."""
    mine = [r for r in content["rows"] if r.group == group and case in r.case and r.seconds and r.times_ours == 1.0]
    found = [getattr(r, field) / moment(r, content) for r in mine if getattr(r, field) and not r.narrow]
    return statistics.median(found) if found else None


def _product(content: dict[str, Any]) -> float | None:
    """GFLOP/s of a layer's two products at a few rows; of a larger one where a run has not both."""
    shapes = ((SMALL.d_model, SMALL.in_proj_dim), (SMALL.d_inner, SMALL.d_model))
    reached = [_median(content, "gflop_s", "lora_linear", f"{PRODUCT_ROWS} x {a} to {b}, fp32") for a, b in shapes]
    if not all(reached):
        return _median(content, "gflop_s", "lora_linear", "512 x 2048 to 8512, fp32 weights")
    sizes = [a * b for a, b in shapes]
    return sum(sizes) / sum(size / rate for size, rate in zip(sizes, reached, strict=True))


def measured_rates(content: dict[str, Any], training: bool = False) -> Rates:
    """Ours: what the single operations of the run reached; the machine's own rates where an operation is missing."""
    sampled = {kind: r["median"] for kind, r in content["rates"].items()}
    group = "ssd_scan forward" + (" + backward" if training else "")
    flops = {"product": _product(content), "scan": _median(content, "gflop_s", group, f"{SMALL.nheads} heads")}
    streams = [_median(content, "gb_s", f"{op} {'backward' if training else 'forward'}") for op in STREAMS]
    found = {"weights": _median(content, "gb_s", "lora_linear", "1 x 2048 to 8512, bf16 weights")}
    found["stream"] = statistics.mean(s for s in streams if s) if any(streams) else None
    found["fresh"] = sampled.get("fresh", math.inf) / 1e9
    copied = next((sampled[kind] for kind in ("far copy", "copy", "read") if kind in sampled), math.inf)
    return Rates(
        {"*": sampled["sgemm"], **{kind: 1e9 * rate for kind, rate in flops.items() if rate}},
        {"*": copied, **{kind: 1e9 * rate for kind, rate in found.items() if rate}},
    )


def attention_rate(content: dict[str, Any], training: bool) -> Rates:
    """torch's attention layer: what it reached up to SHORTEST, products and scores alike."""
    group = "layer forward" + (" + backward" if training else "")
    short = [r for r in _timed(content, group, "attention") if length_of(r.case) <= SHORTEST]
    return _flat(content, [sum(p.flops for p in _layer(r, training)) / r.seconds / moment(r, content) for r in short])


def uncached_rate(content: dict[str, Any], size: int = FLOAT) -> Rates:
    """torch's Transformer without a cache: what it reached in its shortest generation in numbers of ``size`` bytes."""
    return _flat(content, [1e9 * r.gflop_s / moment(r, content) for r in _uncached(content, size)[:1]])


def _uncached(content: dict[str, Any], size: int) -> list[Row]:
    timed = [r for r in _timed(content, "whole generation", UNCACHED) if _size(r) == size]
    return sorted(timed, key=lambda r: length_of(r.case))


def _flat(content: dict[str, Any], reached: list[float]) -> Rates:
    rates = measured_rates(content)
    return Rates({"*": statistics.median(reached) if reached else rates.flops["*"]}, rates.bytes)


def cached_rate(content: dict[str, Any], size: int = FLOAT) -> Rates:
    """torch's step with a cache: weights and cache at the rates that fit its short steps in numbers of ``size`` bytes
    best, in relative error."""
    rates, steps = measured_rates(content), solved(content, size)
    if not steps:
        return rates
    times = np.array([moment(r, content) / r.tokens_s for r in steps])
    lines = np.array([[1.0, _context(r)] for r in steps]) / times[:, None]
    (none, each), *_ = np.linalg.lstsq(lines, np.ones(len(steps)), rcond=None)  # no cache, and one token in it
    weights = counts.decoder_step(PEER, 1, 0, size)[0].bytes
    rates.bytes |= {"cache": counts.cache_bytes(PEER, 1, size) / max(each, 1e-9), "weights": weights / max(none, 1e-9)}
    return rates


APART = 3
"""The longest cache that a step's rates are taken from is at least so many times the shortest."""


def solved(content: dict[str, Any], size: int) -> list[Row]:
    """The rows that ``cached_rate`` rests on: steps and whole generations up to SHORTEST, and the next one where these
    are not APART; none where that does not help. A Transformer takes the dtype that it is faster in, so that a run need
    not have two of both."""
    timed = [r for group in ("generation", "whole generation") for r in _timed(content, group, CACHED) if r.tokens_s]
    timed = sorted((r for r in timed if _size(r) == size), key=lambda r: (_context(r), r.group))
    apart = [r for r in timed if _context(r) >= APART * _context(timed[0])]
    if not apart:
        return []
    most = max(SHORTEST, _context(apart[0]))
    return [r for r in timed if _context(r) <= SHORTEST or (_context(r) <= most and r is apart[0])]


def _context(row: Row) -> float:
    """Tokens in the cache, of a whole generation on average."""
    return length_of(row.case) / (2 if row.group == "whole generation" else 1)


def _timed(content: dict[str, Any], group: str, who: str) -> list[Row]:
    return [r for r in content["rows"] if (r.group, r.who) == (group, who) and r.seconds]


def _layer(row: Row, training: bool) -> list[Part]:
    """The layer that a row timed, of width 768."""
    l = length_of(row.case)
    if row.who == "Mamba-2":
        parts = [*counts.mamba_layer(SMALL, 1, l), counts.fresh_memory(SMALL, l)]
    else:
        parts = counts.attention_layer(SMALL.d_model, 1, l)
    return counts.backward_too(parts) if training else parts


def _size(row: Row) -> int:
    return 4 if "float32" in row.note or "fp32" in row.case else 2


def checked(content: dict[str, Any]) -> list[Checked]:
    """Every row of a layer or a model that the rates were not taken from, with what the model says of its time."""
    found = []

    def check(row: Row, rates: Rates, parts: list[Part], measured: float, times: float = 1.0) -> None:
        found.append(Checked(row, times * rates.seconds(parts) / moment(row, content), measured))

    for training in (False, True):
        group, ours = "layer forward" + (" + backward" if training else ""), measured_rates(content, training)
        for r in _timed(content, group, "Mamba-2"):
            check(r, ours, _layer(r, training), r.seconds)
        theirs = attention_rate(content, training)
        for r in _timed(content, group, "attention"):
            if length_of(r.case) > SHORTEST:
                check(r, theirs, _layer(r, training), r.seconds)
    ours = measured_rates(content)
    for r in content["rows"]:
        if r.seconds and r.times_ours == 1.0 and r.group == "130M prefill":
            fresh = SMALL.n_layer * [counts.fresh_memory(SMALL, length_of(r.case))]
            check(r, ours, counts.mamba_pass(SMALL, 1, length_of(r.case)) + fresh, r.seconds)
        if r.seconds and r.tokens_s and r.times_ours == 1.0 and r.group in ("generation", "130M decode"):
            if "int8" not in r.case:
                check(r, ours, counts.mamba_step(SMALL, 1, _size(r)), 1 / r.tokens_s)
    for r in _timed(content, "whole generation", OURS):
        check(r, ours, counts.mamba_step(SMALL, 1, _size(r)), r.seconds, length_of(r.case))
    return found + _of_transformers(content)


def _of_transformers(content: dict[str, Any]) -> list[Checked]:
    """Their generations in each dtype that rates are known in."""
    found = []
    for size in (2, FLOAT):
        known, cached = solved(content, size), cached_rate(content, size)
        for r in [r for g in ("generation", "whole generation") for r in _timed(content, g, CACHED) if known]:
            if _size(r) == size and r not in known:
                one = cached.seconds(counts.decoder_step(PEER, 1, _context(r), size)) / moment(r, content)
                whole = r.group == "whole generation"
                times, measured = (length_of(r.case), r.seconds) if whole else (1, 1 / r.tokens_s)
                found.append(Checked(r, times * one, measured))
        uncached = uncached_rate(content, size)
        for r in _uncached(content, size)[1:]:
            passes = [(n, counts.decoder_pass(PEER, 1, at + 1, size)) for at, n in positions(length_of(r.case))]
            seconds = sum(n * uncached.seconds(parts) for n, parts in passes)
            found.append(Checked(r, seconds / moment(r, content), r.seconds))
    return found


def checked_memory(content: dict[str, Any]) -> list[Checked]:
    """Peak memory of generation against weights and state or cache."""
    found = []
    for r in content["rows"]:
        held = None
        if r.peak_bytes and r.group in ("generation", "whole generation", "memory"):
            if r.who == OURS:
                held = _size(r) * counts.weight_count(SMALL) + counts.state_bytes(SMALL)
            elif r.who == CACHED:
                held = counts.decoder_step(PEER, 1, 0, _size(r))[0].bytes
                held += counts.cache_bytes(PEER, length_of(r.case), _size(r))
        if held:
            found.append(Checked(r, held, r.peak_bytes))
    return found


def median_error(found: list[Checked]) -> float | None:
    return float(statistics.median(c.error for c in found)) if found else None


def claim(content: dict[str, Any]) -> Claim:
    """How right the model is of a run; not judged where that measured too little of what the model is made of."""
    found = Claim(
        "scaling model against measurement, median error of time", f"under {MOST_ERROR:.0%}", "not measured", None
    )
    try:
        error = median_error(checked(content))
    except (KeyError, ValueError, ZeroDivisionError):  # no rates, or none of a kind
        error = None
    if error is not None:
        found.measured, found.passed = f"{error:.1%}", error < MOST_ERROR
    return found


def report(content: dict[str, Any]) -> str:
    """Each checked row, the time's and the memory's; empty where the run has none."""
    lines = [
        [
            c.row.group,
            c.row.case,
            c.row.who,
            show(c.predicted),
            show(c.measured),
            f"{c.predicted / c.measured - 1:+.0%}",
        ]
        for found, show in ((checked(content), duration), (checked_memory(content), lambda v: f"{v / 2**20:.0f} MiB"))
        for c in found
    ]
    return table(["what", "case", "by", "model", "measured", "off by"], lines) if lines else ""


def _labelled(on: Cluster, known: str) -> str:
    return (
        f"PREDICTION, not measured: prefill of 1.3B in 16 bits, batch 1, on chips of {on.flops / 1e12:.3g} TFLOP/s "
        f"and {on.bandwidth / 1e12:.3g} TB/s, {on.share:.0%} of it reached ({known}), links of "
        f"{on.link / 1e9:g} GB/s and {on.latency * 1e6:g} us:"
    )


def measured_chip(content: dict[str, Any]) -> Cluster | None:
    """The GPU of a run: its matrix and copy rates, and the share of them that our layers and models reached."""
    flops, bandwidth = (content["rates"].get(f"gpu {kind}", {}).get("median") for kind in ("matmul", "copy"))
    groups = ("decode", "whole generation", "layer forward")
    shares = [r.floor_share for r in content["rows"] if r.group in groups and r.times_ours == 1.0 and r.floor_share]
    if not (flops and bandwidth and shares):
        return None
    return Cluster(flops=flops, bandwidth=bandwidth, share=min(1.0, statistics.median(shares)))


def checked_on(chip: Cluster, content: dict[str, Any]) -> list[Checked]:
    """A GPU's prefills of the 1.3B shape, from which the chip's share was not taken."""
    rows = [r for r in content["rows"] if r.group == "prefill" and r.case.startswith("1.3B") and r.seconds]
    return [
        Checked(r, prefill(LARGE, int(r.case.split()[-2]), 1, "sequence", chip)[0], r.seconds)
        for r in rows
        if r.times_ours == 1.0
    ]


def summary(content: dict[str, Any], gpus: tuple[int, ...] = (1, 8, 64), on: Cluster | None = None) -> str:
    """The check, its median errors, and what the model predicts of many chips; empty where nothing can be checked.

    A GPU's run gives the chip that is predicted from, and its prefills are what that is checked against."""
    if "sgemm" not in content["rates"]:
        chip = on or measured_chip(content)
        known = "assumed" if on else "measured in this run"
        if not chip:
            return ""
        found = checked_on(chip, content)
        errors = ", ".join(f"{c.row.case} {c.predicted / c.measured - 1:+.0%}" for c in found)
        held = (
            [f"Prefill, model against measurement: {errors}; median error {median_error(found):.1%}."] if found else []
        )
        return "\n\n".join([*held, _labelled(chip, known), extrapolated(list(gpus), chip)])
    times, memory, on = median_error(checked(content)), median_error(checked_memory(content)), on or Cluster()
    if times is None:
        return ""
    held = "" if memory is None else f", of memory {memory:.1%}"
    return "\n\n".join(
        [
            report(content),
            f"Median error of time {times:.1%}{held}; {MOST_ERROR:.0%} allowed.",
            _labelled(on, "assumed"),
            extrapolated(list(gpus), on),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="a result file (default: the latest whole run)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of chips")
    for name, value in vars(Cluster()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"of a chip or link (default: {value:g})")
    options = parser.parse_args(arguments)
    path, content = results.chosen(parser, options.result, "rates")
    try:
        given = Cluster(*(getattr(options, name) for name in vars(Cluster())))
    except ValueError as error:
        parser.error(f"--{error}")
    if min(options.gpus) < 1:
        parser.error(f"--gpus: got {min(options.gpus)}, expected 1 or more")
    shown = summary(content, options.gpus, None if given == Cluster() else given)
    if not shown:
        parser.error(f"{path} has no row of a layer or a model to check")
    print(shown)
    if "sgemm" not in content["rates"]:
        return 0
    return int(not median_error(checked(content)) < MOST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
