"""The scan's backward in Triton, first half: the gradients dS of the states between chunks.

Maths. With dS' the gradient of the state after a chunk, carry of triton_common.py, V the gradient of the state after a
packed sequence that ends at position e of the chunk:
    dS = carry_end dS' + sum over t of carry_t dy_t C_t^T + sum over sequences of carry_e V

Shapes. dy, z (b, l, h, p); C (b, l, g, n); steps, used, starts and decays as triton_backward_starts.py left them.
    dstates  (b, chunks, h, p, n) float32: dS' of each chunk

Plan. A program is a head, a tile of its states and a segment of the sequence, which it walks from its last chunk to its
first, dS in registers. Where heads and tiles are too few to fill the chip there are several segments, and the prologue
folds what later ones leave into dS, the nearest first, as far as anything is left. No program waits for another.
Traffic, bytes a position and head: dy once for each tile of n, C for each tile of p, and 4 p n / CHUNK written: 512 for
p 64 and n 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward_starts import NOTHING, at_position, offset_at, sequences_before
from .triton_products import load_gradient, load_tile, product_derived_exact


@triton.jit
def chunk_steps(steps, at, CHUNK: tl.constexpr):
    """dt and both parts of the sum; ``at`` counts heads and chunks as they lie in memory."""
    steps += at * (3 * CHUNK) + tl.arange(0, CHUNK)
    return tl.load(steps), tl.load(steps + CHUNK), tl.load(steps + 2 * CHUNK)


@triton.jit
def _seed(
    starts, decays, dfinal, bh, piece, pieces, tile, inside, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SEEDED: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before ``piece``."""
    dS = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    after = tl.full((), 0.0, tl.float64)
    if SEEDED:
        while (piece < pieces) & ~(after < NOTHING):
            at = bh * pieces + piece
            found = tl.load(starts + at * (P * N) + tile, mask=inside, other=0.0)
            dS += tl.exp2(after.to(tl.float32)) * found
            after += tl.load(decays + at)
            piece += 1
    if HAS_FINAL:
        if ~(after < NOTHING):
            found = tl.load(dfinal + bh * (P * N) + tile, mask=inside, other=0.0).to(tl.float32)
            dS += tl.exp2(after.to(tl.float32)) * found
    return dS


@triton.jit(do_not_specialize=["sequences"])
def ssd_back_walk(
    C, z, steps, used, offsets, dy, dfinal, dvarlen, starts, decays, dstates, dinitial,
    l, heads, per_group, chunks, segments, chunks_each, pieces_each, sequences,
    C_b, C_l, C_g, z_b, z_l, z_h, dy_b, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_VARLEN: tl.constexpr, HAS_INITIAL: tl.constexpr, SEEDED: tl.constexpr,
):  # fmt: skip
    p_blocks, n_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    state = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // n_blocks
    column = pid % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    pid = pid // p_blocks
    head, pid = (pid % heads).to(tl.int64), pid // heads
    segment, b = pid % segments, (pid // segments).to(tl.int64)
    bh = b * heads + head
    inside = (column < P)[:, None] & (state < N)[None, :]
    tile = column[:, None] * N + state[None, :]
    C += b * C_b + head // per_group * C_g
    if HAS_DY:
        dy += b * dy_b + head * dy_h
    if HAS_Z:
        z += b * z_b + head * z_h
    dS = _seed(
        starts, decays, dfinal, bh, segment * pieces_each, (segments - 1) * pieces_each, tile, inside,
        P, N, BLOCK_P, BLOCK_N, SEEDED, HAS_FINAL,
    )  # fmt: skip
    first = segment * chunks_each
    last = tl.minimum(first + chunks_each, chunks)
    for k in range(last - first):
        chunk = b * 0 + (last - 1 - k)  # 64 bits wide
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
            for j in range(sequences_before(offsets, sequences, start, l),
                           sequences_before(offsets, sequences, start + CHUNK, l)):  # fmt: skip
                end = offset_at(offsets, j + 1, l)
                reached = at_position(carry, end - start - 1, CHUNK)
                reached = tl.where(end > offset_at(offsets, j, l), reached, 0.0)
                at = (j * heads + head) * (P * N)
                dS += reached * tl.load(dvarlen + at + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        if first == 0:
            if HAS_VARLEN:
                if sequences > 0:
                    empty = tl.where(tl.load(offsets + 1) == 0, 1.0, 0.0)
                    dS += empty * tl.load(dvarlen + head * (P * N) + tile, mask=inside, other=0.0).to(tl.float32)
            tl.store(dinitial + bh * (P * N) + tile, dS.to(dinitial.dtype.element_ty), mask=inside)
