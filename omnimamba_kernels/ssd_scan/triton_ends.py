"""What the scan's forward walk needs beforehand: steps and decays of every chunk, and what earlier segments leave.

    steps   dt, cum about the middle of its range, carry, tail dt of each position; of float32 x (EXACT)
            2^-low dt, high, 2^low, tail dt, where cum = high + low, both float32
    ends    S at the end of a piece of the sequence that started from nothing
    decays  log2 of what is left, after that piece, of the state before it; -inf where a sequence begins in it

Shapes: steps (b, chunks, h, 4, CHUNK) float32; lasts (b, chunks, CHUNK) int32, the last position in its chunk of each
position's sequence, -1 in padding and past the end; ends (b, h, pieces, p, n) and decays (b, h, pieces)
float32. The names are those of triton_common.py; carry is -1, 2^low is negative where a sequence has begun, so that not
even a NaN in the state crosses into it.

Plan: one launch with two roles. Steps: a program takes a chunk and BLOCK_H heads, reads dt along the heads and writes
along the positions; of packed sequences it finds each position's among their offsets, by bisection. Ends, only where
the walk is cut into segments: a program takes a head, a tile of its state and a piece of the sequence, which it walks
backward from its end. A position's weight is its decay to that end, so that nothing is rescaled, and the walk stops,
GROUP chunks at a time, where a sequence begins or the decay leaves nothing.
The state after a packed sequence is found the same way, from the sequence's end, by programs after those of pieces.
A walk over packed sequences ends where the one begins that it is in at its own end: one bisection a program.

Traffic a position and head: dt read and 16 bytes written; ends reads x and B once more, 2 p bytes of 16-bit x and B
through the cache, as far as it goes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    centred,
    decay_sums,
    listed_sequences,
    offsets_up_to,
    packed_sequences,
    split_dot,
    step_sizes,
)

NOTHING = tl.constexpr(-150.0)  # log2 of a factor that is 0 in float32


@triton.jit
def write_steps(
    pid, dt, A, dt_bias, seq, cu_seqlens, steps, lasts, l, h, chunks, sequences, dt_low, dt_high,
    dt_b, dt_l, dt_h, A_h, bias_h, seq_b, seq_l, cu_i,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(h, BLOCK_H)
    head_block, pid = pid % head_blocks, pid // head_blocks
    chunk, row = pid % chunks, (pid // chunks).to(tl.int64)
    cs = tl.arange(0, CHUNK)
    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * CHUNK + cs
    valid, head_in = t < l, heads < h
    inside = valid[:, None] & head_in[None]
    wide = heads.to(tl.int64)
    at = row * dt_b + t.to(tl.int64)[:, None] * dt_l + wide[None] * dt_h
    raw = tl.load(dt + at, mask=inside, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + wide * bias_h, mask=head_in, other=0.0).to(tl.float32)[None]
    rate = tl.load(A + wide * A_h, mask=head_in, other=0.0).to(tl.float32)[None]
    step = tl.where(inside, step_sizes(raw, bias, dt_low, dt_high, SOFTPLUS)[0], 0.0)
    if HAS_SEQ or PACKED:
        if PACKED:
            keep, begins = packed_sequences(cu_seqlens, cu_i, sequences, t, valid, l)
        else:
            keep, begins = listed_sequences(seq + row * seq_b, seq_l, t, valid)
        run, last_run = tl.cumsum(begins.to(tl.int32), 0), tl.sum(begins.to(tl.int32), 0)
        step = tl.where(keep[:, None], step, 0.0)
        if head_block == 0:
            last = tl.sum((run[None] <= run[:, None]).to(tl.int32), 1) - 1
            tl.store(lasts + (row * chunks + chunk) * CHUNK + cs, tl.where(keep, last, -1))
    high, low, end_high, end_low = decay_sums(step, rate)
    if EXACT:
        middle, carry, share = high, tl.exp2(low), step * tl.exp2(-low)
    else:
        middle, carry, share = centred(high, low, end_high[None]), tl.exp2(high + low), step
    weight = step * tl.exp2((end_high[None] - high) + (end_low[None] - low))
    if HAS_SEQ or PACKED:
        carry = tl.where((run == 0)[:, None], carry, -carry if EXACT else -1.0)
        weight = tl.where((run == last_run)[:, None], weight, 0.0)
    out = steps + ((row * chunks + chunk) * h + wide[None]) * (4 * CHUNK) + cs[:, None]
    tl.store(out, share, mask=head_in[None])
    tl.store(out + CHUNK, middle, mask=head_in[None])
    tl.store(out + 2 * CHUNK, carry, mask=head_in[None])
    tl.store(out + 3 * CHUNK, weight, mask=head_in[None])


@triton.jit
def walk_back(
    state, x, dt, B, seq, start, end, l, rate, bias, dt_low, dt_high, x_l, dt_l, B_l, seq_l, ps, ns, p_in, n_in,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, HAS_SEQ: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``state`` + what positions [start, end) leave at ``end``, and log2 of what is left there of the state before."""
    cs = tl.arange(0, CHUNK)
    after = tl.full((), 0.0, tl.float32)
    while (end > start) & ~(after < NOTHING):
        for _ in tl.range(0, GROUP, num_stages=STAGES):
            end -= CHUNK
            t = end + cs
            rows = t.to(tl.int64)
            valid = t >= start
            raw = tl.load(dt + rows * dt_l, mask=valid, other=0.0).to(tl.float32)
            step = step_sizes(raw, bias, dt_low, dt_high, SOFTPLUS)[0]
            keep = valid
            if HAS_SEQ:
                keep, begins = listed_sequences(seq, seq_l, t, valid)
                run, last_run = tl.cumsum(begins.to(tl.int32), 0), tl.sum(begins.to(tl.int32), 0)
            step = tl.where(keep, step, 0.0)
            x_tile = tl.load(x + rows[:, None] * x_l + ps[None], mask=keep[:, None] & p_in[None], other=0.0)
            B_tile = tl.load(B + rows[:, None] * B_l + ns[None], mask=keep[:, None] & n_in[None], other=0.0)
            if not NARROW:
                B_tile = B_tile.to(tl.float32)
            high, low, end_high, end_low = decay_sums(step, rate)
            weight = step * tl.exp2(((end_high - high) + (end_low - low)) + after)
            if HAS_SEQ:
                weight = tl.where(run == last_run, weight, 0.0)
            weighted = tl.trans(x_tile).to(tl.float32) * weight[None]
            found = split_dot(weighted, B_tile, state, NARROW, PRECISION)
            if HAS_SEQ:  # beyond a sequence's beginning nothing counts, not even a NaN
                state = tl.where(after == float("-inf"), state, found)
                after = tl.where(last_run > 0, float("-inf"), after + (end_high + end_low))
            else:
                state = found
                after += end_high + end_low
    return state, after


@triton.jit
def _packed_range(cu_seqlens, cu_i, sequences, start, end, l):
    """From where on positions before ``end`` count there, and whether the state before ``start`` does, by the offsets
    of packed sequences."""
    count = offsets_up_to(cu_seqlens, cu_i, sequences + 1, end - 1, l)
    in_one = (count > 0) & (count <= sequences)
    begin = tl.minimum(tl.load(cu_seqlens + (count - 1).to(tl.int64) * cu_i, mask=in_one, other=0), l)
    reached = (end == 0) | (in_one & ((begin < start) | ((start == 0) & (count == 1))))
    return tl.where(in_one, tl.maximum(start, begin.to(tl.int32)), end), reached


@triton.jit
def _store_end(ends, decays, index, state, after, at, inside, p_block, n_block, SIZE: tl.constexpr):
    tl.store(ends + index * SIZE + at, state, mask=inside)
    if (p_block == 0) & (n_block == 0):
        tl.store(decays + index, after)


@triton.jit(do_not_specialize=["sequences"])
def ssd_ends(
    x, dt, A, B, dt_bias, initial, seq, cu_seqlens, steps, lasts, ends, decays, varlen,
    l, h, per_group, step_programs, pieces, piece, sequences, dt_low, dt_high,
    x_b, x_l, x_h, dt_b, dt_l, dt_h, A_h, B_b, B_l, B_g, bias_h, initial_h, initial_p, initial_n, seq_b, seq_l, cu_i,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr, SOFTPLUS: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEQ: tl.constexpr, PACKED: tl.constexpr, VARLEN: tl.constexpr, ENDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below ``step_programs`` write steps, the next the ends of ``pieces`` pieces of ``piece`` positions from
    the row's start, the last (VARLEN, of one row) those of packed sequences, with what is left of the initial state.
    PACKED: the sequences are those of ``cu_seqlens``, else of ``seq`` if HAS_SEQ."""
    pid = tl.program_id(0)
    if pid < step_programs:
        write_steps(pid, dt, A, dt_bias, seq, cu_seqlens, steps, lasts, l, h, tl.cdiv(l, CHUNK), sequences, dt_low,
                    dt_high, dt_b, dt_l, dt_h, A_h, bias_h, seq_b, seq_l, cu_i, CHUNK, BLOCK_H, SOFTPLUS, EXACT,
                    HAS_BIAS, HAS_SEQ, PACKED)  # fmt: skip
    elif ENDS:
        pid -= step_programs
        P_BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
        N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        n_block, pid = pid % N_BLOCKS, pid // N_BLOCKS
        p_block, pid = pid % P_BLOCKS, pid // P_BLOCKS
        head, pid = (pid % h).to(tl.int64), pid // h
        if VARLEN:
            packed, row = pid >= pieces, tl.full((), 0, tl.int64)
            which = tl.where(packed, pid.to(tl.int64) - pieces, pid)
        else:
            which, row = (pid % pieces).to(tl.int64), (pid // pieces).to(tl.int64)
        ps, ns = p_block * BLOCK_P + tl.arange(0, BLOCK_P), n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        p_in, n_in = ps < P, ns < N
        inside = p_in[:, None] & n_in[None]
        start = tl.minimum(tl.maximum(which, 0) * piece, l).to(tl.int32)
        end = start + piece
        if VARLEN:
            begins = tl.minimum(tl.load(cu_seqlens + which * cu_i, mask=packed, other=0), l).to(tl.int32)
            finish = tl.minimum(tl.load(cu_seqlens + (which + 1) * cu_i, mask=packed, other=0), l).to(tl.int32)
            start = tl.where(packed, 0, start)
            end = tl.where(packed, tl.where(finish > begins, finish, 0), end)
        if PACKED:
            start, reached = _packed_range(cu_seqlens, cu_i, sequences, start, end, l)
        rate = tl.load(A + head * A_h).to(tl.float32)
        bias = tl.load(dt_bias + head * bias_h).to(tl.float32) if HAS_BIAS else 0.0
        state, after = walk_back(
            tl.zeros((BLOCK_P, BLOCK_N), tl.float32), x + row * x_b + head * x_h, dt + row * dt_b + head * dt_h,
            B + row * B_b + head // per_group * B_g, seq + row * seq_b if HAS_SEQ else seq, start, end, l, rate, bias,
            dt_low, dt_high, x_l, dt_l, B_l, seq_l, ps, ns, p_in, n_in,
            CHUNK, GROUP, SOFTPLUS, NARROW, PRECISION, HAS_SEQ, STAGES,
        )  # fmt: skip
        if PACKED:
            after = tl.where(reached, after, float("-inf"))
        at = ps[:, None] * N + ns[None]
        if VARLEN:
            if packed:
                if HAS_INITIAL:
                    if ~(after < NOTHING) & ((end > 0) | (which == 0)):
                        initial_at = head * initial_h + ps[:, None].to(tl.int64) * initial_p + ns[None] * initial_n
                        state += tl.exp2(after) * tl.load(initial + initial_at, mask=inside, other=0.0).to(tl.float32)
                tl.store(varlen + (which * h + head) * P * N + at, state, mask=inside)
            else:
                _store_end(ends, decays, (row * h + head) * pieces + which, state, after, at, inside, p_block, n_block,
                           P * N)  # fmt: skip
        else:
            _store_end(ends, decays, (row * h + head) * pieces + which, state, after, at, inside, p_block, n_block,
                       P * N)  # fmt: skip
