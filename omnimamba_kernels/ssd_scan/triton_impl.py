"""Mamba-2's scan in Triton: the host side of its forward, triton_ends.py and triton_forward.py."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor, bfloat16, float16, float32, int32

from .. import triton_launch
from ..triton_launch import Target, launch
from .triton_backward import backward
from .triton_common import CHUNK, precision
from .triton_ends import ssd_ends
from .triton_forward import ssd_walk

__all__ = ["backward", "forward", "why_not"]
NEAR = 2**24  # elements between rows
WIDEST = 512  # states a head: one program holds a head's state for at least 16 channels in registers


def why_not(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *tensors: Tensor | None, **_: Any) -> str | None:
    if 0 in x.shape[2:] or 0 in B.shape[2:]:
        return f"it needs at least one head, channel, group and state: x is {tuple(x.shape)}, B is {tuple(B.shape)}"
    if B.shape[3] > WIDEST:
        return f"it holds at most {WIDEST} states a channel, B has {B.shape[3]}"
    return triton_launch.cannot_store(x, dt, A, B, *tensors)


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
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple]:
    b, l, h, p = x.shape
    n = B.shape[3]

    def floats(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=float32)

    y, final = x.new_empty(b, l, h, p), floats(b, h, p, n)
    varlen = None if cu_seqlens is None else floats(cu_seqlens.shape[0] - 1, h, p, n)
    states = floats(b, triton.cdiv(l, CHUNK), h, p, n) if save else None
    ungated = x.new_empty(b, l, h, p) if save and z is not None else None
    saved = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, states, ungated)
    if l == 0:
        final.copy_(initial_states) if initial_states is not None else final.zero_()
    rows = _rows(x, B, C, z)
    plain = l % CHUNK == 0 and seq_idx is None and z is None and not save
    walk, options, tile = _tile("walk", rows[0], n, plain)
    chunk = walk["CHUNK"]
    chunks = triton.cdiv(l, chunk)
    blocks = b * h * triton.cdiv(p, tile["BLOCK_P"])
    segments, each = _segments(blocks, chunks, walk, triton_launch.target_of(x))
    pieces = (segments - 1) * walk["pieces"]
    inputs = (rows[0], dt, A, rows[1], dt_bias, initial_states, seq_idx)
    steps, lasts = floats(b, h, chunks, 4, chunk), None
    if seq_idx is not None:
        lasts = x.new_empty(b, chunks, chunk, dtype=int32)
    ends, decays = floats(b, h, pieces, p, n), floats(b, h, pieces)
    work = (steps, lasts, ends, decays)
    _start_ends(inputs, None, work, pieces, each // walk["pieces"], chunk, dt_softplus, dt_limit)
    if l:
        launch(
            ssd_walk, (blocks * segments,), *rows[:3], D, rows[3], initial_states, *work, y, final, states, ungated,
            l, h, h // B.shape[2], segments, each, walk["pieces"],
            *rows[0].stride()[:3], *rows[1].stride()[:3], *rows[2].stride()[:3], *_strides(D, 2), *_strides(rows[3], 3),
            *_strides(initial_states, 4),
            **tile, CHUNK=chunk, N_PARTS=triton.cdiv(n, tile["BLOCK_N"]), SEEDED=segments > 1, HAS_D=D is not None,
            HAS_Z=z is not None, HAS_INITIAL=initial_states is not None, HAS_SEQ=lasts is not None, SAVE=save,
            KEEP_EVERY=CHUNK // chunk, EVEN=lasts is None and l % chunk == 0, **options,
        )  # fmt: skip
    if varlen is not None:
        _start_ends(inputs, cu_seqlens, (None, None, varlen, None), varlen.shape[0], 0, chunk, dt_softplus, dt_limit)
    return (y, final, varlen), saved if save else ()


def _start_ends(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    work: tuple[Tensor | None, ...],
    pieces: int,
    piece_chunks: int,
    chunk: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> None:
    """Launches ssd_ends: steps and the ends of pieces, or with ``cu_seqlens`` the states after packed sequences."""
    x, dt, A, B, dt_bias, initial_states, seq_idx = inputs
    b, l, h, p = x.shape
    n = B.shape[3]
    use, options, tile = _tile("ends", x, n, False)
    block_h = min(use["BLOCK_H"], triton.next_power_of_2(h))
    varlen = cu_seqlens is not None
    step_programs = 0 if varlen else b * triton.cdiv(l, chunk) * triton.cdiv(h, block_h)
    launch(
        ssd_ends, (step_programs + b * pieces * h * triton.cdiv(p, tile["BLOCK_P"]) * triton.cdiv(n, tile["BLOCK_N"]),),
        x, dt, A, B, dt_bias, initial_states, seq_idx, cu_seqlens, *work,
        l, h, h // B.shape[2], step_programs, pieces, piece_chunks * chunk, *dt_limit,
        *x.stride()[:3], *dt.stride(), *A.stride(), *B.stride()[:3], *_strides(dt_bias, 1),
        *_strides(initial_states, 4)[1:], *_strides(seq_idx, 2), *_strides(cu_seqlens, 1),
        **tile, CHUNK=chunk, BLOCK_H=block_h, GROUP=use["GROUP"], SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None,
        HAS_INITIAL=initial_states is not None, HAS_SEQ=seq_idx is not None, VARLEN=varlen, ENDS=pieces > 0, **options,
    )  # fmt: skip


def _tile(kernel: str, rows: Tensor, n: int, plain: bool) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """The launch table's entry, its options, and the constants that say which tile a program has and how it multiplies.

    float16 has too few exponents for states and steps: it is computed as float32. Only the interpreter, which has no
    bfloat16, keeps it in its place. ``plain``: whole chunks and no extras, which leaves more registers to the state.
    """
    b, l, h, p = rows.shape
    target = triton_launch.target_of(rows)
    narrow = rows.dtype == (float16 if target.arch == "interpreter" else bfloat16)
    sizes = dict(heads=b * h, l=l, p=p, n=n, bytes=2 if narrow else 4, plain=plain)
    use = triton_launch.settings("ssd_scan", kernel, target, **sizes)
    tile = dict(
        P=p, N=n, BLOCK_P=min(use["BLOCK_P"], max(16, triton.next_power_of_2(p))),
        BLOCK_N=min(use["BLOCK_N"], max(16, triton.next_power_of_2(n))), NARROW=narrow, TERMS=3 if narrow else 1,
        PRECISION=precision(target, narrow), STAGES=use["num_stages"],
    )  # fmt: skip
    return use, {name: use[name] for name in ("num_warps", "num_stages")}, tile


def _segments(blocks: int, chunks: int, use: dict[str, int], target: Target) -> tuple[int, int]:
    """Into how many segments the walk is cut, and the chunks of each.

    The time of a cut in walks of a whole sequence: waves of programs, each as long as a segment, and before them the
    ends of all segments but the last, which cost ``ends_share`` percent of a walk and of which twice as many fit.
    """
    slots = max(1, target.multiprocessors * use["per_multiprocessor"])
    best, least = 1, 0.95 * triton.cdiv(blocks, slots)  # a cut must be worth its doubts
    for count in range(2, min(use["segments"], chunks // use["shortest"]) + 1):
        walk = triton.cdiv(blocks * count, slots) / count
        ends = triton.cdiv(blocks * (count - 1), 2 * slots) / count * use["ends_share"] / 100
        if walk + ends < least:
            best, least = count, walk + ends
    pieces = use["pieces"]
    each = max(1, triton.cdiv(chunks, best * pieces)) * pieces if best > 1 else chunks
    return max(1, triton.cdiv(chunks, max(each, 1))), each


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
