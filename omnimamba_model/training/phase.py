"""A stretch of training and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..omnimamba import STAGES

Batch = tuple[str, dict[str, Tensor]]
"""The task of ``OmniMamba.forward`` and its arguments."""


@dataclass(frozen=True)
class Phase:
    """AdamW, a linear warm-up, then a cosine from ``learning_rate`` down to 1 % of it."""

    name: str
    stage: str
    """What learns, as ``OmniMamba.train_only`` knows it."""
    lessons: tuple[str, ...]
    """What each step learns from; their losses are added with equal weight."""
    steps: int
    learning_rate: float
    warmup: int = 50
    weight_decay: float = 0.0
    """For matrices and tables; vectors and the convolutions' filters go without."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """The largest norm of all gradients together."""
    accumulate: int = 1
    """Batches of each lesson a step."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if not self.lessons:
            raise ValueError("lessons must name at least one, got none")
        for name, least in (("steps", 1), ("warmup", 0), ("accumulate", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more and finite, got {self.weight_decay!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        ramp = min(1.0, (step + 1) / max(self.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * ramp * (0.01 + 0.99 * cosine)
