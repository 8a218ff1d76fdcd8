"""The scan's forward walk: y, the final states, and for a backward the states between chunks.

    y_t = (C_t (carry_t S) + sum over s <= t of L_ts (C_t . B_s) dt_s x_s + D x_t) silu(z_t)
    S  <- 2^cum_end S + sum over s of tail_s dt_s x_s B_s^T

Shapes: x, y, z (b, l, h, p), B, C (b, l, g, n), S (p, n) of a batch row and head; L, carry, tail and cum_end as in
triton_common.py; ``steps``, ``lasts``, ``ends`` and ``decays`` as triton_ends.py left them.

Plan: a program owns HEADS heads of one group and batch row, BLOCK_P channels of each, and a segment of the sequence,
which it walks chunk by chunk with their S in float32 registers. B, C and C B^T of a chunk serve all its heads. All is
transposed, y^T = S C^T, so that S and x o (tail dt) enter the matrix units from the registers that hold them and only
the scores pass through shared memory. Heads vary fastest over programs: those that share B and C run together and find
them in the L2 cache. Where batch rows and heads are too few to fill the chip there are several segments, and the
prologue folds what earlier segments left into S. No program waits for another. In float32, tiles need twice the
registers: there chunks are shorter, the state is held in several parts and each head has a program.

Traffic a position and head at p 64, n 128, 16-bit storage: x and y 2 x 128 bytes, steps 20; B and C from L2, 512 bytes
over HEADS. ``states`` adds 512 bytes, z 128, ``ungated`` 128.

Who forms C B^T (64 heads, 1 group, n 128, p 64, bfloat16; clocks of an H100's multiprocessor for a head's 64 positions,
computed and not measured: 4096 FLOPs of wgmma a clock, half of that by mma, 16 exponentials, 26 bytes from L2, 19 from
HBM, from which what has to come takes 915 clocks):

                                         C B^T  S C^T  scores x  S anew  products  from L2  exponentials
    chunk 64, each head                    256    256       128     768      1408     1631           256
    chunk 64, each reads the group's         0    256       128     768      1152     1947           256
    chunk 64, pairs of heads               128    256       128     768      1280      998           256  spills
    chunk 32, pairs of heads               128    256        64     768      1216      998           128

To read it, 8 KB in 16 bits and twice that in float32, takes longer than to form it, and spares nothing of B and C; a
pair of heads spares half of all three. In chunks of 64 it spills 524 bytes a thread, so plain walks go by pairs in
chunks of 32, without spills. With states to save a pair spills 16 bytes on Hopper: there, and with a gate or sequences,
each head has a program.

The exponentials of L are CHUNK^2 a head and chunk, a ninth of the products' time and beside them: they are not the
bound. Factors about an anchor, 2^(cum_t - anchor) 2^(anchor - cum_s) outside the two diagonal blocks of 16, would leave
576 of 1024, at the price of a second product for each score. L is formed directly, from differences at most 0.

Of float32 x (EXACT) one float32 of cum keeps too few of L's digits: L_ts = 2^(high_t - high_s) 2^low_t 2^-low_s, and
carry_t = 2^high_t 2^low_t. In 16 bits y's own rounding hides what is lost, at most 1e-4 of a term.

Precision: 16-bit x, B, C enter as they are; S and the scores are rounded once to their type, whose error stays below
that of y's own rounding. What enters S is split into TERMS parts of that type, because S is handed out in float32. In
float32 (NARROW false) products run in PRECISION.

An infinity or NaN of x, B or dt goes where the recurrence takes it, and, as 0 times it, to the same channels of the
positions before it in its chunk: y has NaN there. In the state its row or column may be NaN instead of infinite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import decay_between, split_dot

NOTHING = tl.constexpr(-150.0)  # log2 of a factor that is 0 in float32
_WIDE = "the assembler asks for several parts of the state at once; other tiles, warps and chunks spill more"
SPILLS = (
    ("ssd_walk", "sm_80", {"N": 128, "NARROW": False}, 4, f"Triton 3.8: {_WIDE}"),
    ("ssd_walk", "sm_120", {"N": 128, "NARROW": False}, 68, f"Triton 3.8: {_WIDE}"),
    ("ssd_walk", "sm_100", {"N": 256, "NARROW": False}, 36, f"Triton 3.8: {_WIDE}"),
    ("ssd_walk", "sm_120", {"N": 256, "NARROW": False}, 160, f"Triton 3.8: {_WIDE}"),
    ("ssd_walk", "sm_100", {"N": 256, "NARROW": False}, 12, f"Triton 3.9: {_WIDE}"),
    ("ssd_walk", "sm_120", {"N": 256, "NARROW": False}, 108, f"Triton 3.9: {_WIDE}"),
    ("ssd_walk", "sm_100", {"N": 256, "NARROW": False}, 8, _WIDE),
    ("ssd_walk", "sm_120", {"N": 256, "NARROW": False}, 32, _WIDE),
)


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
def load_rows(at, rows_in, columns_in, EVEN: tl.constexpr, KEEP: tl.constexpr):
    """A tile, 0 outside; EVEN: no row and no column is outside. KEEP is the cache's policy."""
    if EVEN:
        return tl.load(at, eviction_policy=KEEP)
    return tl.load(at, mask=rows_in[:, None] & columns_in[None], other=0.0, eviction_policy=KEEP)


@triton.jit
def store_rows(at, tile, rows_in, columns_in, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=rows_in[:, None] & columns_in[None])


@triton.jit
def forget_and_weigh(scores, here, causal, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """(L o C B^T) dt of one head, transposed, from C B^T of its group."""
    cs = tl.arange(0, CHUNK)
    step, cum_t, cum_s = tl.load(here + cs), tl.load(here + CHUNK + cs), tl.load(here + CHUNK + cs)
    scores *= decay_between(cum_t[None], None, cum_s[:, None], None, causal) * step[:, None]
    if EXACT:
        scores *= tl.abs(tl.load(here + 2 * CHUNK + cs))[None]
    return scores


@triton.jit
def load_carry(at, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """carry, and whether a sequence has begun: nothing is left then, not even a NaN."""
    carry = tl.load(at + 2 * CHUNK)
    begun = carry < 0.0
    if EXACT:
        carry *= tl.exp2(tl.load(at + CHUNK))
    return carry, begun


@triton.jit
def ssd_walk(
    x, B, C, D, z, initial, steps, lasts, ends, decays, y, final, states, ungated,
    l, h, per_group, segments, chunks_each, pieces_each,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_h, D_p, z_b, z_l, z_h, initial_b, initial_h, initial_p, initial_n,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, N_PARTS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    SEEDED: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr,
    SAVE: tl.constexpr, KEEP_EVERY: tl.constexpr, EVEN: tl.constexpr, AGAIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    P_BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    p_block, pid = pid % P_BLOCKS, pid // P_BLOCKS
    head, pid = (pid % (h // HEADS)).to(tl.int64) * HEADS, pid // (h // HEADS)
    segment, row = pid % segments, (pid // segments).to(tl.int64)
    chunks = tl.cdiv(l, CHUNK)
    first = segment * chunks_each
    last = tl.minimum(first + chunks_each, chunks)
    kept = tl.cdiv(chunks, KEEP_EVERY)
    group, index = head // per_group, row * h + head

    # What is read again rather than held has another policy then, or the compiler would make one load of both.
    FIRST: tl.constexpr = "evict_last" if AGAIN else ""
    cs, ns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    ps = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_in = ps < P
    parts, skips = (), ()  # each head's state, BLOCK_N columns a part, and D
    for i in tl.static_range(HEADS):
        if HAS_D:
            skips += (tl.load(D + (head + i) * D_h + ps.to(tl.int64) * D_p, mask=p_in, other=0.0).to(tl.float32),)
        initial_at = row * initial_b + (head + i) * initial_h + ps[:, None].to(tl.int64) * initial_p
        piece_at = (index + i) * (segments - 1) * pieces_each
        for k in tl.static_range(N_PARTS):
            n_at = k * BLOCK_N + ns
            part = seed(tl.zeros((BLOCK_P, BLOCK_N), tl.float32), ends, decays, initial, piece_at,
                        segment * pieces_each, P * N, ps[:, None] * N + n_at[None],
                        initial_at + n_at[None].to(tl.int64) * initial_n, p_in[:, None] & (n_at < N)[None], SEEDED,
                        HAS_INITIAL)  # fmt: skip
            parts = parts + (part,)
    x += row * x_b + head * x_h
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    if HAS_SEQ:
        lasts += row * chunks * CHUNK
    steps += (row * chunks * h + head) * (4 * CHUNK)
    y_l = h * P
    y += row * l * y_l + head * P
    if HAS_Z:
        z += row * z_b + head * z_h
        if SAVE:
            ungated += row * l * y_l + head * P
    if SAVE:
        states += (row * kept * h + head) * P * N

    skipped = first.to(tl.int64) * CHUNK
    x, B, C, y = x + skipped * x_l, B + skipped * B_l, C + skipped * C_l, y + skipped * y_l
    steps += skipped * 4 * h
    if HAS_Z:
        z += skipped * z_l
        if SAVE:
            ungated += skipped * y_l
    for chunk in tl.range(first, last, num_stages=STAGES):
        t = chunk * CHUNK + cs
        keep = t < l
        if HAS_SEQ:
            keep = tl.load(lasts + t) >= 0
        scores = tl.zeros((CHUNK, CHUNK), tl.float32)
        B_tiles, C_tiles = (), ()
        for k in tl.static_range(N_PARTS):
            n_at = k * BLOCK_N + ns
            B_tile = load_rows(B + (cs[:, None] * B_l + n_at[None]), keep, n_at < N, EVEN, FIRST)
            C_tile = load_rows(C + (cs[:, None] * C_l + n_at[None]), keep, n_at < N, EVEN, FIRST)
            if not NARROW:
                B_tile, C_tile = B_tile.to(tl.float32), C_tile.to(tl.float32)
            B_tiles, C_tiles = B_tiles + (B_tile,), C_tiles + (C_tile,)
            scores = tl.dot(B_tile, tl.trans(C_tile), scores, input_precision=PRECISION)
        causal = t[:, None] <= t[None]
        if HAS_SEQ:
            causal &= cs[None] <= tl.load(lasts + t)[:, None]
        faded = ()
        for i in tl.static_range(HEADS):
            one = forget_and_weigh(scores, steps + i * 4 * CHUNK, causal, CHUNK, EXACT)
            faded = faded + (one.to(B_tiles[0].dtype),)

        grown = ()
        for i in tl.static_range(HEADS):
            mine = steps + i * 4 * CHUNK
            x_tile = load_rows(x + i * x_h + (cs[:, None] * x_l + ps[None]), keep, p_in, EVEN, "")
            if not NARROW:
                x_tile = x_tile.to(tl.float32)
            out = tl.zeros((BLOCK_P, CHUNK), tl.float32)
            for k in tl.static_range(N_PARTS):
                n_at = k * BLOCK_N + ns
                part, C_tile = parts[i * N_PARTS + k], C_tiles[k]
                if not NARROW and N_PARTS > 1:  # float32 is read again rather than held
                    C_tile = load_rows(C + (cs[:, None] * C_l + n_at[None]), keep, n_at < N, EVEN, "").to(tl.float32)
                if SAVE:
                    saved = states + tl.cast(chunk // KEEP_EVERY, tl.int64) * h * (P * N)
                    now = (chunk % KEEP_EVERY == 0) & p_in[:, None] & (n_at < N)[None]
                    tl.store(saved + ((i * P + ps[:, None]) * N + n_at[None]), part, mask=now)
                out = tl.dot(part.to(C_tile.dtype), tl.trans(C_tile), out, input_precision=PRECISION)
            carry, begun = load_carry(mine + cs, CHUNK, EXACT)
            out *= carry[None]
            if HAS_SEQ:
                out = tl.where(begun[None], 0.0, out)
            x_turned = tl.trans(x_tile)
            out = tl.dot(x_turned, faded[i], out, input_precision=PRECISION)
            if HAS_D:
                out += skips[i][:, None] * x_turned.to(tl.float32)
            out = tl.trans(out)
            if HAS_SEQ:
                out = tl.where(keep[:, None], out, 0.0)
            y_tile = i * P + (cs[:, None] * y_l + ps[None])
            if HAS_Z:
                if SAVE:
                    store_rows(ungated + y_tile, out, t < l, p_in, EVEN)
                gate = load_rows(z + i * z_h + (cs[:, None] * z_l + ps[None]), keep, p_in, EVEN, "").to(tl.float32)
                out *= gate / (1.0 + tl.exp(-gate))
            store_rows(y + y_tile, out, t < l, p_in, EVEN)

            weight = tl.load(mine + 3 * CHUNK + cs)
            through, begun = load_carry(mine + CHUNK - 1, CHUNK, EXACT)
            weighted = x_turned.to(tl.float32) * weight[None]
            for k in tl.static_range(N_PARTS):
                n_at, B_tile = k * BLOCK_N + ns, B_tiles[k]
                if not NARROW and N_PARTS > 1:
                    B_tile = load_rows(B + (cs[:, None] * B_l + n_at[None]), keep, n_at < N, EVEN, "").to(tl.float32)
                part = parts[i * N_PARTS + k] * through
                if HAS_SEQ:
                    part = tl.where(begun, 0.0, part)
                grown = grown + (split_dot(weighted, B_tile, part, NARROW, PRECISION),)
        parts = grown
        x, B, C, y, steps = x + CHUNK * x_l, B + CHUNK * B_l, C + CHUNK * C_l, y + CHUNK * y_l, steps + 4 * CHUNK * h
        if HAS_Z:
            z += CHUNK * z_l
            if SAVE:
                ungated += CHUNK * y_l
    if last == chunks:
        for i in tl.static_range(HEADS):
            for k in tl.static_range(N_PARTS):
                n_at = k * BLOCK_N + ns
                at = (index + i) * P * N + ps[:, None] * N + n_at[None]
                tl.store(final + at, parts[i * N_PARTS + k], mask=p_in[:, None] & (n_at < N)[None])
