"""The causal convolution's forward, in one launch.

    y[b, c, t] = act(bias[c] + sum_k weight[c, k] x[b, c, t - (w - 1) + k])

x before t = 0 is ``initial``, or zero. With ``seq_idx`` a tap reaches only times of its own sequence, ``initial`` is
of time 0's, and a negative index is padding, whose y is 0. ``final`` is the last w - 1 inputs, of the last time's
sequence.

Shapes: x, y (b, d, l) of any strides; weight (d, w); bias (d,); initial, final (b, d, w - 1); seq_idx (b, l).
Plan: a program has BLOCK_T x BLOCK_D positions and walks LOOPS times STEPS times with each; taps and bias stay in
  registers. Its loads of a walk are in flight together before its first store. Programs side by side have neighbouring
  channels, so that together they read whole rows.
Traffic: b d l elements read, as many written; the w - 1 inputs before each STEPS come from a cache, and so do the taps
  and the bias, 4 (w + 1) bytes a channel for BLOCK_T LOOPS STEPS times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_steps import (
    STEPS,
    across,
    convolve,
    load_bias,
    load_id,
    load_links,
    load_steps,
    load_taps,
    load_times,
    positions,
    sigmoid,
    store_steps,
)


@triton.jit
def _store_final(at, step, initial, i_k, seq_idx, s_l, final, length, inside, WIDTH: tl.constexpr):
    """``at`` points at x of time 0."""
    for k in tl.static_range(WIDTH - 1):
        t = length - (WIDTH - 1) + k
        row = tl.load(at + t * step, mask=inside & (t >= 0), other=0.0)
        if initial is not None:
            before = tl.load(initial + (t + WIDTH - 1) * i_k, mask=inside & (t < 0), other=0.0)
            row = tl.where(t < 0, before.to(row.dtype), row)
        if seq_idx is not None:
            last = load_id(seq_idx, s_l, length - 1, length)
            row = tl.where((last >= 0) & (load_id(seq_idx, s_l, t, length) == last), row, 0.0)
        tl.store(final + k, row.to(final.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    x, weight, bias, initial, seq_idx, y, final,
    channels, length, tiles_t, tiles_d,
    x_b, x_d, x_l, w_d, w_k, bias_d, i_b, i_d, i_k, s_b, s_l, y_b, y_d, y_l,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, TIME_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    UNIT_D: tl.constexpr = ALIGN if TIME_LAST else 1
    UNIT_L: tl.constexpr = 1 if TIME_LAST else ALIGN
    channels = tl.cast(channels, tl.int64) * (ALIGN // UNIT_D)
    length = tl.cast(length, tl.int64) * (ALIGN // UNIT_L)
    pid = tl.program_id(0)
    tile_d, tile_t, b = pid % tiles_d, pid // tiles_d % tiles_t, (pid // tiles_d // tiles_t).to(tl.int64)
    t, c = positions(tile_t, tile_d, LOOPS * STEPS, BLOCK_T, BLOCK_D, TIME_LAST)
    inside = c < channels
    x += b * x_b * ALIGN + c * x_d * UNIT_D
    y += b * y_b * ALIGN + c * y_d * UNIT_D
    if initial is not None:
        initial += b * i_b + c * i_d
    if seq_idx is not None:
        seq_idx += b * s_b
    taps = load_taps(weight, w_d, w_k, c, inside, WIDTH)
    offset = load_bias(bias, bias_d, c, inside)
    x_step, y_step = tl.cast(x_l, tl.int64) * UNIT_L, tl.cast(y_l, tl.int64) * UNIT_L
    for _ in range(LOOPS):
        rows = load_times(x + t * x_step, x_step, t, length, inside, initial, i_k, 1 - WIDTH, WIDTH - 1, WIDTH)
        rows = rows + load_steps(x + t * x_step, x_step, t, length, inside, TIME_LAST)
        links = load_links(seq_idx, s_l, t, length, WIDTH)
        outputs = ()
        for s in tl.static_range(STEPS):
            a = convolve(rows, links, s, taps, offset, WIDTH)
            if ACTIVATION:
                a *= sigmoid(a, x)
            outputs = outputs + (across(a, links, s, 0, WIDTH),)
        store_steps(y + t * y_step, y_step, t, length, inside, outputs, TIME_LAST)
        t += STEPS
    if final is not None:
        if tile_t == tiles_t - 1:
            at = final + (b * channels + c) * (WIDTH - 1)
            _store_final(x, x_step, initial, i_k, seq_idx, s_l, at, length, inside, WIDTH)
