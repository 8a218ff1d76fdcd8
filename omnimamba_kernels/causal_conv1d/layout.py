"""In which order in memory the convolution's tensors (b, d, l) lie: outputs are laid out as x is."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def channel_last(x: Tensor) -> bool:
    """Whether x's channels are one element apart."""
    return x.stride(1) == 1


def alignment(x: Tensor, *others: Tensor) -> int:
    """The largest of 1, 2, 4, 8, 16 that divides the size of x's dimension of unit stride and all other strides."""
    unit = 1 if channel_last(x) else 2
    strides = (step for t in (x, *others) for i, step in enumerate(t.stride()) if i != unit)
    return math.gcd(16, x.shape[unit], *strides)


def empty_like(x: Tensor, length: int | None = None) -> Tensor:
    """A new (b, d, length or l) without gaps, its channels or its times one element apart as x's are.

    It is no view of another tensor, so that autograd lets a caller change an output in place.
    """
    b, d, l = x.shape
    l = l if length is None else length
    strides = (l * d, 1, d) if channel_last(x) else (d * l, l, 1)
    return torch.empty_strided((b, d, l), strides, dtype=x.dtype, device=x.device)
