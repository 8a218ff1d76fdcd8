"""What a launch moves and computes: the unit of each operation's cost model, ``<op>/cost.py``.

A cost model has a function for each part of its ``triton_impl.py``, with the same arguments and a target; of tensors it
reads shapes, strides and types only. It returns what the launches as written do, by kernel, and ``floor``: what no
implementation can do without. Where there are no matrix products, functions named ``..._arithmetic`` count the FLOPs of
the ordinary units by kernel: sums, products and quotients as they are written, of every lane of a tile, masked ones
among them; neither exponentials and roots nor what adds up a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Bytes that all programs of a launch load and store, from wherever they come, and FLOPs of matrix products."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.loaded + other.loaded, self.stored + other.stored, self.flops + other.flops)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements, each counted once a position (a stride of 0 repeats memory, not positions)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
