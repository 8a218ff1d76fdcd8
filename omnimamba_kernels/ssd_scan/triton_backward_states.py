"""The scan's backward in Triton, first half: the steps, and the gradients dS of the states between chunks.

Maths. With dS' the gradient of the state after a chunk, carry of triton_common.py, V the gradient of the state after a
packed sequence that ends at position e of the chunk:
    dS = carry_end dS' + sum over t of carry_t dy_t C_t^T + sum over sequences of carry_e V

Shapes. dt (b, l, h); dy, z (b, l, h, p); C (b, l, g, n). For the kernels after these:
    steps    (b, h, chunks, 3, CHUNK) float32: dt, and cum of triton_common as two float32
    used     (b, chunks, CHUNK) int8: 0 in padding and past the end
    dstates  (b, chunks, h, p, n) float32: dS' of each chunk
The first step of a sequence, like any step that wipes out the state, counts as FLOOR in cum, whose two parts keep all
its digits: so L, carry and tail are 0 across it, and need no mask but the order of time.

Plan. ssd_steps: a program is a head and a chunk. ssd_back_walk: a program is a head and a tile of its states, from the
last chunk to the first, dS in registers.
Traffic, bytes a position and head: ssd_steps reads dt and writes 12; ssd_back_walk reads dy once for each tile of n, C
for each tile of p, and writes 4 p n / CHUNK: 512 for p 64 and n 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import FLOOR, LOG2E, step_sizes
from .triton_products import load_gradient, load_tile, product_derived_exact


@triton.jit
def chunk_steps(steps, at, CHUNK: tl.constexpr):
    """dt and both parts of the sum; ``at`` counts heads and chunks as they lie in memory."""
    steps += at * (3 * CHUNK) + tl.arange(0, CHUNK)
    return tl.load(steps), tl.load(steps + CHUNK), tl.load(steps + 2 * CHUNK)


@triton.jit
def at_position(v, t, CHUNK: tl.constexpr):
    """v[t]."""
    return tl.sum(tl.where(tl.arange(0, CHUNK) == t, v, 0), 0)


@triton.jit
def sequences_before(offsets, sequences, position):
    """How many packed sequences end at ``position`` or before."""
    first, last = 0, sequences
    while first < last:
        middle = (first + last) // 2
        if tl.load(offsets + middle + 1) > position:
            last = middle
        else:
            first = middle + 1
    return first


@triton.jit
def ssd_steps(
    dt, A, dt_bias, seq_idx, steps, used, l, heads, chunks, dt_low, dt_high, dt_b, dt_l, dt_h, seq_b, seq_l,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    b, head, chunk = at // (heads * chunks), at // chunks % heads, at % chunks
    i = tl.arange(0, CHUNK)
    row = chunk * CHUNK + i
    valid = row < l
    begins = i < 0
    if HAS_SEQ:
        seq_idx += b * seq_b
        seq = tl.load(seq_idx + row * seq_l, mask=valid, other=0)
        before = tl.load(seq_idx + (row - 1) * seq_l, mask=valid & (row > 0), other=0)
        begins = valid & (seq != before)
        valid = valid & (seq >= 0)
    raw = tl.load(dt + b * dt_b + row * dt_l + head * dt_h, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32) if HAS_BIAS else 0.0
    size = tl.where(valid, step_sizes(raw, bias, dt_low, dt_high, SOFTPLUS)[0], 0.0)
    rate = tl.load(A + head).to(tl.float32)
    a = size * (rate * LOG2E)
    begins = begins | (a <= FLOOR)
    cum = tl.cumsum(tl.where(begins, FLOOR, a).to(tl.float64), 0)
    high = cum.to(tl.float32)
    steps += at * (3 * CHUNK) + i
    tl.store(steps, size)
    tl.store(steps + CHUNK, high)
    tl.store(steps + 2 * CHUNK, (cum - high).to(tl.float32))
    if head == 0:
        tl.store(used + b * chunks * CHUNK + row, valid.to(tl.int8))


@triton.jit
def ssd_back_walk(
    C, z, steps, used, offsets, dy, dfinal, dvarlen, dstates, dinitial, heads, per_group, chunks, sequences,
    C_b, C_l, C_g, z_b, z_l, z_h, dy_b, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_VARLEN: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    p_blocks, n_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    bh = (pid // (n_blocks * p_blocks)).to(tl.int64)
    b, head = bh // heads, bh % heads
    i = tl.arange(0, CHUNK)
    column = pid // n_blocks % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    state = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < P)[:, None] & (state < N)[None, :]
    tile = column[:, None] * N + state[None, :]
    C += b * C_b + head // per_group * C_g
    if HAS_DY:
        dy += b * dy_b + head * dy_h
    if HAS_Z:
        z += b * z_b + head * z_h
    dS = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_FINAL:
        dS = tl.load(dfinal + bh * (P * N) + tile, mask=inside, other=0.0).to(tl.float32)
    for k in range(chunks):
        chunk = b * 0 + (chunks - 1 - k)  # 64 bits wide
        tl.store(dstates + ((b * chunks + chunk) * heads + head) * (P * N) + tile, dS, mask=inside)
        _, high, low = chunk_steps(steps, bh * chunks + chunk, CHUNK)
        start = chunk * CHUNK
        valid = tl.load(used + b * chunks * CHUNK + start + i) > 0
        carry = tl.exp2(high + low)
        dS *= at_position(carry, CHUNK - 1, CHUNK)
        if HAS_DY:
            C_tile = load_tile(C + start * C_l, i, C_l, state, N, BLOCK_N, valid, NARROW)
            dy_chunk = dy + start * dy_l
            z_chunk = z + start * z_l if HAS_Z else z
            dy_tile = load_gradient(dy_chunk, z_chunk, i, dy_l, z_l, column, P, BLOCK_P, valid, NARROW, HAS_DY, HAS_Z)
            reaching = tl.trans(dy_tile.to(tl.float32) * carry[:, None])
            dS = product_derived_exact(reaching, C_tile, dS, NARROW, PRECISION)
        if HAS_VARLEN:
            for j in range(sequences_before(offsets, sequences, start),
                           sequences_before(offsets, sequences, start + CHUNK)):  # fmt: skip
                end = tl.load(offsets + j + 1)
                reached = at_position(carry, end - start - 1, CHUNK)
                reached = tl.where(end > tl.load(offsets + j), reached, 0.0)
                at = (j * heads + head) * (P * N)
                dS += reached * tl.load(dvarlen + at + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        if HAS_VARLEN:
            if sequences > 0:
                empty = tl.where(tl.load(offsets + 1) == 0, 1.0, 0.0)
                dS += empty * tl.load(dvarlen + head * (P * N) + tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(dinitial + bh * (P * N) + tile, dS.to(dinitial.dtype.element_ty), mask=inside)
