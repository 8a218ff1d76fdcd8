"""The scan's forward walk: y, the final states, and for a backward the states between chunks.

    y_t = (C_t (carry_t S) + sum over s <= t of L_ts (C_t . B_s) dt_s x_s + D x_t) silu(z_t)
    S  <- 2^cum_end S + sum over s of tail_s dt_s x_s B_s^T

Shapes: x, y, z (b, l, h, p), B, C (b, l, g, n), S (p, n) of a batch row and head; L, carry, tail and cum_end as in
triton_common.py; ``steps``, ``lasts``, ``ends`` and ``decays`` as triton_ends.py left them.

Plan: a program owns one head of one batch row, BLOCK_P of its channels, and a segment of the sequence, which it walks
chunk by chunk with S in float32 registers. All is transposed, y^T = S C^T, so that S and x o (tail dt) enter the matrix
units from the registers that hold them and only the scores pass through shared memory. Heads vary fastest over
programs: those that share B and C run together and find them in the L2 cache. Where batch rows and heads are too few to
fill the chip there are several segments, and the prologue folds what earlier segments left into S. No program waits for
another. In float32, tiles need twice the registers: there chunks are shorter and the state is held in several parts.

Traffic a position and head at p 64, n 128, 16-bit storage: x and y 2 x 128 bytes, steps 16; B and C from L2, 512 bytes.
``states`` adds 512 bytes, z 128, ``ungated`` 128.

Precision: 16-bit x, B, C enter as they are; S and the scores are rounded once to their type, whose error stays below
that of y's own rounding. What enters S is split into TERMS parts of that type, because S is handed out in float32. In
float32 (NARROW false) products run in PRECISION.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import decay_between, split_dot

NOTHING = tl.constexpr(-150.0)  # log2 of a factor that is 0 in float32


@triton.jit
def seed(state, ends, decays, initial, index, count, size, at, initial_at, inside, SEEDED: tl.constexpr,
         HAS_INITIAL: tl.constexpr):  # fmt: skip
    """``state`` + what is left of earlier pieces, the last ``count`` before ``index``, and of the initial state.

    The nearest comes first. Nothing is read from before a sequence's beginning, or from where nothing is left.
    """
    after = tl.full((), 0.0, tl.float32)
    if SEEDED:
        piece = index + count - 1
        while (piece >= index) & ~(after < NOTHING):
            state += tl.exp2(after) * tl.load(ends + piece * size + at, mask=inside, other=0.0)
            after += tl.load(decays + piece)
            piece -= 1
    if HAS_INITIAL:
        if ~(after < NOTHING):
            state += tl.exp2(after) * tl.load(initial + initial_at, mask=inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def load_rows(at, rows_in, columns_in, EVEN: tl.constexpr):
    """A tile, 0 outside; EVEN: no row is outside."""
    if EVEN:
        return tl.load(at, mask=columns_in[None], other=0.0)
    return tl.load(at, mask=rows_in[:, None] & columns_in[None], other=0.0)


@triton.jit
def store_rows(at, tile, rows_in, columns_in, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at, tile, mask=columns_in[None])
    else:
        tl.store(at, tile, mask=rows_in[:, None] & columns_in[None])


@triton.jit
def ssd_walk(
    x, B, C, D, z, initial, steps, lasts, ends, decays, y, final, states, ungated,
    l, h, per_group, segments, chunks_each, pieces_each,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_h, D_p, z_b, z_l, z_h, initial_b, initial_h, initial_p, initial_n,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    N_PARTS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, SEEDED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, SAVE: tl.constexpr,
    KEEP_EVERY: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    P_BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    p_block, pid = pid % P_BLOCKS, pid // P_BLOCKS
    head, pid = (pid % h).to(tl.int64), pid // h
    segment, row = pid % segments, (pid // segments).to(tl.int64)
    chunks = tl.cdiv(l, CHUNK)
    first = segment * chunks_each
    last = tl.minimum(first + chunks_each, chunks)
    kept = tl.cdiv(chunks, KEEP_EVERY)
    group, index = head // per_group, row * h + head

    cs, ns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    ps = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_in = ps < P
    if HAS_D:
        skip = tl.load(D + head * D_h + ps * D_p, mask=p_in, other=0.0).to(tl.float32)
    initial_at = row * initial_b + head * initial_h + ps[:, None].to(tl.int64) * initial_p
    piece_at = index * (segments - 1) * pieces_each
    parts = ()  # the state, BLOCK_N columns a part
    for k in tl.static_range(N_PARTS):
        n_at = k * BLOCK_N + ns
        part = seed(tl.zeros((BLOCK_P, BLOCK_N), tl.float32), ends, decays, initial, piece_at, segment * pieces_each,
                    P * N, ps[:, None] * N + n_at[None], initial_at + n_at[None].to(tl.int64) * initial_n,
                    p_in[:, None] & (n_at < N)[None], SEEDED, HAS_INITIAL)  # fmt: skip
        parts = parts + (part,)
    x += row * x_b + head * x_h
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    if HAS_SEQ:
        lasts += row * chunks * CHUNK
    steps += index * chunks * (4 * CHUNK)
    y_l = h * P
    y += row * l * y_l + head * P
    if HAS_Z:
        z += row * z_b + head * z_h
        if SAVE:
            ungated += row * l * y_l + head * P
    if SAVE:
        states += (row * kept * h + head) * P * N

    for chunk in tl.range(first, last, num_stages=STAGES):
        t = chunk * CHUNK + cs
        rows = t.to(tl.int64)
        keep = t < l
        if HAS_SEQ:
            keep = tl.load(lasts + t) >= 0
        x_tile = load_rows(x + rows[:, None] * x_l + ps[None], keep, p_in, EVEN)
        if not NARROW:
            x_tile = x_tile.to(tl.float32)
        here = steps + tl.full((), 4 * CHUNK, tl.int64) * chunk

        scores, out = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((BLOCK_P, CHUNK), tl.float32)
        B_tiles = ()
        for k in tl.static_range(N_PARTS):
            n_at = k * BLOCK_N + ns
            B_tile = load_rows(B + rows[:, None] * B_l + n_at[None], keep, n_at < N, EVEN)
            C_tile = load_rows(C + rows[:, None] * C_l + n_at[None], keep, n_at < N, EVEN)
            if not NARROW:
                B_tile, C_tile = B_tile.to(tl.float32), C_tile.to(tl.float32)
            if SAVE:
                saved = states + tl.full((), P * N, tl.int64) * (chunk // KEEP_EVERY * h)
                now = (chunk % KEEP_EVERY == 0) & p_in[:, None] & (n_at < N)[None]
                tl.store(saved + ps[:, None] * N + n_at[None], parts[k], mask=now)
            B_tiles = B_tiles + (B_tile,)
            scores = tl.dot(B_tile, tl.trans(C_tile), scores, input_precision=PRECISION)
            out = tl.dot(parts[k].to(C_tile.dtype), tl.trans(C_tile), out, input_precision=PRECISION)
        carry = tl.load(here + 2 * CHUNK + cs)
        out *= carry[None]
        if HAS_SEQ:
            out = tl.where((carry < 0.0)[None], 0.0, out)
        causal = cs[:, None] <= cs[None]
        if HAS_SEQ:
            causal &= cs[None] <= tl.load(lasts + t)[:, None]
        step, middle_t, middle_s = tl.load(here + cs), tl.load(here + CHUNK + cs), tl.load(here + CHUNK + cs)
        scores *= decay_between(middle_t[None], None, middle_s[:, None], None, causal) * step[:, None]
        x_turned = tl.trans(x_tile)
        out = tl.dot(x_turned, scores.to(x_tile.dtype), out, input_precision=PRECISION)
        if HAS_D:
            out += skip[:, None] * x_turned.to(tl.float32)
        out = tl.trans(out)
        if HAS_SEQ:
            out = tl.where(keep[:, None], out, 0.0)
        y_tile = rows[:, None] * y_l + ps[None]
        if HAS_Z:
            if SAVE:
                store_rows(ungated + y_tile, out, t < l, p_in, EVEN)
            gate = load_rows(z + rows[:, None] * z_l + ps[None], keep, p_in, EVEN).to(tl.float32)
            out *= gate / (1.0 + tl.exp(-gate))
        store_rows(y + y_tile, out, t < l, p_in, EVEN)

        weight, through = tl.load(here + 3 * CHUNK + cs), tl.load(here + 3 * CHUNK - 1)
        weighted = x_turned.to(tl.float32) * weight[None]
        grown = ()
        for k in tl.static_range(N_PARTS):
            n_at, B_tile = k * BLOCK_N + ns, B_tiles[k]
            if not NARROW and N_PARTS > 1:  # float32 is read again rather than held
                B_tile = load_rows(B + rows[:, None] * B_l + n_at[None], keep, n_at < N, EVEN)
                if not NARROW:
                    B_tile = B_tile.to(tl.float32)
            part = parts[k] * through
            if HAS_SEQ:
                part = tl.where(through < 0.0, 0.0, part)
            grown = grown + (split_dot(weighted, B_tile, part, NARROW, PRECISION),)
        parts = grown
    if last == chunks:
        for k in tl.static_range(N_PARTS):
            n_at = k * BLOCK_N + ns
            at = index * P * N + ps[:, None] * N + n_at[None]
            tl.store(final + at, parts[k], mask=p_in[:, None] & (n_at < N)[None])
