"""The scan's backward in Triton, before the walk: the steps, and what pieces of the sequence leave at their starts.

    steps    (b, h, chunks, 3, CHUNK) float32: dt, and cum of triton_common as two float32
    used     (b, chunks, CHUNK) int8: 0 in padding and past the end
    starts   (b, h, pieces, p, n) float32: the gradient of the state before a piece, if that after it had none
    decays   (b, h, pieces) float64: log2 of what is left there of the gradient of the state after the piece

Maths. With carry from the piece's start on, and V the gradient of the state after a packed sequence that ends at e:
    starts = sum over t in the piece of carry_t dy_t C_t^T + sum over sequences that end in it of carry_e V
The first step of a sequence, like any step that wipes out the state, counts as FLOOR in cum, whose two parts keep all
its digits: so L, carry and tail are 0 across it, and need no mask but the order of time.

Plan. One launch with two roles. Steps: a program takes a chunk and BLOCK_H heads, reads dt along the heads and writes
along the positions. Starts, only where the walk is cut into segments: a program takes a head, a tile of its state and a
piece, which it walks from its start, GROUP chunks at a time, until the decay leaves nothing.
Traffic, bytes a position and head: dt and 12; starts read dy once for each tile of n and C for each tile of p, through
the cache, as far as they go.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import FLOOR, decay_powers, listed_sequences, offsets_up_to, packed_sequences, step_sizes
from .triton_products import load_gradient, load_tile, product_derived_exact

NOTHING = tl.constexpr(-150.0)  # log2 of a factor that is 0 in float32


@triton.jit
def at_position(v, t, CHUNK: tl.constexpr):
    """v[t]."""
    return tl.sum(tl.where(tl.arange(0, CHUNK) == t, v, 0), 0)


@triton.jit
def sequences_before(offsets, sequences, position, l):
    """How many packed sequences end at ``position`` or before."""
    return offsets_up_to(offsets + 1, 1, sequences, position, l)


@triton.jit
def offset_at(offsets, j, l):
    return tl.minimum(tl.load(offsets + j), l)


@triton.jit
def _steps(raw, bias, rate, valid, begins, dt_low, dt_high, SOFTPLUS: tl.constexpr):
    """dt, and the steps' decays in powers of two."""
    size = tl.where(valid, step_sizes(raw, bias, dt_low, dt_high, SOFTPLUS)[0], 0.0)
    a = decay_powers(size, rate)
    return size, tl.where(begins | (a <= FLOOR), FLOOR, a).to(tl.float64)


@triton.jit
def _write_steps(
    pid, dt, A, dt_bias, seq_idx, offsets, steps, used, l, heads, chunks, sequences, dt_low, dt_high,
    dt_b, dt_l, dt_h, seq_b, seq_l,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(heads, BLOCK_H)
    head_block, pid = pid % head_blocks, pid // head_blocks
    chunk, b = pid % chunks, pid // chunks
    i = tl.arange(0, CHUNK)
    head = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    known, t = head < heads, chunk * CHUNK + i
    valid, begins = t < l, t < 0
    if PACKED:
        valid, begins = packed_sequences(offsets, 1, sequences, t, valid, l)
    elif HAS_SEQ:
        valid, begins = listed_sequences(seq_idx + b * seq_b, seq_l, t, valid)
    at = b * dt_b + t[:, None] * dt_l + head[None] * dt_h
    raw = tl.load(dt + at, mask=valid[:, None] & known[None], other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + head, mask=known, other=0.0).to(tl.float32)[None] if HAS_BIAS else 0.0
    rate = tl.load(A + head, mask=known, other=0.0).to(tl.float32)[None]
    size, a = _steps(raw, bias, rate, valid[:, None], begins[:, None], dt_low, dt_high, SOFTPLUS)
    cum = tl.cumsum(a, 0)
    high = cum.to(tl.float32)
    out = steps + ((b * heads + head[None]) * chunks + chunk) * (3 * CHUNK) + i[:, None]
    tl.store(out, size, mask=known[None])
    tl.store(out + CHUNK, high, mask=known[None])
    tl.store(out + 2 * CHUNK, (cum - high).to(tl.float32), mask=known[None])
    if head_block == 0:
        tl.store(used + (b * chunks + chunk) * CHUNK + i, valid.to(tl.int8))


@triton.jit
def _write_start(
    pid, C, z, dt, A, dt_bias, seq_idx, offsets, dy, dvarlen, starts, decays,
    l, heads, per_group, first_piece, pieces, piece, sequences, dt_low, dt_high,
    C_b, C_l, C_g, z_b, z_l, z_h, dt_b, dt_l, dt_h, seq_b, seq_l, dy_b, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, PACKED: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_VARLEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    P_BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_block, pid = pid % N_BLOCKS, pid // N_BLOCKS
    p_block, pid = pid % P_BLOCKS, pid // P_BLOCKS
    head, pid = pid % heads, pid // heads
    which, b = pid % pieces, pid // pieces
    i = tl.arange(0, CHUNK)
    column = p_block.to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    state = n_block.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < P)[:, None] & (state < N)[None, :]
    tile = column[:, None] * N + state[None, :]
    rate = tl.load(A + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32) if HAS_BIAS else 0.0
    dt += b * dt_b + head * dt_h
    C += b * C_b + head // per_group * C_g
    if HAS_SEQ:
        seq_idx += b * seq_b
    if HAS_DY:
        dy += b * dy_b + head * dy_h
    if HAS_Z:
        z += b * z_b + head * z_h
    start = (first_piece + which) * piece
    end = tl.minimum(start + piece, l)
    wiped = 0.0
    if PACKED:  # what comes after the first that begins here reaches no state before it; in padding nothing counts
        count = offsets_up_to(offsets, 1, sequences + 1, start - 1, l)
        begin = offset_at(offsets, tl.minimum(count, sequences), l)
        wiped = tl.where((count <= sequences) & (begin < end), FLOOR, 0.0)
        end = tl.where(count <= sequences, tl.minimum(begin, end), start)
    dS = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    after = tl.full((), 0.0, tl.float64)
    while (start < end) & ~(after < NOTHING):
        for _ in tl.range(0, GROUP, num_stages=STAGES):
            t = start + i
            valid, begins = t < end, t < 0
            if HAS_SEQ:
                valid, begins = listed_sequences(seq_idx, seq_l, t, valid)
            raw = tl.load(dt + t * dt_l, mask=valid, other=0.0).to(tl.float32)
            a = _steps(raw, bias, rate, valid, begins, dt_low, dt_high, SOFTPLUS)[1]
            reaching = tl.exp2((tl.cumsum(a, 0) + after).to(tl.float32))
            if HAS_DY:
                C_tile = load_tile(C + start * C_l, i, C_l, state, N, BLOCK_N, valid, NARROW)
                z_chunk = z + start * z_l if HAS_Z else z
                dy_tile = load_gradient(
                    dy + start * dy_l, z_chunk, i, dy_l, z_l, column, P, BLOCK_P, valid, NARROW, HAS_DY, HAS_Z
                )
                weighted = tl.trans(dy_tile.to(tl.float32) * reaching[:, None])
                dS = product_derived_exact(weighted, C_tile, dS, NARROW, PRECISION)
            if HAS_VARLEN:
                stop = tl.minimum(start + CHUNK, end)
                for j in range(sequences_before(offsets, sequences, start, l),
                               sequences_before(offsets, sequences, stop, l)):  # fmt: skip
                    after_it = offset_at(offsets, j + 1, l)
                    left = at_position(reaching, after_it - start - 1, CHUNK)
                    left = tl.where(after_it > offset_at(offsets, j, l), left, 0.0)
                    at = (j * heads + head) * (P * N)
                    dS += left * tl.load(dvarlen + at + tile, mask=inside, other=0.0).to(tl.float32)
            after += tl.sum(a, 0)
            start += CHUNK
    after += wiped
    index = (b * heads + head) * pieces + which
    tl.store(starts + index * (P * N) + tile, dS, mask=inside)
    if (p_block == 0) & (n_block == 0):
        tl.store(decays + index, after)


@triton.jit(do_not_specialize=["sequences"])
def ssd_starts(
    C, z, dt, A, dt_bias, seq_idx, offsets, dy, dvarlen, steps, used, starts, decays,
    l, heads, per_group, step_programs, first_piece, pieces, piece, sequences, dt_low, dt_high,
    C_b, C_l, C_g, z_b, z_l, z_h, dt_b, dt_l, dt_h, seq_b, seq_l, dy_b, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, PACKED: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_VARLEN: tl.constexpr, STARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below ``step_programs`` write steps, the others starts: of ``pieces`` pieces of ``piece`` positions,
    the first of which comes after ``first_piece`` others that nobody asks for."""
    pid = tl.program_id(0).to(tl.int64)
    if pid < step_programs:
        _write_steps(
            pid, dt, A, dt_bias, seq_idx, offsets, steps, used, l, heads, tl.cdiv(l, CHUNK), sequences, dt_low, dt_high,
            dt_b, dt_l, dt_h, seq_b, seq_l, CHUNK, BLOCK_H, SOFTPLUS, HAS_BIAS, HAS_SEQ, PACKED,
        )  # fmt: skip
    elif STARTS:
        _write_start(
            pid - step_programs, C, z, dt, A, dt_bias, seq_idx, offsets, dy, dvarlen, starts, decays,
            l, heads, per_group, first_piece, pieces, piece, sequences, dt_low, dt_high,
            C_b, C_l, C_g, z_b, z_l, z_h, dt_b, dt_l, dt_h, seq_b, seq_l, dy_b, dy_l, dy_h,
            CHUNK, P, N, BLOCK_P, BLOCK_N, GROUP, NARROW, PRECISION, SOFTPLUS,
            HAS_BIAS, HAS_SEQ, PACKED, HAS_DY, HAS_Z, HAS_VARLEN, STAGES,
        )  # fmt: skip
