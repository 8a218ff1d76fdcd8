"""The causal convolution's backward, in two launches. With a the forward's value before its activation,

    g[t] = dy[t] act'(a[t])
    dx[t] = sum_j weight[w - 1 - j] g[t + j]                     j = 0 .. w - 1 steps ahead; t < 0: dinitial
    dweight[k] = sum over b, t of g[t] x[t - (w - 1) + k],  dbias = sum over b, t of g[t]

Where seq_idx is given a product counts only within one sequence, and g is 0 in the padding. The final states are the
last w - 1 inputs, so that dfinal adds to their gradients.

Shapes: as the forward's; sums (parts, w + 1, d) in float32, a part of dweight and dbias from each tile of times.
Plan: as the forward's, but a position walks towards earlier times, because dx needs the g of the w - 1 later ones:
  they stay in registers, and those after its last time are computed once more. Its parts of dweight and dbias are in
  registers too; the second launch adds the parts in order, so that the same bits come out of every run.
Traffic: b d l elements of x and of dy read, as many of dx written; the w - 1 inputs before each STEPS come from a
  cache. Parts: 4 (w + 1) bytes a channel written, and read, for BLOCK_T LOOPS STEPS times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_steps import (
    STEPS,
    across,
    convolve,
    linked,
    load_bias,
    load_links,
    load_steps,
    load_taps,
    load_times,
    positions,
    sigmoid,
    store_steps,
)

_THREE = "Triton 3.8: the assembler gives up a register's worth for a third program on a multiprocessor"
SPILLS = tuple(("backward_kernel", arch, {"LOOPS": 4, "TIME_LAST": False}, 4, _THREE) for arch in ("sm_100", "sm_120"))


@triton.jit
def _gradients(x, rows, dy_rows, links, taps, bias, COUNT: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    """g at times t .. t + COUNT - 1; the first of the rows is that of time t - (WIDTH - 1)."""
    g = ()
    for s in tl.static_range(COUNT):
        row = dy_rows[s]
        if ACTIVATION:
            a = convolve(rows, links, s, taps, bias, WIDTH)
            r = sigmoid(a, x)
            row *= r * (1 + a * (1 - r))
        g = g + (across(row, links, s, 0, WIDTH),)
    return g


@triton.jit
def _from_final(dfinal, f_k, links, t, ahead, length, inside, WIDTH: tl.constexpr):
    """What the final states' gradient adds at time t + ahead; the links are those of time t."""
    k = t + ahead - (length - (WIDTH - 1))
    value = tl.load(dfinal + k * f_k, mask=inside & (k >= 0) & (k < WIDTH - 1), other=0.0).to(tl.float32)
    if len(links) > 0:
        i = tl.maximum(length - 1 - t, 0)
        # No time at all, and the states from before it are handed on; else those of the last time's sequence are.
        value = tl.where((length == 0) | linked(links, i, tl.maximum(WIDTH - 2 - k, 0), WIDTH), value, 0.0)
    return value


@triton.jit
def _store_initial(after, taps, dfinal, f_k, links, dinitial, length, inside, t, WIDTH: tl.constexpr):
    """The gradients of the WIDTH - 1 inputs before time t, which is 0, from the first values of g."""
    for m in tl.static_range(WIDTH - 1):
        a = tl.zeros(after[0].shape, tl.float32)
        for i in tl.static_range(m + 1):
            a += taps[m - i] * across(after[i], links, i, i + WIDTH - 1 - m, WIDTH)
        if dfinal is not None:
            a += _from_final(dfinal, f_k, links, t, m - (WIDTH - 1), length, inside, WIDTH)
        tl.store(dinitial + m, a.to(dinitial.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x, weight, bias, initial, seq_idx, dy, dfinal, dx, dinitial, sums,
    channels, length, tiles_t, tiles_d,
    x_b, x_d, x_l, w_d, w_k, bias_d, i_b, i_d, i_k, s_b, s_l, f_b, f_d, f_k, dy_b, dy_d, dy_l, dx_b, dx_d, dx_l,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, TIME_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    UNIT_D: tl.constexpr = ALIGN if TIME_LAST else 1
    UNIT_L: tl.constexpr = 1 if TIME_LAST else ALIGN
    BEFORE: tl.constexpr = WIDTH - 1
    channels = tl.cast(channels, tl.int64) * (ALIGN // UNIT_D)
    length = tl.cast(length, tl.int64) * (ALIGN // UNIT_L)
    pid = tl.program_id(0)
    tile_d, tile_t, b = pid % tiles_d, pid // tiles_d % tiles_t, (pid // tiles_d // tiles_t).to(tl.int64)
    first, c = positions(tile_t, tile_d, LOOPS * STEPS, BLOCK_T, BLOCK_D, TIME_LAST)
    inside = c < channels
    x += b * x_b * ALIGN + c * x_d * UNIT_D
    dy += b * dy_b * ALIGN + c * dy_d * UNIT_D
    dx += b * dx_b * ALIGN + c * dx_d * UNIT_D
    x_step, dy_step = tl.cast(x_l, tl.int64) * UNIT_L, tl.cast(dy_l, tl.int64) * UNIT_L
    dx_step = tl.cast(dx_l, tl.int64) * UNIT_L
    if initial is not None:
        initial += b * i_b + c * i_d
    if seq_idx is not None:
        seq_idx += b * s_b
    if dfinal is not None:
        dfinal += b * f_b + c * f_d
    taps = load_taps(weight, w_d, w_k, c, inside, WIDTH)
    offset = load_bias(bias, bias_d, c, inside)

    t = first + LOOPS * STEPS
    after = _gradients(
        x,
        load_times(x + t * x_step, x_step, t, length, inside, None, i_k, -BEFORE, 2 * BEFORE, WIDTH),
        load_times(dy + t * dy_step, dy_step, t, length, inside, None, i_k, 0, BEFORE, WIDTH),
        load_links(seq_idx, s_l, t, length, WIDTH),
        taps, offset, BEFORE, WIDTH, ACTIVATION,
    )  # fmt: skip
    dtaps = ()
    for _ in tl.static_range(WIDTH + 1):
        dtaps = dtaps + (tl.zeros(after[0].shape, tl.float32),)
    for _ in range(LOOPS):
        t -= STEPS
        rows = load_times(x + t * x_step, x_step, t, length, inside, initial, i_k, -BEFORE, BEFORE, WIDTH)
        rows = rows + load_steps(x + t * x_step, x_step, t, length, inside, TIME_LAST)
        dy_rows = load_steps(dy + t * dy_step, dy_step, t, length, inside, TIME_LAST)
        links = load_links(seq_idx, s_l, t, length, WIDTH)
        g = _gradients(x, rows, dy_rows, links, taps, offset, STEPS, WIDTH, ACTIVATION)
        if sums is not None:
            dtaps = _add_products(dtaps, g, rows, links, WIDTH)
        g = g + after
        outputs, after = (), ()
        for s in tl.static_range(STEPS):
            a = taps[BEFORE] * g[s]
            for j in tl.static_range(1, WIDTH):
                a += taps[BEFORE - j] * across(g[s + j], links, s + j, j, WIDTH)
            if dfinal is not None:
                a += _from_final(dfinal, f_k, links, t, s, length, inside, WIDTH)
            outputs = outputs + (a,)
        for s in tl.static_range(BEFORE):
            after = after + (g[s],)
        store_steps(dx + t * dx_step, dx_step, t, length, inside, outputs, TIME_LAST)

    if dinitial is not None:
        at = dinitial + (b * channels + c) * BEFORE + first  # for its shape: it is 0 where anything is stored
        links = load_links(seq_idx, s_l, first, length, WIDTH)
        _store_initial(after, taps, dfinal, f_k, links, at, length, inside & (first == 0), first, WIDTH)
    if sums is not None:
        c = tile_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        sums += (b * tiles_t + tile_t) * (WIDTH + 1) * channels + c
        for k in tl.static_range(WIDTH + 1):
            tl.store(sums + k * channels, tl.sum(dtaps[k], axis=1 if TIME_LAST else 0), mask=c < channels)


@triton.jit
def _add_products(dtaps, g, rows, links, WIDTH: tl.constexpr):
    """Adds the products of g with the inputs that each tap saw, and g itself."""
    found = ()
    for k in tl.static_range(WIDTH):
        total = dtaps[k]
        for s in tl.static_range(STEPS):
            total += g[s] * across(rows[s + k], links, s, WIDTH - 1 - k, WIDTH)
        found = found + (total,)
    total = dtaps[WIDTH]
    for s in tl.static_range(STEPS):
        total += g[s]
    return found + (total,)


@triton.jit
def sum_kernel(
    sums, dweight, dbias, parts, channels, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dweight (d, w) and dbias (d,) from ``sums``: a program has one of its w + 1 rows, BLOCK_C channels."""
    k = tl.program_id(1)
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_P):
        at = sums + ((first + p) * (WIDTH + 1) + k) * channels + c[None, :]
        total += tl.load(at, mask=(first + p < parts) & (c[None, :] < channels), other=0.0)
    total = tl.sum(total, axis=0)
    if k < WIDTH:
        tl.store(dweight + c * WIDTH + k, total.to(dweight.dtype.element_ty), mask=c < channels)
    else:
        if dbias is not None:
            tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=c < channels)
