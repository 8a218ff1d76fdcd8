"""A plain pre-norm Transformer decoder, with a static key-value cache or none: what a constant state is compared with.

RMSNorm, rotary positions, torch's scaled_dot_product_attention, a GELU feed-forward, a head tied to the token table.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import HEADDIM, Attention, attended, rotary


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        u = u + self.attention(self.norm1(u))
        return u + self.feed(u)

    def feed(self, u: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm2(u)), approximate="tanh"))

    def step(self, u: Tensor, keys: Tensor, values: Tensor, position: int, turn: tuple[Tensor, Tensor]) -> Tensor:
        """One token u (b, 1, width); its key and value go into the cache (b, heads, length, HEADDIM) in place."""
        q, k, v = self.attention.project(self.norm1(u), turn)
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
        u = u + self.attention.join(y)
        return u + self.feed(u)

    def plain(self, u: Tensor) -> Tensor:
        """``forward`` with every score written out."""
        u = u + self.attention.plain(self.norm1(u))
        return u + self.feed(u)

    def plain_step(self, u: Tensor, keys: Tensor, values: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """``step`` with every score written out, after keys and values of all that came before."""
        q, k, v = self.attention.project(self.norm1(u), turn)
        k, v = (torch.cat([before.to(u.dtype), own], dim=2) for before, own in ((keys, k), (values, v)))
        u = u + self.attention.join(attended(q, k, v, keys.shape[2]))
        return u + self.feed(u)


class Transformer(nn.Module):
    """The default sizes have the parameters of the 130M Mamba-2: 129M, of which the table 39M."""

    def __init__(self, width: int = 768, layers: int = 12, hidden: int = 3352, vocab: int = 50288) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Embedding(vocab, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b, l) to logits (b, l, vocab)."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor, blocks: int | None = None) -> Tensor:
        u = self.table(ids)
        for block in self.blocks[:blocks]:
            u = block(u)
        return u

    @torch.inference_mode()
    def last(self, ids: Tensor, blocks: int | None = None) -> Tensor:
        """The logits (b, vocab) after ids (b, l), all of them computed again: generation without a cache.

        Through the first ``blocks`` alone it holds as much at its height: blocks are alike and follow one another.
        """
        return self.head(self.hidden(ids, blocks)[:, -1])

    def head(self, u: Tensor) -> Tensor:
        return F.linear(self.norm(u), self.table.weight)

    def new_cache(self, batch: int, length: int) -> Tensor:
        """Zeros (layers, 2, b, heads, length, HEADDIM) in the weights' dtype."""
        shape = (len(self.blocks), 2, batch, self.width // HEADDIM, length, HEADDIM)
        return torch.zeros(shape, dtype=self.table.weight.dtype, device=self.table.weight.device)

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Tensor, position: int) -> Tensor:
        """Takes ids (b,) in at ``position``; the next one's logits (b, vocab). The cache changes in place."""
        turn = rotary(torch.full((1,), position, device=ids.device))
        u = self.table(ids[:, None])
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            u = block.step(u, keys, values, position, turn)
        return self.head(u)[:, 0]

    @torch.inference_mode()
    def plain_last(self, ids: Tensor) -> Tensor:
        """What ``last`` is checked against: the definition in fp32 on the same weights."""
        whole = copy.deepcopy(self).float()
        u = whole.table(ids)
        for block in whole.blocks:
            u = block.plain(u)
        return whole.head(u[:, -1])

    @torch.inference_mode()
    def plain_step(self, ids: Tensor, cache: Tensor, position: int) -> Tensor:
        """What ``step`` is checked against: the definition in fp32 on the same weights and cache, which stays as it
        is."""
        whole, turn = copy.deepcopy(self).float(), rotary(torch.full((1,), position, device=ids.device))
        u = whole.table(ids[:, None])
        for block, (keys, values) in zip(whole.blocks, cache, strict=True):
            u = block.plain_step(u, keys[:, :, :position], values[:, :, :position], turn)
        return whole.head(u)[:, 0]
