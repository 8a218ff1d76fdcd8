"""Mamba-2's scan in Triton: the host side of its forward, triton_ends.py and triton_forward.py."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor, float32, int32

from .. import triton_launch
from ..triton_launch import launch, together
from . import tiles
from .tiles import CHUNK
from .triton_backward import backward
from .triton_ends import ssd_ends
from .triton_forward import ssd_walk

__all__ = ["backward", "forward", "why_not"]
NEAR = 2**24  # elements between rows
READS_OFFSETS = True  # cu_seqlens as they are: no seq_idx needs to be made of them
MOST_HEADS, MOST_CHANNELS = 2**16, 2**24  # of a position; channels of all heads, states of all groups
WIDEST = 512  # states a head: one program holds a head's state for at least 16 channels in registers


def why_not(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *tensors: Tensor | None, **_: Any) -> str | None:
    if 0 in x.shape[2:] or 0 in B.shape[2:]:
        return f"it needs at least one head, channel, group and state: x is {tuple(x.shape)}, B is {tuple(B.shape)}"
    if B.shape[3] > WIDEST:
        return f"it holds at most {WIDEST} states a channel, B has {B.shape[3]}"
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    if h > MOST_HEADS or max(h * p, g * n) > MOST_CHANNELS:
        return (
            f"it takes at most {MOST_HEADS} heads and {MOST_CHANNELS} channels or states a position: "
            f"x is {tuple(x.shape)}, B is {tuple(B.shape)}"
        )
    return triton_launch.cannot_store(x, dt, A, B, *tensors)


@together()
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    varlen_states: bool = False,
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple]:
    b, l, h, p = x.shape
    n = B.shape[3]

    def floats(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=float32)

    y, final = x.new_empty(b, l, h, p), floats(b, h, p, n)
    varlen = floats(cu_seqlens.shape[0] - 1, h, p, n) if varlen_states else None
    states = floats(b, triton.cdiv(l, CHUNK), h, p, n) if save else None
    rows = _rows(x, B, C, z)
    ungated = x.new_empty(b, l, h, p, dtype=rows[3].dtype) if save and z is not None else None
    saved = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, states, ungated)
    if l == 0:
        final.copy_(initial_states) if initial_states is not None else final.zero_()
    several = seq_idx is not None or cu_seqlens is not None
    walk = tiles.walk(triton_launch.target_of(x), rows[0], rows[1], z, several, save)
    inputs = (rows[0], dt, A, rows[1], dt_bias, initial_states, seq_idx)
    steps = floats(b, walk.chunks, h, 4, walk.chunk)
    lasts = x.new_empty(b, walk.chunks, walk.chunk, dtype=int32) if several else None
    work = (steps, lasts, floats(b, h, walk.pieces, p, n), floats(b, h, walk.pieces))
    _start_ends(walk, inputs, cu_seqlens, (*work, varlen), dt_softplus, dt_limit)
    if l:
        launch(
            ssd_walk, (b * (h // walk.heads) * walk.tile.p_blocks * walk.segments,),
            *rows[:3], D, rows[3], initial_states, *work, y, final, states, ungated,
            l, h, h // B.shape[2], walk.segments, walk.each, walk.per_segment,
            *rows[0].stride()[:3], *rows[1].stride()[:3], *rows[2].stride()[:3], *_strides(D, 2), *_strides(rows[3], 3),
            *_strides(initial_states, 4), CHUNK=walk.chunk, HEADS=walk.heads, N_PARTS=walk.tile.n_blocks,
            EXACT=tiles.exact(rows[0]), SEEDED=walk.segments > 1, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_INITIAL=initial_states is not None, HAS_SEQ=lasts is not None, SAVE=save,
            KEEP_EVERY=CHUNK // walk.chunk, AGAIN=walk.tile.use.get("AGAIN", 0),
            EVEN=lasts is None and l % walk.chunk == 0 and walk.tile.whole, **_constants(walk.tile),
        )  # fmt: skip
    return (y, final, varlen), saved if save else ()


def _start_ends(
    walk: tiles.Walk,
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    work: tuple[Tensor | None, ...],
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> None:
    """Launches ssd_ends: steps, the ends of pieces and, with ``cu_seqlens``, the states after packed sequences."""
    x, dt, A, B, dt_bias, initial_states, seq_idx = inputs
    b, l, h, _ = x.shape
    block_h = tiles.block(h, walk.ends.use["BLOCK_H"], 1)
    step_programs = b * walk.chunks * triton.cdiv(h, block_h)
    sequences, varlen = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, work[-1] is not None
    ends = b * walk.pieces + (sequences if varlen else 0)
    launch(
        ssd_ends, (step_programs + ends * h * walk.ends.p_blocks * walk.ends.n_blocks,),
        x, dt, A, B, dt_bias, initial_states, seq_idx, cu_seqlens, *work,
        l, h, h // B.shape[2], step_programs, walk.pieces, walk.piece, sequences, *dt_limit,
        *x.stride()[:3], *dt.stride(), *A.stride(), *B.stride()[:3], *_strides(dt_bias, 1),
        *_strides(initial_states, 4)[1:], *_strides(seq_idx, 2), *_strides(cu_seqlens, 1),
        CHUNK=walk.chunk, BLOCK_H=block_h, GROUP=walk.ends.use["GROUP"], SOFTPLUS=dt_softplus, EXACT=tiles.exact(x),
        HAS_BIAS=dt_bias is not None, HAS_INITIAL=initial_states is not None, HAS_SEQ=seq_idx is not None,
        PACKED=seq_idx is None and cu_seqlens is not None, VARLEN=varlen, ENDS=ends > 0, **_constants(walk.ends),
    )  # fmt: skip


def _constants(tile: tiles.Tile) -> dict[str, Any]:
    return tile.constants | tile.options | {"STAGES": tile.use["num_stages"]}


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors of one type, float32 unless all have it already, with their last dimension side by side and rows so near
    that offsets within a chunk fit in 32 bits."""
    alike = all(t is None or t.dtype == tensors[0].dtype for t in tensors)
    found = []
    for t in tensors:
        if t is not None:
            t = t if alike else t.to(float32)
            near = (t.stride(3) == 1 or t.shape[3] == 1) and t.stride(1) < NEAR
            t = t if near else t.contiguous()
        found.append(t)
    return found


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides, 0 for those that are missing."""
    return (*(() if t is None else t.stride()), *[0] * count)[:count]
