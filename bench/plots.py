"""Plots of a run: time and memory against length, the roofline, ratios to peers. matplotlib is needed to draw."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from omnimamba_kernels.backends import NAMES
from omnimamba_model import MambaConfig

from . import claims, counts, published
from .published import OURS
from .results import Row, length_of, ratio_text
from .scaling import SMALL
from .tables import Content, cold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]
TOPS = {"gpu matmul": "bf16", "sgemm": "fp32"}
"""The rate of products that a run's roofline has."""
FLOPS_A_BYTE = {"causal_conv1d forward": 8 / 8, "gated_norm forward": 8 / 12, "state_update": 5 / 8}
"""Of fp32 elementwise operations: additions and multiplications an element over its bytes, counted by hand."""


def curves(rows: list[Row], group: str, field: str) -> dict[str, Curve]:
    """(length, value) by contender, sorted; contenders with two points at least."""
    found: dict[str, Curve] = {}
    for row in rows:
        if row.group == group and getattr(row, field):
            found.setdefault(row.who, []).append((length_of(row.case), getattr(row, field)))
    return {who: sorted(points) for who, points in found.items() if len(points) > 1}


def slope(curve: Curve) -> float:
    """The exponent of the longer half of a curve."""
    half = min(len(curve) // 2, len(curve) - 2)
    return claims.growth_exponent(*map(list, zip(*curve[half:], strict=True)))


def roofline_points(rows: list[Row]) -> list[tuple[str, str, float, float]]:
    """(operation, contender, FLOPs a byte, FLOP/s) of every row whose FLOPs and bytes are known."""
    found = []
    for row in rows:
        intensity, reached = _intensity(row), None
        if intensity and row.seconds:
            reached = 1e9 * (row.gflop_s or (row.gb_s or 0) * intensity)
        if reached:
            found.append((f"{row.group}, {row.case}", row.who, intensity, reached))
    return found


def _intensity(row: Row) -> float | None:
    if row.first_call is not None:  # a GPU's row knows both
        return row.gflop_s / row.gb_s if row.gflop_s and row.gb_s else None
    if row.group in FLOPS_A_BYTE:
        return FLOPS_A_BYTE[row.group] * (2 if row.narrow and row.group != "state_update" else 1)
    if row.group == "ssd_scan forward":
        heads = int(re.search(r"(\d+) heads", row.case)[1])
        config = MambaConfig(d_model=heads * SMALL.headdim // SMALL.expand, n_layer=1)
        size = 2 if row.narrow else 4
        return _of([p for p in counts.mamba_layer(config, 1, length_of(row.case), size) if p.kind == "scan"])
    if row.group == "layer forward" and row.who == "Mamba-2":
        return _of(counts.mamba_layer(SMALL, 1, length_of(row.case)))
    if row.group == "layer forward":
        return _of(counts.attention_layer(SMALL.d_model, 1, length_of(row.case)))
    return row.gflop_s / row.gb_s if row.gflop_s and row.gb_s else None


def _of(parts: list[counts.Part]) -> float:
    return sum(p.flops for p in parts) / sum(p.bytes for p in parts)


def ratios(rows: list[Row]) -> list[tuple[str, float]]:
    """(what and against whom, its time over ours), the peers of every case; our own other back ends are none."""
    return [
        (f"{r.group}, {r.case}: {r.who}", r.times_ours)
        for r in rows
        if r.seconds and r.times_ours and r.times_ours != 1.0 and r.who not in (*NAMES, OURS) and not cold(r)
    ]


def figures(content: Content) -> dict[str, Figure]:
    """By name, every plot of which the run has the rows. ImportError where matplotlib is not installed."""
    rows = content["rows"]
    made = {
        "time": _against_length(
            {
                "one layer, forward": (curves(rows, "layer forward", "seconds"), {}),
                "one layer, training": (curves(rows, "layer forward + backward", "seconds"), {}),
                "generation, whole": (curves(rows, "whole generation", "seconds"), _paper(0)),
            },
            "seconds",
        ),
        "memory": _against_length({"generation": (_gigabytes(rows), _paper(1))}, "GB"),
        "roofline": _roofline(content),
        "ratios": _ratios(ratios(rows)),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _gigabytes(rows: list[Row]) -> dict[str, Curve]:
    found = curves(rows, "whole generation", "peak_bytes")
    return {who: [(length, peak / 1e9) for length, peak in curve] for who, curve in found.items()}


def _paper(column: int) -> dict[str, Curve]:
    """The curves of the paper's Figure 1: seconds or GB."""
    found: dict[str, Curve] = {}
    for length, models in published.FIGURE_1.items():
        for who, values in models.items():
            found.setdefault(f"paper: {who}", []).append((length, values[column]))
    return found


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _against_length(panels: dict[str, tuple[dict[str, Curve], dict[str, Curve]]], unit: str) -> Figure | None:
    """Log-log; each curve's label has the exponent of its longer half. The paper's are dashed."""
    panels = {title: both for title, both in panels.items() if both[0]}
    if not panels:
        return None
    figure, axes = _new(6 * len(panels), 4.5, len(panels))
    for ax, (title, (own, theirs)) in zip(axes, panels.items(), strict=True):
        for curves, style in ((own, "o-"), (theirs, "--")):
            for who, curve in curves.items():
                ax.plot(*zip(*curve, strict=True), style, label=f"{who}: length^{slope(curve):.2f}")
        ax.set(title=title, xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def _roofline(content: Content) -> Figure | None:
    points, rates = roofline_points(content["rows"]), {k: r["median"] for k, r in content["rates"].items()}
    top = next(((name, rates[kind]) for kind, name in TOPS.items() if kind in rates), None)
    if not points or top is None:
        return None
    figure, (ax,) = _new(9, 5.5)
    low, high = min(p[2] for p in points) / 2, max(p[2] for p in points) * 2
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    for kind, label in (("read", "DRAM read"), ("far copy", "DRAM copy"), ("gpu copy", "copy")):
        if kind in rates:
            roof = [min(top[1], rates[kind] * x) for x in xs]
            ax.plot(xs, roof, "k-" if kind == "read" else "k:", label=f"{top[0]} matmul and {label}")
    for who in dict.fromkeys(p[1] for p in points):
        mine = [p for p in points if p[1] == who]
        ax.plot([p[2] for p in mine], [p[3] for p in mine], "o", alpha=0.7, label=who)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s", title="roofline: rates of this run")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return figure


def _ratios(found: list[tuple[str, float]]) -> Figure | None:
    if not found:
        return None
    figure, (ax,) = _new(11, 1 + 0.22 * len(found))
    names, values = zip(*found, strict=True)
    places = range(len(found))
    ax.barh(places, [v - 1 for v in values], left=1, color=["C0" if v >= 1 else "C3" for v in values])
    ax.set_yticks(places, names, fontsize=7)
    ax.set(xscale="log", xlabel="its time over ours: right of 1 we are faster", ylim=(-1, len(found)))
    ax.invert_yaxis()
    ax.axvline(1, color="k", linewidth=0.8)
    for place, value in zip(places, values, strict=True):
        ax.text(max(value, 1.0), place, f" {ratio_text(value)}", va="center", fontsize=7)
    return figure
