"""Shapes of the mixer that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """b rows of length l (1: a step), h heads of p channels and n states in g groups, width w, ``extra`` = d_nonssm."""

    b: int
    l: int
    h: int
    p: int
    n: int
    g: int = 1
    w: int = 4
    extra: int = 0

    @property
    def dim(self) -> int:
        return self.h * self.p

    @property
    def channels(self) -> int:
        return self.dim + 2 * self.g * self.n

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in vars(self).items())


STEP = (Case(1, 1, 24, 64, 128), Case(1, 1, 64, 64, 128), Case(16, 1, 64, 64, 128))
"""One decode step of the 130M and the 1.3B model."""

SEQUENCE = (Case(1, 1024, 24, 64, 128), Case(1, 4096, 64, 64, 128))
"""Whole sequences through the same layers."""

SMALL = (
    Case(1, 1, 1, 1, 1),
    Case(2, 7, 4, 8, 16, g=2, w=2),
    Case(1, 19, 3, 5, 7, w=3, extra=3),
    Case(3, 5, 6, 17, 33, g=3, extra=2),
)
"""Primes, groups, columns beside the scan, one of everything."""


def weights(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The mixer's own tensors by name; steps and decays as a trained layer has them."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=make) * scale).to(dtype)

    return {
        "conv1d_weight": draw(case.channels, case.w, scale=0.5),
        "conv1d_bias": draw(case.channels, scale=0.1),
        "dt_bias": draw(case.h) - 2,
        "A": -torch.empty(case.h).uniform_(1, 16, generator=make).to(dtype),
        "D": draw(case.h),
        "rmsnorm_weight": 1 + draw(case.dim, scale=0.1),
    }


def rows(case: Case, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """zxbcdt (b, l, 2 d_nonssm + 2 dim + 2 g n + h)."""
    make = torch.Generator().manual_seed(seed)
    return torch.randn(case.b, case.l, 2 * case.extra + case.dim + case.channels + case.h, generator=make).to(dtype)


def states(case: Case, dtype: torch.dtype, slots: int | None = None, seed: int = 2) -> dict[str, Tensor]:
    """conv_state (slots, channels, w - 1) and ssm_state (slots, h, p, n)."""
    make = torch.Generator().manual_seed(seed)
    slots = case.b if slots is None else slots
    return {
        "conv_state": torch.randn(slots, case.channels, case.w - 1, generator=make).to(dtype),
        "ssm_state": torch.randn(slots, case.h, case.p, case.n, generator=make).to(dtype),
    }


GPU_STEP = (Case(1, 1, 64, 64, 128), Case(64, 1, 64, 64, 128))
GPU_SEQUENCE = (Case(1, 2048, 64, 64, 128), Case(8, 2048, 64, 64, 128))
"""What a GPU is measured at: the 1.3B model's mixer."""

COMPILED = (Case(1, 1, 64, 64, 256), Case(1, 1, 64, 64, 1024))
"""Steps of more states than those measured: compiled alone."""
