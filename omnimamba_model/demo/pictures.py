"""samples.png and loss.png."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .digits import Scans
from .score import Drawings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN_ROWS = 3
"""Drawings of each digit shown, each row in another phrasing."""


def samples_figure(drawn: Drawings, scored: Scans, said: dict[str, list[str]]) -> Figure:
    """A grid, a column a digit: what was asked and drawn, real scans beside it, then questions about those scans."""
    from matplotlib.figure import Figure

    real = [torch.nonzero(scored.labels == digit)[:, 0].tolist() for digit in range(10)]
    figure = Figure(figsize=(15, 2.1 * (DRAWN_ROWS + 2)), dpi=80, layout="constrained")
    axes = figure.subplots(DRAWN_ROWS + 2, 10)
    for row in range(DRAWN_ROWS):
        for digit in range(10):
            place = _drawing(drawn, digit, row)
            if place is not None:
                _show(axes[row, digit], drawn.images[place], f"asked: {drawn.prompts[place]}")
    questions = list(said)
    for digit in range(10):
        _show(axes[-2, digit], scored.images[real[digit][0]], "real scan")
        question = questions[digit % len(questions)]
        scan = real[digit][1]
        _show(axes[-1, digit], scored.images[scan], f"real scan\n{question}\n> {said[question][scan]}")
    for ax in axes.flat:
        ax.axis("off")
    return figure


def _drawing(drawn: Drawings, digit: int, row: int) -> int | None:
    """The place of the ``row``-th drawing of a digit, or None where there are fewer."""
    places = torch.nonzero(drawn.digits == digit)[:, 0].tolist()
    return places[row] if row < len(places) else None


def _show(ax: Axes, image: Tensor, title: str) -> None:
    import textwrap

    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, 20)]
    ax.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_title("\n".join(lines), fontsize=8)


def loss_figure(history: dict[str, list[dict[str, float]]]) -> Figure:
    """Training losses over all steps, each phase on a ground of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    ax = figure.subplots()
    colours: dict[str, str] = {}
    start = 0
    for i, (phase, rows) in enumerate(history.items()):
        end = start + len(rows)
        ax.axvspan(start, end, color=str(0.84 + 0.04 * i), linewidth=0, label=phase)
        for lesson in rows[0]:
            label = None if lesson in colours else lesson
            colour = colours.setdefault(lesson, f"C{len(colours)}")
            ax.plot(range(start, end), _smooth(torch.tensor([row[lesson] for row in rows])), color=colour, label=label)
        start = end
    ax.set(xlabel="step", ylabel="cross-entropy, nats a token", xlim=(0, start), ylim=(0, None))
    ax.legend(loc="upper right")
    return figure


def _smooth(values: Tensor, width: int = 25) -> Tensor:
    """The mean of each value and those up to ``width`` before it."""
    total = torch.cat([torch.zeros(1), values.double().cumsum(0)])
    end = torch.arange(1, len(values) + 1)
    start = (end - width).clamp(min=0)
    return (total[end] - total[start]) / (end - start)
