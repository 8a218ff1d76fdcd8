"""Causal self-attention on torch's scaled_dot_product_attention, with rotary positions and its two projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADDIM = 64
QUERIES = 512
"""Rows of the matrix of scores that are held at once where it is written out."""


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (l, HEADDIM / 2) of integer positions, base 10,000 (arXiv 2104.09864)."""
    rates = 10_000.0 ** (-torch.arange(0, HEADDIM, 2, device=positions.device) / HEADDIM)
    angles = positions[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (b, heads, l, HEADDIM), its halves turned against each other."""
    cos, sin = (t.to(x.dtype) for t in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """softmax(q k^T / sqrt(HEADDIM)) v for queries at positions ``first`` on, each of which sees no later key."""
    queries = torch.arange(first, first + q.shape[2], device=q.device)
    later = torch.arange(k.shape[2], device=q.device) > queries[:, None]
    return (q @ k.transpose(-1, -2) / HEADDIM**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v


class Attention(nn.Module):
    """u (b, l, width) to (b, l, width); width a multiple of 64, one head for every 64 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEADDIM
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, u: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (b, heads, l, HEADDIM), q and k turned to their positions."""
        q, k, v = (t.unflatten(-1, (self.heads, HEADDIM)).transpose(1, 2) for t in self.qkv(u).chunk(3, dim=-1))
        return rotate(q, turn), rotate(k, turn), v

    def join(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, u: Tensor) -> Tensor:
        turn = rotary(torch.arange(u.shape[1], device=u.device))
        return self.join(F.scaled_dot_product_attention(*self.project(u, turn), is_causal=True))

    def block(self, u: Tensor, at: int, keys: Tensor, values: Tensor) -> Tensor:
        """Positions ``at`` to ``at`` + l of a longer sequence, for u (b, l, width).

        ``keys`` and ``values`` (b, heads, length, HEADDIM) hold all before and take the block's own in place. The last
        position's output is that of ``forward``; the others see what comes after them in the block too, which
        spares a mask as large as block times length.
        """
        end = at + u.shape[1]
        q, k, v = self.project(u, rotary(torch.arange(at, end, device=u.device)))
        keys[:, :, at:end], values[:, :, at:end] = k, v
        return self.join(F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end]))

    def plain(self, u: Tensor, last: int | None = None) -> Tensor:
        """The same by the definition, every score written out: what ``forward`` is checked against. ``last``: the
        outputs of so many positions at the end alone."""
        l = u.shape[1]
        q, k, v = self.project(u, rotary(torch.arange(l, device=u.device)))
        blocks = [(at, min(at + QUERIES, l)) for at in range(0 if last is None else l - last, l, QUERIES)]
        y = [attended(q[:, :, at:end], k[:, :, :end], v[:, :, :end], at) for at, end in blocks]
        return self.join(torch.cat(y, dim=2))
