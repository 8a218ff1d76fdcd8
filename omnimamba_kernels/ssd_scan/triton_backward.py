"""The scan's backward in Triton: the order of its launches, and the last two of them.

    ssd_starts        triton_backward_starts.py: the steps; what pieces of the sequence leave before them
    ssd_back_walk     triton_backward_walk.py: the gradients of states, from the last chunk of each segment back
    ssd_back_chunks   triton_backward_chunks.py: every chunk on its own: dx, dz, terms of the other gradients
    ssd_back_close    ddt, a program a head and chunk; dB and dC, the parts of a group's heads in their order
    ssd_back_total    dA, ddt_bias, dD: a head's shares, added over batch rows and chunks in their order

Maths of ssd_back_close, with the terms of triton_backward_chunks.py, summed in float64:
    da_r = the two terms from before r + sum of R + W over t >= r       ddt = (A da + sum of T + U) d dt / d raw

Traffic, bytes a position and head of 16-bit dt, n 128 in two blocks: ssd_back_close reads 38 and writes 2, and for each
part of a group's heads reads 16 n bytes a position; ssd_back_total reads 8 bytes a chunk and head, and dD's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import launch, settings, together
from . import tiles
from .tiles import CHUNK, Tile
from .triton_backward_chunks import ssd_back_chunks
from .triton_backward_starts import ssd_starts
from .triton_backward_walk import chunk_steps, ssd_back_walk
from .triton_common import step_sizes


@triton.jit
def _step_gradient(
    dt, A, dt_bias, steps, used, terms, sums, ddt, at, l, heads, chunk_count, sum_columns, dt_low, dt_high,
    dt_b, dt_l, dt_h,
    CHUNK: tl.constexpr, TERMS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    b, head, chunk = at // chunk_count // heads, at // chunk_count % heads, at % chunk_count
    i = tl.arange(0, CHUNK)
    row = chunk * CHUNK + i
    size = chunk_steps(steps, at, CHUNK)[0]
    valid = tl.load(used + b * chunk_count * CHUNK + row) > 0
    terms += at * (TERMS * CHUNK) + i
    through = tl.load(terms + 4 * CHUNK).to(tl.float64)
    for k in tl.static_range(5, TERMS):
        through += tl.load(terms + k * CHUNK)
    da = tl.cumsum(through, 0, reverse=True) + tl.load(terms + 3 * CHUNK) + tl.load(terms + 2 * CHUNK)
    raw = tl.load(dt + b * dt_b + row * dt_l + head * dt_h, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32) if HAS_BIAS else 0.0
    slope = step_sizes(raw, bias, dt_low, dt_high, SOFTPLUS)[1]
    rate = tl.load(A + head).to(tl.float32)
    of_decay = tl.where(da == 0.0, 0.0, rate * da)  # A = -inf: nothing comes through where all is forgotten
    found = (of_decay + tl.load(terms) + tl.load(terms + CHUNK)) * slope
    found = tl.where(valid & (slope != 0.0), found, 0.0)
    tl.store(ddt + (b * l + row) * heads + head, found.to(ddt.dtype.element_ty), mask=row < l)
    sums += ((b * chunk_count + chunk) * heads + head) * sum_columns
    tl.store(sums, tl.sum(size * da, 0))
    tl.store(sums + 1, tl.sum(found, 0))


@triton.jit
def ssd_back_close(
    dt, A, dt_bias, steps, used, terms, sums, parts, ddt, dB, dC,
    l, heads, chunk_count, step_programs, sum_columns, part_count, part_size, dt_low, dt_high, dt_b, dt_l, dt_h,
    CHUNK: tl.constexpr, TERMS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if pid < step_programs:
        _step_gradient(
            dt, A, dt_bias, steps, used, terms, sums, ddt, pid, l, heads, chunk_count, sum_columns, dt_low, dt_high,
            dt_b, dt_l, dt_h, CHUNK, TERMS, SOFTPLUS, HAS_BIAS,
        )  # fmt: skip
    else:
        i = (pid - step_programs) * BLOCK + tl.arange(0, BLOCK)
        inside = i < part_size
        dC_sum = tl.zeros((BLOCK,), tl.float32)
        dB_sum = tl.zeros((BLOCK,), tl.float32)
        at = i
        for _ in range(part_count):
            dB_sum += tl.load(parts + at, mask=inside, other=0.0)
            dB_sum += tl.load(parts + at + part_size, mask=inside, other=0.0)
            at += part_size
            at += part_size
            dC_sum += tl.load(parts + at, mask=inside, other=0.0)
            dC_sum += tl.load(parts + at + part_size, mask=inside, other=0.0)
            at += part_size
            at += part_size
        tl.store(dC + i, dC_sum.to(dC.dtype.element_ty), mask=inside)
        tl.store(dB + i, dB_sum.to(dB.dtype.element_ty), mask=inside)


@triton.jit
def ssd_back_total(
    sums, dA, ddt_bias, dD, rows, heads, sum_columns, columns_block,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head, column = (pid // columns_block).to(tl.int64), pid % columns_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < sum_columns
    found = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        tile = (row[:, None] * heads + head) * sum_columns + column[None, :]
        found += tl.load(sums + tile, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    found = tl.sum(found, 0)
    tl.store(dA + head + column * 0, found.to(dA.dtype.element_ty), mask=column == 0)
    if HAS_BIAS:
        tl.store(ddt_bias + head + column * 0, found.to(ddt_bias.dtype.element_ty), mask=column == 1)
    if HAS_D:
        width = sum_columns - 2
        tl.store(dD + head * width + column - 2, found.to(dD.dtype.element_ty), mask=inside & (column >= 2))


@dataclass(frozen=True)
class _Scan:
    """A call's tensors as the kernels read them, and what the first launch adds."""

    x: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    dy: Tensor | None
    dfinal: Tensor | None
    dvarlen: Tensor | None
    offsets: Tensor | None
    steps: Tensor
    used: Tensor
    narrow: bool

    @property
    def flags(self) -> dict[str, bool]:
        return {"HAS_DY": self.dy is not None, "HAS_Z": self.z is not None, "HAS_VARLEN": self.dvarlen is not None}

    @property
    def sequences(self) -> int:
        return 0 if self.offsets is None else self.offsets.shape[0] - 1

    def chunks_tile(self) -> Tile:
        target, crowded = triton_launch.target_of(self.x), self.z is not None and self.dvarlen is not None
        return tiles.back_chunks(target, self.x, self.B.shape[3], self.narrow, crowded)


@together()
def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    varlen_states: bool,
) -> tuple[Tensor | None, ...]:
    *inputs, seq_idx, cu_seqlens, states, ungated = saved
    x, dt, A, B, C, D, z, dt_bias, initial_states = inputs
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    made = {name: None if t is None else t.new_empty(t.shape) for name, t in zip(names, inputs, strict=True)}
    b, l, h, _ = x.shape
    chunks = triton.cdiv(l, CHUNK)
    dy, dfinal, dvarlen = grads
    scan = _Scan(
        *(_rows(t) for t in (x, B, C, z, dy)),
        *(None if t is None else t.contiguous() for t in (dfinal, dvarlen, cu_seqlens)),
        steps=_floats(x, b, h, chunks, 3, CHUNK),
        used=x.new_empty(b, chunks, CHUNK, dtype=torch.int8),
        narrow=tiles.narrow_backward(z, x, B, C, dy),
    )
    raw = (dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous())
    step = dict(SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None)
    walk = tiles.back_walk(triton_launch.target_of(x), x, B.shape[3], scan.narrow, dvarlen is not None)
    pieces = _starts(scan, walk, raw, seq_idx, B.shape[3], dt_limit, step)
    dstates = _walk(scan, walk, pieces, states, made["initial_states"])
    terms, sums, parts = _chunks(scan, D, ungated, states, dstates, made)
    size, target = B.numel(), triton_launch.target_of(x)
    use = settings("ssd_scan", "back_close", target, elements=size)
    launch(
        ssd_back_close, (b * h * chunks + triton.cdiv(size, use["BLOCK"]),),
        *raw, scan.steps, scan.used, terms, sums, parts, made["dt"], made["B"], made["C"],
        l, h, chunks, b * h * chunks, sums.shape[3], parts.shape[0], size, *dt_limit, *dt.stride(),
        CHUNK=CHUNK, **step, TERMS=terms.shape[3], **use,
    )  # fmt: skip
    use = settings("ssd_scan", "back_total", target, rows=b * chunks)
    blocks = triton.cdiv(sums.shape[3], use["COLUMNS"])
    launch(
        ssd_back_total, (h * blocks,), sums, made["A"], made["dt_bias"], made["D"],
        b * chunks, h, sums.shape[3], blocks, HAS_BIAS=dt_bias is not None, HAS_D=D is not None, **use,
    )  # fmt: skip
    return (*(t if need else None for t, need in zip(made.values(), needs, strict=False)), None, None)


def _starts(
    scan: _Scan,
    walk: tiles.Walk,
    raw: tuple[Tensor, Tensor, Tensor | None],
    seq_idx: Tensor | None,
    n: int,
    dt_limit: tuple[float, float],
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor]:
    """Fills in the steps; returns what the pieces leave at their starts, and their decays."""
    b, l, h, p = scan.x.shape
    use, pieces = walk.ends.use, walk.pieces
    starts, decays = _floats(scan.x, b, h, pieces, p, n), scan.x.new_empty(b, h, pieces, dtype=torch.float64)
    block_h = tiles.block(h, use["BLOCK_H"], 1)
    step_programs = b * walk.chunks * triton.cdiv(h, block_h)
    launch(
        ssd_starts, (step_programs + b * pieces * h * walk.ends.p_blocks * walk.ends.n_blocks,),
        scan.C, scan.z, *raw, seq_idx, scan.offsets, scan.dy, scan.dvarlen, scan.steps, scan.used, starts, decays,
        l, h, h // scan.C.shape[2], step_programs, walk.per_segment, pieces, walk.piece, scan.sequences, *dt_limit,
        *_strides(scan.C, 3), *_strides(scan.z, 3), *raw[0].stride(), *_strides(seq_idx, 2), *_strides(scan.dy, 3),
        CHUNK=CHUNK, BLOCK_H=block_h, GROUP=use["GROUP"], STAGES=use["num_stages"], STARTS=pieces > 0,
        HAS_SEQ=seq_idx is not None, PACKED=seq_idx is None and scan.offsets is not None, **flags,
        **walk.ends.constants, **scan.flags, **walk.ends.options,
    )  # fmt: skip
    return starts, decays


def _walk(
    scan: _Scan, walk: tiles.Walk, pieces: tuple[Tensor, Tensor], states: Tensor, dinitial: Tensor | None
) -> Tensor:
    """The gradients of the states after each chunk; the first state's to ``dinitial``."""
    b, chunks, h, _, _ = states.shape
    dstates, tile = torch.empty_like(states), walk.tile
    launch(
        ssd_back_walk, (b * h * tile.p_blocks * tile.n_blocks * walk.segments,),
        scan.C, scan.z, scan.steps, scan.used, scan.offsets, scan.dy, scan.dfinal, scan.dvarlen, *pieces, dstates,
        dinitial, scan.x.shape[1], h, h // scan.C.shape[2], chunks, walk.segments, walk.each, walk.per_segment,
        scan.sequences, *_strides(scan.C, 3), *_strides(scan.z, 3), *_strides(scan.dy, 3),
        CHUNK=CHUNK, **tile.constants, **scan.flags, HAS_FINAL=scan.dfinal is not None,
        HAS_INITIAL=dinitial is not None, SEEDED=walk.segments > 1, **tile.options,
    )  # fmt: skip
    return dstates


def _chunks(
    scan: _Scan,
    D: Tensor | None,
    ungated: Tensor | None,
    states: Tensor,
    dstates: Tensor,
    made: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``made`` with dx and dz; the terms, sums and parts of the other gradients."""
    tile = scan.chunks_tile()
    b, chunks, h, p, n = states.shape
    l, g = scan.B.shape[1:3]
    programs = (2 + tile.n_blocks) * g * b * chunks
    part_heads = tiles.heads_a_program(triton_launch.target_of(scan.x), programs, h // g, tile.use)
    parts = _floats(scan.x, triton.cdiv(h // g, part_heads), 4, b, l, g, n)
    skip = 0 if D is None else D.dim()
    terms = _floats(scan.x, b, h, chunks, 4 + tile.n_blocks, CHUNK)
    sums = _floats(scan.x, b, chunks, h, 2 + (0, 1, p)[skip])
    launch(
        ssd_back_chunks, (programs * parts.shape[0],),
        scan.x, scan.B, scan.C, None if D is None else D.contiguous(), scan.z, ungated, scan.dy, scan.offsets,
        scan.dvarlen, states, dstates, scan.steps, scan.used, terms, sums, parts, made["x"], made["z"],
        l, h, g, part_heads, parts.shape[0], chunks, scan.sequences, b * l * g * n,
        *(step for t in (scan.x, scan.B, scan.C, scan.z, scan.dy) for step in _strides(t, 3)),
        CHUNK=CHUNK, **tile.constants, P_BLOCKS=tile.p_blocks, N_BLOCKS=tile.n_blocks,
        DEEP_BLOCKS=triton.cdiv(n, tile.constants["DEEP_N"]), SKIP=skip, **scan.flags, **tile.options,
    )  # fmt: skip
    return terms, sums, parts


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _rows(t: Tensor | None) -> Tensor | None:
    """``t`` with its last dimension side by side and a chunk's rows within 2^31 elements; most often ``t`` itself."""
    if t is None:
        return None
    fits = (t.stride(-1) == 1 or t.shape[-1] == 1) and CHUNK * t.stride(1) < 2**31
    return t if fits else t.contiguous()


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()[:count]
