"""What narrower weights cost in accuracy: ``python -m bench.accuracy CHECKPOINT``, a folder that ``make demo`` wrote.

Each dtype of weights is scored on the demo's held-out scans: the loss in nats a token of both tasks, and its logits
against those of the weights as they are stored: the relative error, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnimamba_model.config import TASKS
from omnimamba_model.demo.experiment import WORK
from omnimamba_model.demo.score import EXAM, predictions
from omnimamba_model.pipeline import Pipeline

from .measure import relative_error
from .tables import table

DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass
class Scored:
    """One task's logits (scans, targets, vocabulary) and held-out loss."""

    logits: Tensor
    loss: float


def score(folder: Path, dtype: str | None) -> dict[str, Scored]:
    """Both tasks over the demo's exam, captions and questions as they come, with matrices cast to ``dtype``."""
    made = Pipeline.load(folder, dtype=None if dtype is None else getattr(torch, dtype))
    found = predictions(made, folder / WORK / EXAM)
    return {task: Scored(p.logits.float(), p.loss.item()) for task, p in found.items()}


def compare(folder: Path) -> str:
    """A Markdown table, a row a dtype and task."""
    exact = score(folder, None)
    lines = []
    for dtype in DTYPES:
        found = score(folder, dtype)
        for task in TASKS:
            got, want = found[task], exact[task]
            same = (got.logits.argmax(-1) == want.logits.argmax(-1)).double().mean()
            lines.append(
                [dtype, task, f"{got.loss:.5f}", f"{got.loss - want.loss:+.5f}",
                 f"{relative_error(got.logits, want.logits):.1e}", f"{float(same):.4f}"]
            )  # fmt: skip
    header = ["weights", "task", "held-out loss, nats a token", "change", "error of the logits", "same likeliest token"]
    return table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("demo-out"))
    print(compare(parser.parse_args(arguments).checkpoint))


if __name__ == "__main__":
    main()
