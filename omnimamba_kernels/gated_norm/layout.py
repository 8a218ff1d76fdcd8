"""How the gated norm's kernels see their tensors: rows in at most two dimensions, weights in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(t: Tensor) -> Tensor:
    """t as at most three dimensions, the last of them contiguous: a view where its strides allow one."""
    strides = t.stride()
    if strides[-1] != 1:
        t = t.contiguous()
    return t if len(strides) <= 3 else t.flatten(0, -3)


def sizes(rows: Tensor) -> dict[str, int]:
    shape = rows.shape
    leading = len(shape) - 1
    return {"outer": shape[0] if leading else 1, "inner": shape[1] if leading == 2 else 1, "width": shape[-1]}


def floats(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()
