"""What narrower weights cost in accuracy: ``python -m bench.accuracy CHECKPOINT``, a folder that ``make demo`` wrote.

Each dtype of weights is scored on the demo's held-out scans: the loss in nats a token of both tasks, and its logits
against those of the weights as they are stored: the relative error, and how often the likeliest token is the same.
Kept as JSON, from which ``python -m bench.report`` makes the README's table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimamba_model.config import TASKS
from omnimamba_model.demo.experiment import WORK
from omnimamba_model.demo.score import EXAM, predictions
from omnimamba_model.pipeline import Pipeline

from . import machine, results, tables
from .measure import relative_error

FILE = results.FOLDER / "accuracy" / "digits.json"
DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass
class Scored:
    """One task's logits (scans, targets, vocabulary) and held-out loss."""

    logits: Tensor
    loss: float


@dataclass
class Cost:
    """One dtype of weights on one task; ``error`` and ``same`` are of its logits against the stored weights'."""

    weights: str
    task: str
    loss: float
    change: float
    error: float
    same: float


def score(folder: Path, dtype: str | None) -> dict[str, Scored]:
    """Both tasks over the demo's exam, captions and questions as they come, with matrices cast to ``dtype``."""
    made = Pipeline.load(folder, dtype=None if dtype is None else getattr(torch, dtype), fold=False)
    found = predictions(made, folder / WORK / EXAM)
    return {task: Scored(p.logits.float(), p.loss.item()) for task, p in found.items()}


def compare(folder: Path) -> list[Cost]:
    """Every dtype and task."""
    exact = score(folder, None)
    found = []
    for dtype in DTYPES:
        scored = score(folder, dtype)
        for task in TASKS:
            got, want = scored[task], exact[task]
            same = (got.logits.argmax(-1) == want.logits.argmax(-1)).double().mean()
            error = relative_error(got.logits, want.logits)
            found.append(Cost(dtype, task, got.loss, got.loss - want.loss, error, float(same)))
    return found


def table(costs: list[Cost]) -> str:
    header = ["weights", "task", "held-out loss, nats a token", "change", "error of the logits", "same likeliest token"]
    shown = [[c.weights, c.task, f"{c.loss:.5f}", f"{c.change:+.5f}", f"{c.error:.1e}", f"{c.same:.4f}"] for c in costs]
    return tables.table(header, shown)


def kept() -> dict[str, Any] | None:
    """What was last written, its costs as ``Cost``; None where there is nothing."""
    if not FILE.exists():
        return None
    content = results.read(FILE)
    return content | {"costs": [Cost(**cost) for cost in content["costs"]]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("demo-out"))
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    try:
        costs = compare(options.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results.save(options.out, {"machine": machine.describe(), "costs": [asdict(cost) for cost in costs]})
    print(table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
