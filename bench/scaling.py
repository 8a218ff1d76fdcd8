"""A scaling model: time and memory of a shape from counted bytes and FLOPs and measured rates, and how right it is.

    python -m bench.scaling [RESULT.json]        checked against a run, then extrapolated with an H200's data sheet
    python -m bench.scaling --flops 2.2e15 --bandwidth 8e12 --link 900e9 --gpus 1 8 72

A part (bench.counts) takes the longer of its FLOPs and its bytes over the rates of its kind; a shape takes the sum of
its parts. The rates come from the run itself: what single operations reached, and, of torch's attention, what its two
shortest cases did. These rows are not checked again; layers, prefill, decode and whole generations are.

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

from omnimamba_model import MambaConfig

from . import counts, results
from .claims import Claim
from .counts import FLOAT, Decoder, Part
from .integrated import positions
from .published import CACHED, OURS, UNCACHED
from .results import Row, length_of
from .tables import duration, table

MOST_ERROR = 0.20
SHORTEST = 4096
"""Up to here the peer's rows set its rates; beyond they are checked."""
SMALL = MambaConfig.preset("130m")
PEER = Decoder()


@dataclass
class Rates:
    """FLOP/s and byte/s by kind of part; a kind that is not named moves and computes at ``*``."""

    flops: dict[str, float]
    bytes: dict[str, float]

    def seconds(self, parts: list[Part]) -> float:
        return sum(
            max(p.flops / self.flops.get(p.kind, self.flops["*"]), p.bytes / self.bytes.get(p.kind, self.bytes["*"]))
            for p in parts
        )


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


def _median(rows: list[Row], field: str, group: str, case: str = "", who: str = "") -> float | None:
    mine = [r for r in rows if r.group == group and case in r.case and who in r.who and r.seconds]
    found = [getattr(r, field) for r in mine if not r.case.endswith(", bf16")]
    return statistics.median(v for v in found if v) if any(found) else None


def measured_rates(content: dict[str, Any], training: bool = False) -> Rates:
    """Ours: what the single operations of the run reached; the machine's own rates where an operation is missing."""
    rows, sampled = content["rows"], {kind: r["median"] for kind, r in content["rates"].items()}
    group = "ssd_scan forward" + (" + backward" if training else "")
    own = [r for r in rows if r.times_ours == 1.0]
    flops = {
        "product": _median(own, "gflop_s", "lora_linear", "512 x 2048 to 8512, fp32 weights"),
        "scan": _median(own, "gflop_s", group, f"{SMALL.nheads} heads"),
    }
    streams = [_median(own, "gb_s", f"{op} {'backward' if training else 'forward'}") for op in STREAMS]
    found = {"weights": _median(own, "gb_s", "lora_linear", "1 x 2048 to 8512, bf16 weights")}
    found["stream"] = statistics.mean(s for s in streams if s) if any(streams) else None
    copied = next((sampled[kind] for kind in ("far copy", "copy", "read") if kind in sampled), math.inf)
    return Rates(
        {"*": sampled["sgemm"], **{kind: 1e9 * rate for kind, rate in flops.items() if rate}},
        {"*": copied, **{kind: 1e9 * rate for kind, rate in found.items() if rate}},
    )


def attention_rate(content: dict[str, Any], training: bool) -> Rates:
    """torch's attention layer: what it reached up to SHORTEST, products and scores alike."""
    group = "layer forward" + (" + backward" if training else "")
    short = [r for r in _timed(content, group, "attention") if length_of(r.case) <= SHORTEST]
    times = {r.case: r.seconds for r in short}
    return _flat(content, [sum(p.flops for p in _layer(r, training)) / times[r.case] for r in short])


def uncached_rate(content: dict[str, Any]) -> Rates:
    """torch's Transformer without a cache: what it reached in its shortest generation."""
    short = sorted(_timed(content, "whole generation", UNCACHED), key=lambda r: length_of(r.case))[:1]
    return _flat(content, [1e9 * r.gflop_s for r in short])


def _flat(content: dict[str, Any], reached: list[float]) -> Rates:
    rates = measured_rates(content)
    return Rates({"*": statistics.median(reached) if reached else rates.flops["*"]}, rates.bytes)


def cached_rate(content: dict[str, Any], size: int = FLOAT) -> Rates:
    """torch's step with a cache: weights and cache at the rates that solve its two shortest steps in numbers of
    ``size`` bytes."""
    timed = [r for r in _timed(content, "generation", CACHED) if _size(r) == size]
    steps = sorted(timed, key=lambda r: length_of(r.case))[:2]
    rates = measured_rates(content)
    if len(steps) < 2:
        return rates
    a, b = (length_of(r.case) for r in steps)
    first, second = (1 / r.tokens_s for r in steps)
    each = max((second - first) / (b - a), 1e-9)  # of one token in the cache
    weights = counts.decoder_step(PEER, 1, 0, size)[0].bytes
    rates.bytes |= {"cache": counts.cache_bytes(PEER, 1, size) / each, "weights": weights / max(first - a * each, 1e-9)}
    return rates


def _timed(content: dict[str, Any], group: str, who: str) -> list[Row]:
    return [r for r in content["rows"] if (r.group, r.who) == (group, who) and r.seconds]


def _layer(row: Row, training: bool) -> list[Part]:
    """The layer that a row timed, of width 768."""
    l = length_of(row.case)
    parts = counts.mamba_layer(SMALL, 1, l) if row.who == "Mamba-2" else counts.attention_layer(SMALL.d_model, 1, l)
    return counts.backward_too(parts) if training else parts


def _size(row: Row) -> int:
    return 4 if "float32" in row.note or "fp32" in row.case else 2


def checked(content: dict[str, Any]) -> list[Checked]:
    """Every row of a layer or a model that the rates were not taken from, with what the model says of its time."""
    found = []
    for training in (False, True):
        group, ours = "layer forward" + (" + backward" if training else ""), measured_rates(content, training)
        found += [Checked(r, ours.seconds(_layer(r, training)), r.seconds) for r in _timed(content, group, "Mamba-2")]
        theirs, long = attention_rate(content, training), _timed(content, group, "attention")
        found += [
            Checked(r, theirs.seconds(_layer(r, training)), r.seconds) for r in long if length_of(r.case) > SHORTEST
        ]
    ours = measured_rates(content)
    for r in content["rows"]:
        if r.seconds and r.times_ours == 1.0 and r.group == "130M prefill":
            found.append(Checked(r, ours.seconds(counts.mamba_pass(SMALL, 1, length_of(r.case))), r.seconds))
        if r.seconds and r.tokens_s and r.times_ours == 1.0 and r.group in ("generation", "130M decode"):
            if "int8" not in r.case:
                found.append(Checked(r, ours.seconds(counts.mamba_step(SMALL, 1, _size(r))), 1 / r.tokens_s))
    return found + _generations(content)


def _generations(content: dict[str, Any]) -> list[Checked]:
    found, cached, uncached = [], {size: cached_rate(content, size) for size in (2, FLOAT)}, uncached_rate(content)
    for r in _timed(content, "whole generation", OURS):
        one = measured_rates(content).seconds(counts.mamba_step(SMALL, 1, _size(r)))
        found.append(Checked(r, length_of(r.case) * one, r.seconds))
    for r in _timed(content, "generation", CACHED):
        if length_of(r.case) > SHORTEST:
            step = counts.decoder_step(PEER, 1, length_of(r.case), _size(r))
            found.append(Checked(r, cached[_size(r)].seconds(step), 1 / r.tokens_s))
    for r in _timed(content, "whole generation", CACHED):
        step = counts.decoder_step(PEER, 1, length_of(r.case) / 2, _size(r))
        found.append(Checked(r, length_of(r.case) * cached[_size(r)].seconds(step), r.seconds))
    for r in sorted(_timed(content, "whole generation", UNCACHED), key=lambda r: length_of(r.case))[1:]:
        passes = [(steps, counts.decoder_pass(PEER, 1, at + 1, _size(r))) for at, steps in positions(length_of(r.case))]
        found.append(Checked(r, sum(steps * uncached.seconds(parts) for steps, parts in passes), r.seconds))
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
    return statistics.median(c.error for c in found) if found else None


def claim(content: dict[str, Any]) -> Claim:
    """How right the model is of a run; not judged where that measured too little of what the model is made of."""
    found = Claim(
        "scaling model against measurement, median error of time", f"under {MOST_ERROR:.0%}", "not measured", None
    )
    try:
        error = median_error(checked(content))
    except (KeyError, ZeroDivisionError):  # no rates, or none of a kind
        error = None
    if error is not None:
        found.measured, found.passed = f"{error:.1%}", error < MOST_ERROR
    return found


@dataclass(frozen=True)
class Cluster:
    """Chips of one kind and the link between neighbours; the default is a data sheet's H200 with NVLink."""

    flops: float = 989e12
    bandwidth: float = 4.8e12
    link: float = 450e9
    latency: float = 5e-6
    share: float = 0.6
    """Of ``flops`` and ``bandwidth`` that is reached: an assumption, to be replaced by what a chip shows."""

    @property
    def rates(self) -> Rates:
        return Rates({"*": self.share * self.flops}, {"*": self.share * self.bandwidth})


def prefill(config: MambaConfig, l: int, gpus: int, split: str, on: Cluster) -> tuple[float, float]:
    """Seconds, and bytes on each chip, of taking in l tokens in 16 bits, batch 1, split over ``gpus``.

    sequence: each chip has l / gpus tokens; in a layer it gets the scan states of all others and the halo of d_conv - 1
    rows before its own. tensor: each has heads / gpus; a layer adds its outputs up in a ring. The bytes are of one
    pass over all tokens at once: what no chip holds must come in segments, which costs Mamba-2 nothing but launches.
    """
    _check_split(config, l, gpus, split)
    size, layers = 2, config.n_layer
    tokens = -(-l // gpus) if split == "sequence" else l
    inside = layers * on.rates.seconds(counts.mamba_layer(config, 1, tokens, size))
    between = (
        on.rates.seconds(counts.mamba_pass(config, 1, tokens, size)) - inside
    )  # what each chip of a tensor split has
    alone = between + inside / (1 if split == "sequence" else gpus)
    state = counts.state_bytes(config) / layers
    sent = _exchange(config, l, gpus, split, state, on) if gpus > 1 else 0.0
    weights = size * counts.weight_count(config) / (1 if split == "sequence" else gpus)
    each = config.in_proj_dim + config.conv_dim + config.d_inner
    held = tokens * (config.d_model * (counts.FLOAT + size) + size * each / (1 if split == "sequence" else gpus))
    return alone + layers * sent, weights + held + layers * state


def _exchange(config: MambaConfig, l: int, gpus: int, split: str, state: float, on: Cluster) -> float:
    """Seconds that a layer's chips wait for one another."""
    if split == "sequence":
        return (gpus - 1) * (on.latency + state / on.link) + on.latency
    moved = 2 * (gpus - 1) / gpus * 2 * l * config.d_model
    return 2 * (gpus - 1) * on.latency + moved / on.link


def attention_prefill(of: Decoder, l: int, gpus: int, on: Cluster) -> tuple[float, float]:
    """The same of a Transformer, keys and values going round a ring behind the computation (sequence split)."""
    tokens = -(-l // gpus)
    whole = on.rates.seconds(counts.decoder_pass(of, 1, l, 2)) / gpus
    ring = of.layers * (gpus - 1) * (on.latency + 2 * 2 * tokens * of.width / on.link)
    weights = 2 * (of.layers * of.matrices + of.width * of.vocab)
    held = tokens * (of.width * (counts.FLOAT + 2 + 3 * 2) + 2 * of.hidden) + counts.cache_bytes(of, tokens, 2)
    return max(whole, ring), weights + held


def _check_split(config: MambaConfig, l: int, gpus: int, split: str) -> None:
    if split not in ("sequence", "tensor"):
        raise ValueError(f"split: got {split!r}, expected 'sequence' or 'tensor'")
    if split == "tensor" and config.nheads % gpus:
        raise ValueError(f"a tensor split needs a divisor of the {config.nheads} heads, got {gpus} chips")
    if gpus < 1 or l < gpus:
        raise ValueError(f"got {l} tokens and {gpus} chips, expected at least one token a chip")


LENGTHS = tuple(2**k for k in (12, 14, 17, 20, 22, 24))
LARGE, LARGE_PEER = MambaConfig(), Decoder(width=2048, layers=24, hidden=8192)
"""1.3B each."""


def extrapolated(gpus: list[int], on: Cluster) -> str:
    """Time and memory of a prefill of the 1.3B shape, up to 16M tokens, on one chip and on many."""
    lines = []
    for l in LENGTHS:
        for count in gpus:
            cells = [prefill(LARGE, l, count, split, on) for split in ("sequence", "tensor")[: 1 if count == 1 else 2]]
            cells += [cells[0]] * (count == 1)
            cells.append(attention_prefill(LARGE_PEER, l, count, on))
            shown = [f"{duration(t)}, {held / 1e9:.1f} GB" for t, held in cells]
            lines.append([f"{l:,}", str(count), *shown, f"{cells[2][0] / min(cells[0][0], cells[1][0]):.3g}x"])
    header = ["tokens", "chips", "Mamba-2, sequence split", "tensor split", "Transformer, ring", "its time over ours"]
    return table(header, lines)


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


def summary(content: dict[str, Any], gpus: tuple[int, ...] = (1, 8, 64), on: Cluster | None = None) -> str:
    """The check, its median errors, and what the model predicts of many chips; empty where nothing can be checked."""
    if "sgemm" not in content["rates"]:  # a GPU's run: the model is made of a CPU's rows
        return ""
    times, memory, on = median_error(checked(content)), median_error(checked_memory(content)), on or Cluster()
    if times is None:
        return ""
    held = "" if memory is None else f", of memory {memory:.1%}"
    return "\n\n".join(
        [
            report(content),
            f"Median error of time {times:.1%}{held}; {MOST_ERROR:.0%} allowed.",
            f"PREDICTION, not measured: prefill of 1.3B in 16 bits, batch 1, on chips of {on.flops / 1e12:g} TFLOP/s "
            f"and {on.bandwidth / 1e12:g} TB/s, {on.share:.0%} of it reached (assumed), links of "
            f"{on.link / 1e9:g} GB/s and {on.latency * 1e6:g} us:",
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
    path, content = results.chosen(parser, options.result)
    shown = summary(content, options.gpus, Cluster(*(getattr(options, name) for name in vars(Cluster()))))
    if not shown:
        parser.error(f"{path} has no row of a layer or a model to check")
    print(shown)
    return int(not median_error(checked(content)) < MOST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
