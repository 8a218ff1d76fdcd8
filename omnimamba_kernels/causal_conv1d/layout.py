"""How the convolution's tensors (b, d, l) lie in memory (outputs as x does), and its final states."""

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


def dense_strides(x: Tensor, length: int) -> tuple[int, int, int]:
    """Of (b, d, length) without gaps, its channels or its times one element apart as x's are."""
    d = x.shape[1]
    return (length * d, 1, d) if channel_last(x) else (d * length, length, 1)


def empty_like(x: Tensor, length: int | None = None) -> Tensor:
    """A new (b, d, length or l) with dense_strides.

    It is no view of another tensor, so that autograd lets a caller change an output in place.
    """
    b, d, l = x.shape
    l = l if length is None else length
    return torch.empty_strided((b, d, l), dense_strides(x, l), dtype=x.dtype, device=x.device)


def sizes(x: Tensor, w: int, activation: bool) -> dict[str, int | bool]:
    return dict(batch=x.shape[0], channels=x.shape[1], length=x.shape[2], width=w, activation=activation)


def laid_out(x: Tensor) -> Tensor:
    """x (b, d, l) with its channels or its times one element apart: itself where it can be."""
    if channel_last(x) or x.stride(2) == 1:
        return x
    return x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (b, d, any) with the same dimension as x's at unit stride."""
    if t.stride(1 if channel_last(x) else 2) == 1:
        return t
    return empty_like(x, t.shape[2]).copy_(t)


def padded_ids(seq_idx: Tensor, w: int) -> Tensor:
    """What comes before the first position belongs to the first position's sequence."""
    b, l = seq_idx.shape
    before = seq_idx[:, :1].expand(b, w - 1) if l else seq_idx.new_zeros(b, w - 1)
    return torch.cat([before, seq_idx], dim=1)


def _final_mask(seq_idx: Tensor, w: int) -> Tensor:
    """(b, 1, w - 1): which of the last inputs belong to the last position's sequence."""
    ids = padded_ids(seq_idx, w)
    return ((ids[:, seq_idx.shape[1] :] == ids[:, -1:]) & (ids[:, -1:] >= 0))[:, None]


def final_states(x: Tensor, before: Tensor | None, seq_idx: Tensor | None, w: int) -> Tensor:
    b, d, l = x.shape
    final = x.new_zeros(b, d, w - 1)
    kept = min(l, w - 1)
    final[..., w - 1 - kept :] = x[..., l - kept :]
    if before is not None and kept < w - 1:
        final[..., : w - 1 - kept] = before[..., kept:]
    return final if seq_idx is None else final.masked_fill_(~_final_mask(seq_idx, w), 0)


def add_final_states(dx: Tensor, dbefore: Tensor | None, dfinal: Tensor, seq_idx: Tensor | None, w: int) -> None:
    """Adds the gradient of the final states, which are the last inputs."""
    if seq_idx is not None:
        dfinal = dfinal.masked_fill(~_final_mask(seq_idx, w), 0)
    l = dx.shape[2]
    kept = min(l, w - 1)
    dx[..., l - kept :] += dfinal[..., w - 1 - kept :]
    if dbefore is not None and kept < w - 1:
        dbefore[..., kept:] += dfinal[..., : w - 1 - kept]
