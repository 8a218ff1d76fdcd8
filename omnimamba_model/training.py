"""Training in phases: in each, some parameters learn from some tasks, the rest stay bit for bit as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .omnimamba import OmniMamba

Batch = tuple[str, dict[str, Tensor]]
"""The task of ``OmniMamba.forward`` and its arguments."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: AdamW, a linear warm-up, then a cosine from ``learning_rate`` down to 1 % of it."""

    name: str
    stage: str
    """What learns, as ``OmniMamba.train_only`` knows it."""
    lessons: tuple[str, ...]
    """What each step learns from; their losses are added with equal weight."""
    steps: int
    learning_rate: float
    warmup: int = 50

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        ramp = min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * ramp * (0.01 + 0.99 * cosine)


def train(
    model: OmniMamba,
    phase: Phase,
    lessons: Mapping[str, Callable[[], Batch]],
    weight_decay: float,
    report: Callable[[dict[str, float]], None],
) -> None:
    """Run one phase in place; ``report`` gets each step's loss by lesson.

    ``weight_decay`` is for matrices and tables; vectors and the convolutions' filters go without.
    """
    model.train_only(phase.stage)
    model.train()
    optimizer = _optimizer(model, weight_decay)
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.rate(step)
        losses = {}
        for lesson in phase.lessons:
            task, arguments = lessons[lesson]()
            losses[lesson] = model(task, **arguments).loss
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report({lesson: loss.item() for lesson, loss in losses.items()})
    model.train_only("joint")
    model.eval()


def _optimizer(model: OmniMamba, weight_decay: float) -> torch.optim.Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
