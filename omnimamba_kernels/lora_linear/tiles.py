"""Into what the Triton launches of the LoRA linear layer are cut, for its host code and its cost model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import blocks
from ..triton_launch import Target, settings

# Up to so many rows, one program holds all of them beside its strip of the weights.
FEW_ROWS = 64
# Up to so many ranks of all adapters together, such a program computes low itself.
FUSED_RANKS = 64


def fused(x: Tensor, lora_A: Tensor, dropout_p: float) -> bool:
    """Whether the kernel for few rows computes low itself."""
    few_ranks = lora_A.shape[0] * lora_A.shape[1] <= FUSED_RANKS
    return x.shape[0] <= FEW_ROWS and few_ranks and lora_A.dtype is x.dtype and not dropout_p


def block_r(ranks: int, longest: int = FUSED_RANKS) -> int:
    """Ranks in one step of a product, which takes 16 at least."""
    block = 16
    while block < min(ranks, longest):
        block *= 2
    return block


def pairs(low: Tensor | None, up: Tensor | None, stored: torch.dtype, target: Target) -> int:
    """How many pairs of bfloat16 parts low up is made of; one where they stay as they are."""
    if low is None or stored is torch.float32 or target.arch == "interpreter":
        return 1
    return 2 if up.dtype is torch.bfloat16 else 4


def split(length: int, block: int, tiles: int, target: Target, per_multiprocessor: int) -> tuple[int, int]:
    """How many parts, and how long, to cut ``length`` into: to fill a chip, yet of four blocks at least."""
    wanted = blocks(per_multiprocessor * target.multiprocessors, max(tiles, 1))
    steps = blocks(length, block)
    chunk = max(blocks(steps, wanted), min(steps, 4), 1) * block
    return max(blocks(length, chunk), 1), chunk


def few_rows_settings(x: Tensor, weight: Tensor, ranks: int, target: Target) -> dict[str, int]:
    """How to launch the kernel for few rows, which computes low of ``ranks`` itself."""
    (m, k), n, int8 = x.shape, weight.shape[0], weight.dtype is torch.int8
    each = product_bytes(x, x if int8 else weight)
    return settings("lora_linear", "few_rows", target, m=m, n=n, k=k, bytes=each, int8=int(int8), ranks=ranks)


def product_bytes(a: Tensor, b: Tensor) -> int:
    """How wide the operands of a product are: 2 where the matrix units take them as they are."""
    return 2 if a.dtype is b.dtype and a.dtype is not torch.float32 else 4


def low_backward_bytes(dy: Tensor, lora_B: Tensor | None) -> int:
    """The same for the pass over dy, whose second product is with float32: 2 where bfloat16 parts serve for that."""
    return 2 if dy.dtype is torch.bfloat16 and (lora_B is None or lora_B.dtype is dy.dtype) else 4
