"""How the decode step's kernels see their parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def floats(t: Tensor) -> Tensor:
    """t in float32; what is expanded stays expanded, so that the kernel sees which dimensions are tied."""
    if t.dtype is torch.float32:
        return t
    single = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
    return single.float().expand_as(t)
