"""The time of a whole generation from a few of its steps, each really measured.

The time of the step at position s is close to a polynomial in s: constant for Mamba-2, of degree 1 with a key-value
cache, of degree 2 where the whole sequence is computed again. Gauss and Legendre's rule with n positions gives the sum
over all positions exactly for every polynomial up to degree 2 n - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .measure import Contender
from .rates import seconds

POSITIONS = 3


def positions(total: int, count: int = POSITIONS) -> list[tuple[int, float]]:
    """(position, steps that it stands for) of the sampled steps of ``total``; the steps sum to ``total``."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return [(int((1 + p) / 2 * total), float(w / 2 * total)) for p, w in zip(points, weights, strict=True)]


@dataclass
class Sampled(Contender):
    """A round measures each of ``steps``, ``each`` calls of it, and takes them for the whole generation."""

    steps: list[tuple[float, Callable[[], Any]]] = field(default_factory=list)
    """(how many steps it stands for, a function that takes one)."""
    each: int = 1

    def take(self) -> None:
        self.times.append(
            sum(weight * seconds(lambda s=s: self.again(s, self.each)) / self.each for weight, s in self.steps)
        )


def sampled(
    name: str, steps: list[tuple[float, Callable[[], Any]]], check: Callable[[], float], bound: float, **more: Any
) -> Sampled:
    """A contender whose ``run``, which warms up and tells how many rounds are paid for, is what a round measures."""
    found = Sampled(name, lambda: None, check, bound, steps=steps, **more)
    found.run = lambda: [found.again(step, found.each) for _, step in steps]
    return found
