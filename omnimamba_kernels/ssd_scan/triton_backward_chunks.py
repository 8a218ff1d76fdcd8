"""The scan's backward in Triton, second half: chunk by chunk, from the states S and their gradients to everything else.

Maths. For one head and chunk, with L, carry and tail of triton_common.py, S the state before the chunk, dS' the
gradient of the state after it, a = dt A:
    T_ts = (dy x^T o L o C B^T)_ts   U_s = tail_s (x . B dS'^T)_s   R_t = carry_t (C . dy S)_t   W = carry_end <S, dS'>
    dx   = dt tail (B dS'^T) + (C B^T o L dt)^T dy + D dy           dG  = dy x^T o L dt
    dC   = carry (dy S) + dG B                                      dB  = (dt tail x) dS' + dG^T C
    da_r = sum of T_ts dt_s over s < r <= t  +  sum of R_t over t >= r  +  sum of dt_s U_s over s < r  +  W
    ddt_s = A da_s + sum of T_ts over t + U_s
No term of da is a difference. The gradient V of the state after a packed sequence that ends at position e of the chunk
acts like dS', with decays up to e.

Shapes. x, z, dy, dx, dz (b, l, h, p); B, C (b, l, g, n); states, dstates (b, chunks, h, p, n). Out:
    terms (b, h, chunks, 4 + N_BLOCKS, CHUNK)  sum of T; U; sum of dt U; sum of T dt across r; R + W of each block of n
    sums  (b, chunks, h, 2 + columns of D)     from its third column on dy . x, for dD
    parts (parts, 4, b, l, g, n)               dB inside the chunk and through the states, then dC

Plan. A program has a batch row, a chunk, some heads of a group and one of 2 + N_BLOCKS roles. Roles lie side by side in
the grid, so that what two of them read comes from memory once; what is summed over heads stays in registers:
    inputs  B C^T once; for each head dx, dz, U
    inside  C B^T once; for each head dy x^T and the sums of T; dG is summed over heads
    states  BLOCK_N of the n states: for each head R and W; dB and dC through the states are summed over heads
Nothing is hoisted out of loops (disable_licm): addresses and split operands that live on would overflow the registers.
Loops over blocks are unrolled up to 64 channels and 128 states, where the loop over heads is pipelined: more would take
minutes to compile. What reaches the chunk's end and what reaches packed sequences' ends goes through the same code.
Traffic, bytes a position and head, 16-bit x, p 64, n 128: x and dy 256, S and dS' 1024 and dx 128 from and to
memory; x and dy 768 and dS' 512 once more from the cache; steps and terms 60.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward_starts import at_position, offset_at, sequences_before
from .triton_backward_walk import chunk_steps
from .triton_common import decay_between
from .triton_products import load_gradient, load_state, load_tile, product, product_exact_derived

_CROWDED = "M's parts for tf32x3 stay in registers across the loop over sequences that end: no tile or warps held all"
_SEVERAL = "where several programs have a group's heads"
SPILLS = (
    ("ssd_back_chunks", "sm_80", {"HAS_Z": True, "HAS_VARLEN": True}, 280, f"Triton 3.8: {_CROWDED}"),
    ("ssd_back_chunks", "sm_80", {"HAS_Z": True, "HAS_VARLEN": True}, 268, _CROWDED),
    ("ssd_back_chunks", "sm_120", {"HAS_Z": True, "HAS_VARLEN": True}, 136, f"Triton 3.6: {_CROWDED}"),
    ("ssd_back_chunks", "sm_120", {"HAS_Z": True, "HAS_VARLEN": True}, 252, f"Triton 3.8: {_CROWDED}"),
    ("ssd_back_chunks", "sm_120", {"HAS_Z": True, "HAS_VARLEN": True}, 108, _CROWDED),
    ("ssd_back_chunks", "sm_120", {}, 32, f"Triton 3.6: of float16, {_SEVERAL}"),
    ("ssd_back_chunks", "sm_120", {}, 16, f"of float32, 12 of bfloat16, {_SEVERAL}"),
)


@triton.jit
def _scores(
    rows, columns, row, rows_l, columns_l, valid,
    CHUNK: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, N_BLOCKS: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """rows columns^T over all N states."""
    UNROLL: tl.constexpr = N_BLOCKS if NARROW and N <= 128 else 1
    G = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k in tl.range(0, N_BLOCKS, num_stages=1, loop_unroll_factor=UNROLL, disable_licm=True):
        state = k * BLOCK_N + tl.arange(0, BLOCK_N)
        a = load_tile(rows, row, rows_l, state, N, BLOCK_N, valid, NARROW)
        b = load_tile(columns, row, columns_l, state, N, BLOCK_N, valid, NARROW)
        G = product(a, tl.trans(b), G, PRECISION)
    return G


@triton.jit
def _spread(
    out, dG, columns, i, columns_l, group_row, valid, stored,
    CHUNK: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, N_BLOCKS: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dG columns, over all N states."""
    UNROLL: tl.constexpr = N_BLOCKS if NARROW and N <= 128 else 1
    for k in tl.range(0, N_BLOCKS, num_stages=1, loop_unroll_factor=UNROLL, disable_licm=True):
        state = k * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = load_tile(columns, i, columns_l, state, N, BLOCK_N, valid, NARROW)
        found = product(dG, tile, tl.zeros((CHUNK, BLOCK_N), tl.float32), PRECISION)
        inside = stored[:, None] & (state < N)[None, :]
        tl.store(out + (i[:, None] * group_row + state[None, :]), found, mask=inside)


@triton.jit
def _inside(
    x, B, C, z, dy, steps, used, terms, sums, dB, dC, stored, first_head, last_head, state_at, step_at, chunks,
    group_row, x_l, x_h, B_l, C_l, z_l, z_h, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, N_BLOCKS: tl.constexpr, TERMS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    SKIP: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, CHUNK)
    valid = tl.load(used + i) > 0
    mask = i[:, None] >= i[None, :]
    G = _scores(C, B, i, C_l, B_l, valid, CHUNK, N, BLOCK_N, N_BLOCKS, NARROW, PRECISION)
    dG = tl.zeros((CHUNK, CHUNK), tl.float32)
    for head in tl.range(first_head, last_head, num_stages=1, disable_licm=True):
        dt, high, low = chunk_steps(steps, step_at + head * chunks, CHUNK)
        dM = tl.zeros((CHUNK, CHUNK), tl.float32)
        skip = 0.0
        for k in tl.range(0, P_BLOCKS, num_stages=1, disable_licm=True):  # unrolled it would spill
            column = k * BLOCK_P + tl.arange(0, BLOCK_P)
            dy_head = dy + head * dy_h if HAS_DY else dy
            z_head = z + head * z_h if HAS_Z else z
            dy_tile = load_gradient(dy_head, z_head, i, dy_l, z_l, column, P, BLOCK_P, valid, NARROW, HAS_DY, HAS_Z)
            x_tile = load_tile(x + head * x_h, i, x_l, column, P, BLOCK_P, valid, NARROW)
            dM = product(dy_tile, tl.trans(x_tile), dM, PRECISION)
            if SKIP > 0:
                share = tl.sum(dy_tile.to(tl.float32) * x_tile.to(tl.float32), 0)
                if SKIP == 2:
                    tl.store(sums + (state_at + head) * (2 + P) + 2 + column, share, mask=column < P)
                else:
                    skip += tl.sum(share)
        if SKIP == 1:
            tl.store(sums + (state_at + head) * 3 + 2, skip)
        L = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], mask)
        dML = tl.where(mask, dM * L, 0.0)
        dG += dML * dt[None, :]
        T = dML * G
        out = terms + (step_at + head * chunks) * (TERMS * CHUNK)
        tl.store(out + i, tl.sum(T, 0))
        before = tl.cumsum(T * dt[None, :], 1)
        store_after(out + 3 * CHUNK, tl.sum(tl.where(i[:, None] > i[None, :], before, 0.0), 0), CHUNK)
    dG = dG.to(B.dtype.element_ty if NARROW else tl.float32)
    _spread(dC, dG, B, i, B_l, group_row, valid, stored, CHUNK, N, BLOCK_N, N_BLOCKS, NARROW, PRECISION)
    _spread(dB, tl.trans(dG), C, i, C_l, group_row, valid, stored, CHUNK, N, BLOCK_N, N_BLOCKS, NARROW, PRECISION)


@triton.jit
def _states(
    x, C, z, dy, offsets, dvarlen, states, dstates, steps, used, terms, dB, dC, stored, first_head, last_head,
    state_at, step_at, n_block, start, sequences, l, heads, chunks, group_row, x_l, x_h, C_l, z_l, z_h, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, TERMS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, HAS_DY: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_VARLEN: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, CHUNK)
    valid = tl.load(used + i) > 0
    state = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    UNROLL: tl.constexpr = P_BLOCKS if NARROW and P <= 64 else 1
    dC_sum = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dB_sum = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    first, last = 0, 0
    if HAS_VARLEN:
        first = sequences_before(offsets, sequences, start, l)
        last = sequences_before(offsets, sequences, start + CHUNK, l)
    for head in tl.range(first_head, last_head, disable_licm=True):
        dt, high, low = chunk_steps(steps, step_at + head * chunks, CHUNK)
        carry = tl.exp2(high + low)
        dyS = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        inward = tl.zeros((CHUNK,), tl.float32)
        for k in tl.range(0, P_BLOCKS, num_stages=1, loop_unroll_factor=UNROLL, disable_licm=True):
            column = k * BLOCK_P + tl.arange(0, BLOCK_P)
            S = load_state(states + (state_at + head) * (P * N), column, state, P, N, BLOCK_P, BLOCK_N)
            dy_head = dy + head * dy_h if HAS_DY else dy
            z_head = z + head * z_h if HAS_Z else z
            dy_tile = load_gradient(dy_head, z_head, i, dy_l, z_l, column, P, BLOCK_P, valid, NARROW, HAS_DY, HAS_Z)
            dyS = product_exact_derived(dy_tile, S, dyS, NARROW, PRECISION)
            x_tile = load_tile(x + head * x_h, i, x_l, column, P, BLOCK_P, valid, NARROW)
            for j in range(first - 1, last):
                dS, end, follows = gradient_after(
                    dstates + (state_at + head) * (P * N), dvarlen, offsets, j, first, head, start, heads, l,
                    CHUNK, P * N, HAS_VARLEN,
                )  # fmt: skip
                if follows:
                    dS_tile = load_state(dS, column, state, P, N, BLOCK_P, BLOCK_N)
                    inward += tl.where((i == end - 1) & (carry != 0.0), carry * tl.sum(S * dS_tile), 0.0)
                    weighted = weigh(x_tile, dt * tail_of(high, low, end, CHUNK))
                    dB_sum = product(weighted, dS_tile.to(x_tile.dtype), dB_sum, PRECISION)
        dyS = tl.where((carry != 0.0)[:, None], dyS * carry[:, None], 0.0)  # a sequence that begins meets no NaN of S
        dC_sum += dyS
        C_tile = load_tile(C, i, C_l, state, N, BLOCK_N, valid, NARROW)
        inward += tl.sum(C_tile.to(tl.float32) * dyS, 1)
        tl.store(terms + (step_at + head * chunks) * (TERMS * CHUNK) + (4 + n_block) * CHUNK + i, inward)
    tile = i[:, None] * group_row + state[None, :]
    inside = stored[:, None] & (state < N)[None, :]
    tl.store(dC + tile, dC_sum, mask=inside)
    tl.store(dB + tile, dB_sum, mask=inside)


@triton.jit
def gradient_after(
    dS, dvarlen, offsets, j, first, head, start, heads, l,
    CHUNK: tl.constexpr, STATE: tl.constexpr, HAS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Where a state's gradient lies, after how many of the chunk's positions it is the state, and whether it counts: dS
    for the chunk's end (j = first - 1), then those of packed sequences, if they are not empty."""
    end, follows = CHUNK, True
    if HAS_VARLEN:
        follows = j < first
        if not follows:
            stop = offset_at(offsets, j + 1, l)
            follows = stop > offset_at(offsets, j, l)
            end = (stop - start).to(tl.int32)
            dS = dvarlen + (j * heads + head) * STATE
    return dS, end, follows


@triton.jit
def store_after(at, v, CHUNK: tl.constexpr):
    """Stores v one position later, without its last entry, and 0 first."""
    i = tl.arange(0, CHUNK)
    tl.store(at + (i + 1) % CHUNK, tl.where(i < CHUNK - 1, v, 0.0))


@triton.jit
def tail_of(high, low, end, CHUNK: tl.constexpr):
    """What is left of each position's step after position end - 1."""
    high_end, low_end = at_position(high, end - 1, CHUNK), at_position(low, end - 1, CHUNK)
    return decay_between(high_end, low_end, high, low, tl.arange(0, CHUNK) < end)


@triton.jit
def weigh(tile, weight):
    return (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)


@triton.jit
def _through_state(
    dx, U, ahead, x_tile, B, B_tile, dS, dt, high, low, end, valid, column, B_l,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    N_BLOCKS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what comes back through the state after position end - 1, whose gradient lies at dS, to dx, U and ``ahead``,
    the sum of dt U over each position and those before it."""
    i = tl.arange(0, CHUNK)
    UNROLL: tl.constexpr = N_BLOCKS if NARROW and N <= 128 else 1
    u = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    for k in tl.range(0, N_BLOCKS, num_stages=1, loop_unroll_factor=UNROLL, disable_licm=True):
        state = k * BLOCK_N + tl.arange(0, BLOCK_N)
        dS_tile = load_state(dS, column, state, P, N, BLOCK_P, BLOCK_N)
        if N_BLOCKS == 1:
            B_here = B_tile
        else:
            B_here = load_tile(B, i, B_l, state, N, BLOCK_N, valid, NARROW)
        u = product_exact_derived(B_here, tl.trans(dS_tile), u, NARROW, PRECISION)
    u *= tail_of(high, low, end, CHUNK)[:, None]
    dx += dt[:, None] * u
    here = tl.sum(x_tile.to(tl.float32) * u, 1)
    U += here
    ahead += tl.where(i < end - 1, tl.cumsum(dt * here, 0), 0.0)
    return dx, U, ahead


@triton.jit
def _inputs(
    x, B, C, D, z, ungated, dy, offsets, dvarlen, dstates, steps, used, terms, dx, dz, stored, first_head, last_head,
    state_at, step_at, start, sequences, l, heads, chunks, x_l, x_h, B_l, C_l, z_l, z_h, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, N_BLOCKS: tl.constexpr, TERMS: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    SKIP: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr, HAS_VARLEN: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, CHUNK)
    valid = tl.load(used + i) > 0
    mask = i[:, None] <= i[None, :]
    G = _scores(B, C, i, B_l, C_l, valid, CHUNK, N, BLOCK_N, N_BLOCKS, NARROW, PRECISION)
    UNROLL: tl.constexpr = P_BLOCKS if NARROW and P <= 64 else 1
    B_tile = None
    if N_BLOCKS == 1:
        B_tile = load_tile(B, i, B_l, tl.arange(0, BLOCK_N), N, BLOCK_N, valid, NARROW)
    first, last = 0, 0
    if HAS_VARLEN:
        first = sequences_before(offsets, sequences, start, l)
        last = sequences_before(offsets, sequences, start + CHUNK, l)
    for head in tl.range(first_head, last_head, disable_licm=True):
        dt, high, low = chunk_steps(steps, step_at + head * chunks, CHUNK)
        L = decay_between(high[None, :], low[None, :], high[:, None], low[:, None], mask)
        M = (tl.where(mask, G * L, 0.0) * dt[:, None]).to(C.dtype.element_ty if NARROW else tl.float32)
        U = tl.zeros((CHUNK,), tl.float32)
        ahead = tl.zeros((CHUNK,), tl.float32)
        for k in tl.range(0, P_BLOCKS, num_stages=1, loop_unroll_factor=UNROLL, disable_licm=True):
            column = k * BLOCK_P + tl.arange(0, BLOCK_P)
            dy_head = dy + head * dy_h if HAS_DY else dy
            z_head = z + head * z_h if HAS_Z else z
            dy_tile = load_gradient(dy_head, z_head, i, dy_l, z_l, column, P, BLOCK_P, valid, NARROW, HAS_DY, HAS_Z)
            x_tile = load_tile(x + head * x_h, i, x_l, column, P, BLOCK_P, valid, NARROW)
            dx_sum = tl.zeros((CHUNK, BLOCK_P), tl.float32)
            if SKIP > 0:
                at = D + head * P + column if SKIP == 2 else D + head + column * 0
                dx_sum += tl.load(at, mask=column < P, other=0.0).to(tl.float32)[None, :] * dy_tile
            dx_sum = product(M, dy_tile, dx_sum, PRECISION)
            for j in range(first - 1, last):
                dS, end, follows = gradient_after(
                    dstates + (state_at + head) * (P * N), dvarlen, offsets, j, first, head, start, heads, l,
                    CHUNK, P * N, HAS_VARLEN,
                )  # fmt: skip
                if follows:
                    dx_sum, U, ahead = _through_state(
                        dx_sum, U, ahead, x_tile, B, B_tile, dS, dt, high, low, end, valid,
                        column, B_l, CHUNK, P, N, BLOCK_P, BLOCK_N, N_BLOCKS, NARROW, PRECISION,
                    )  # fmt: skip
            tile = i[:, None] * (heads * P) + head * P + column[None, :]
            inside = stored[:, None] & (column < P)[None, :]
            tl.store(dx + tile, dx_sum.to(dx.dtype.element_ty), mask=inside)
            if HAS_Z:
                gate = load_tile(z_head, i, z_l, column, P, BLOCK_P, valid, NARROW)
                s = tl.sigmoid(gate)
                slope = load_tile(ungated + head * P, i, heads * P, column, P, BLOCK_P, valid, NARROW)
                slope *= s * (1.0 + gate * (1.0 - s))
                if HAS_DY:
                    slope *= load_tile(dy_head, i, dy_l, column, P, BLOCK_P, valid, NARROW)
                else:
                    slope *= 0.0
                tl.store(dz + tile, slope.to(dz.dtype.element_ty), mask=inside)
        out = terms + (step_at + head * chunks) * (TERMS * CHUNK)
        tl.store(out + CHUNK + i, U)
        store_after(out + 2 * CHUNK, ahead, CHUNK)


@triton.jit(do_not_specialize=["sequences"])
def ssd_back_chunks(
    x, B, C, D, z, ungated, dy, offsets, dvarlen, states, dstates, steps, used, terms, sums, parts, dx, dz,
    l, heads, groups, part_heads, part_count, chunk_count, sequences, part_size,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, dy_b, dy_l, dy_h,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, N_BLOCKS: tl.constexpr, DEEP_N: tl.constexpr, DEEP_BLOCKS: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, SKIP: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_VARLEN: tl.constexpr,
):  # fmt: skip
    ROLES: tl.constexpr = 2 + N_BLOCKS
    TERMS: tl.constexpr = 4 + N_BLOCKS
    at = tl.program_id(0).to(tl.int64)
    role, at = at % ROLES, at // ROLES
    part, at = at % part_count, at // part_count
    g, at = at % groups, at // groups
    chunk, b = at % chunk_count, at // chunk_count
    per_group = heads // groups
    first_head = g * per_group + part * part_heads
    last_head = tl.minimum(first_head + part_heads, (g + 1) * per_group)
    part_size = tl.cast(part_size, tl.int64)
    step_at, state_at = b * heads * chunk_count + chunk, (b * chunk_count + chunk) * heads
    start = chunk * CHUNK
    position = b * l + start
    stored = tl.arange(0, CHUNK) < l - start
    used += b * chunk_count * CHUNK + start
    x += b * x_b + start * x_l
    B += b * B_b + start * B_l + g * B_g
    C += b * C_b + start * C_l + g * C_g
    dx += position * heads * P
    parts += 4 * part * part_size + position * groups * N + g * N
    if HAS_DY:
        dy += b * dy_b + start * dy_l
    if HAS_Z:
        z += b * z_b + start * z_l
        ungated += position * heads * P
        dz += position * heads * P
    if role == 0:
        _inputs(
            x, B, C, D, z, ungated, dy, offsets, dvarlen, dstates, steps, used, terms, dx, dz, stored, first_head,
            last_head, state_at, step_at, start, sequences, l, heads, chunk_count,
            x_l, x_h, B_l, C_l, z_l, z_h, dy_l, dy_h, CHUNK, P, N, BLOCK_P, P_BLOCKS, DEEP_N, DEEP_BLOCKS, TERMS,
            NARROW, PRECISION, SKIP, HAS_DY, HAS_Z, HAS_VARLEN,
        )  # fmt: skip
    elif role == 1:
        _inside(
            x, B, C, z, dy, steps, used, terms, sums, parts, parts + 2 * part_size, stored, first_head, last_head,
            state_at, step_at, chunk_count, groups * N, x_l, x_h, B_l, C_l, z_l, z_h, dy_l, dy_h,
            CHUNK, P, N, BLOCK_P, P_BLOCKS, BLOCK_N, N_BLOCKS, TERMS, NARROW, PRECISION, SKIP, HAS_DY, HAS_Z,
        )  # fmt: skip
    else:
        _states(
            x, C, z, dy, offsets, dvarlen, states, dstates, steps, used, terms, parts + part_size,
            parts + 3 * part_size, stored, first_head, last_head, state_at, step_at, role - 2, start, sequences, l,
            heads, chunk_count, groups * N, x_l, x_h, C_l, z_l, z_h, dy_l, dy_h,
            CHUNK, P, N, BLOCK_P, P_BLOCKS, BLOCK_N, TERMS, NARROW, PRECISION, HAS_DY, HAS_Z, HAS_VARLEN,
        )  # fmt: skip
