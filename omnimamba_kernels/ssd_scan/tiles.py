"""Into what the scan's Triton launches are cut, for their host code and their cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost import blocks
from ..triton_launch import Target, settings

TERMS = 3  # 16-bit parts that what enters a float32 state is split into
CHUNK = 64  # positions between the states that are kept for a backward, and in a chunk of that backward


@dataclass(frozen=True)
class Tile:
    """What a program of one kernel has of a head's channels and states, and how it multiplies."""

    use: dict[str, int]  # the launch table's entry
    constants: dict[str, Any]
    p_blocks: int
    n_blocks: int

    @property
    def options(self) -> dict[str, int]:
        return {name: value for name, value in self.use.items() if name.startswith("num_")}

    @property
    def whole(self) -> bool:
        """Whether every tile is full of the head's channels and states."""
        sizes = self.constants
        return sizes["P"] % sizes["BLOCK_P"] == 0 and sizes["N"] % sizes["BLOCK_N"] == 0


def tile(kernel: str, target: Target, x: Tensor, n: int, narrow: bool, **sizes: int) -> Tile:
    """The tile of ``kernel``. ``narrow``: the matrix units take x, B and C as they are, in 16 bits."""
    b, l, h, p = x.shape
    use = settings("ssd_scan", kernel, target, heads=b * h, l=l, p=p, n=n, bytes=2 if narrow else 4, **sizes)
    # Three products of TensorFloat-32 keep float32's digits; AMD's matrix units have float32 itself.
    precision = "tf32x3" if target.arch.startswith("sm_") and not narrow else "ieee"
    cut = {"BLOCK_P": block(p, use["BLOCK_P"])}
    cut |= {name: block(n, use[name]) for name in ("BLOCK_N", "DEEP_N") if name in use}
    constants = dict(P=p, N=n, NARROW=narrow, PRECISION=precision, **cut)
    return Tile(use, constants, blocks(p, cut["BLOCK_P"]), blocks(n, cut["BLOCK_N"]))


def block(size: int, longest: int, least: int = 16) -> int:
    """A power of two, up to ``longest``, that holds ``size`` if it can; 16 is the least that a product takes."""
    found = least
    while found < min(size, longest):
        found *= 2
    return found


def narrow_forward(target: Target, x: Tensor) -> bool:
    """Whether the forward's products take x, B and C as they are.

    float16 has too few exponents for states and steps: it is computed as float32. Only the interpreter, which has no
    bfloat16, keeps it in its place.
    """
    return x.dtype == (torch.float16 if target.arch == "interpreter" else torch.bfloat16)


def exact(x: Tensor) -> bool:
    """Whether the forward's scores need every digit of the sums of decays: 16 bits of y round off more than one float32
    of them does."""
    return x.dtype == torch.float32


def narrow_backward(z: Tensor | None, *tensors: Tensor | None) -> bool:
    """The same for the backward, of whose operands a gate leaves no 16 bits."""
    return z is None and all(t is None or t.dtype == torch.bfloat16 for t in tensors)


@dataclass(frozen=True)
class Walk:
    """A walk over the chunks: ``segments`` of ``each`` chunks of ``chunk`` positions. Of every segment but the one that
    is walked last, the pre-pass finds what ``per_segment`` pieces leave to the next. The forward's programs take
    ``heads`` heads of a group together."""

    tile: Tile
    ends: Tile
    chunk: int
    chunks: int
    segments: int
    each: int
    per_segment: int
    heads: int = 1

    @property
    def pieces(self) -> int:
        return (self.segments - 1) * self.per_segment

    @property
    def piece(self) -> int:
        """Positions of a piece."""
        return self.each // self.per_segment * self.chunk


def walk(target: Target, x: Tensor, B: Tensor, z: Tensor | None, sequences: bool, save: bool) -> Walk:
    """The forward's. A plain one, whole chunks and nothing more, leaves more registers to the state."""
    (b, l, h, _), (_, _, g, n) = x.shape, B.shape
    plain = l % CHUNK == 0 and z is None and not sequences and not save
    narrow = narrow_forward(target, x)
    crowded = z is not None and sequences
    sizes = dict(plain=int(plain), paired=int(h // g % 2 == 0), crowded=int(crowded))
    found = tile("walk", target, x, n, narrow, **sizes)
    chunk, heads = found.use["CHUNK"], found.use.get("HEADS", 1)
    chunks = blocks(l, chunk)
    segments, each = _segments(b * h // heads * found.p_blocks, chunks, found.use, target)
    ends = tile("ends", target, x, n, narrow)
    return Walk(found, ends, chunk, chunks, segments, each, found.use["pieces"], heads)


def back_walk(target: Target, x: Tensor, n: int, narrow: bool, varlen: bool) -> Walk:
    """The backward's walk, from the last segment to the first; ``varlen``: packed sequences' states have gradients."""
    b, l, h, _ = x.shape
    found = tile("back_walk", target, x, n, narrow, varlen=int(varlen))
    ends = tile("back_starts", target, x, n, narrow)
    chunks = blocks(l, CHUNK)
    segments, each = _segments(b * h * found.p_blocks * found.n_blocks, chunks, found.use, target)
    return Walk(found, ends, CHUNK, chunks, segments, each, found.use["pieces"])


def back_chunks(target: Target, x: Tensor, n: int, narrow: bool, crowded: bool) -> Tile:
    """The backward's chunks; ``crowded``: a gate, and packed sequences' states have gradients."""
    return tile("back_chunks", target, x, n, narrow, crowded=int(crowded))


def _segments(programs: int, chunks: int, use: dict[str, int], target: Target) -> tuple[int, int]:
    """Into how many segments the walk is cut, and the chunks of each.

    The time of a cut in walks of a whole sequence: waves of programs, each as long as a segment, and before them the
    ends of all segments but the last, which cost ``ends_share`` percent of a walk and of which twice as many fit.
    """
    slots = max(1, target.multiprocessors * use["per_multiprocessor"])
    best, least = 1, 0.95 * blocks(programs, slots)  # a cut must be worth its doubts
    for count in range(2, min(use["segments"], chunks // use["shortest"]) + 1):
        walked = blocks(programs * count, slots) / count
        ends = blocks(programs * (count - 1), 2 * slots) / count * use["ends_share"] / 100
        if walked + ends < least:
            best, least = count, walked + ends
    pieces = use["pieces"]
    each = max(1, blocks(chunks, best * pieces)) * pieces if best > 1 else max(1, chunks)
    return max(1, blocks(chunks, each)), each


def heads_a_program(target: Target, programs: int, per_group: int, use: dict[str, int]) -> int:
    """How many heads of a group one program of the backward's chunks takes: as many as leave the chip filled."""
    slots = target.multiprocessors * use["per_multiprocessor"]
    return blocks(per_group, max(1, min(per_group, slots // max(1, programs))))
