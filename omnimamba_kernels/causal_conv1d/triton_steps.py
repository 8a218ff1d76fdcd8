"""What the convolution's Triton kernels share: tiles of positions, each of them STEPS neighbouring times of a channel.

A tensor (b, d, l) has its channels one element apart (channel-last, usually a view of wider rows) or its times
(TIME_LAST). A tile has the dimension of unit stride second, (BLOCK_T, BLOCK_D) or (BLOCK_D, BLOCK_T), and the STEPS
times of a position are values of one thread, so that the taps of an output are registers, not loads. Channel-last each
of the STEPS is a load of vectors along the channels; otherwise one load of vectors has them all.

ALIGN divides every stride but the unit one, and the size of the dimension of unit stride. They are passed divided by
it, because Triton itself looks for multiples of 16 only, and 8 are enough for 16 bytes of a 16-bit type.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = tl.constexpr(8)


@triton.jit
def positions(
    tile_t, tile_d, SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TIME_LAST: tl.constexpr
):
    """The first time and the channel of each position of a tile, whose positions lie SPAN times apart."""
    t = (tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)) * SPAN
    c = tile_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    if TIME_LAST:
        return t[None, :], c[:, None]
    else:
        return t[:, None], c[None, :]


@triton.jit
def load_taps(weight, w_d, w_k, c, inside, WIDTH: tl.constexpr):
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * w_d + k * w_k, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_times(
    at, step, t, length, inside, initial, i_k, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """COUNT values from time t + FIRST on, one by one; ``at`` points at time t, ``step`` lies between two times.

    Before time 0 they are those of ``initial``, rounded as they are stored in x, or 0.
    """
    rows = ()
    for j in tl.static_range(FIRST, FIRST + COUNT):
        row = tl.load(at + j * step, mask=inside & (t + j >= 0) & (t + j < length), other=0.0)
        if initial is not None:
            at_initial = initial + (t + j + WIDTH - 1) * i_k
            row = tl.where(t + j < 0, tl.load(at_initial, mask=inside & (t + j < 0), other=0.0).to(row.dtype), row)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def load_steps(at, step, t, length, inside, TIME_LAST: tl.constexpr):
    """The STEPS values from time t on, at once."""
    if TIME_LAST:
        s = tl.arange(0, STEPS)[None, None, :]
        block = tl.load(at[:, :, None] + s * step, mask=inside[:, :, None] & (t[:, :, None] + s < length), other=0.0)
        even, odd = _every_other(block.to(tl.float32))
        of_04, of_26 = _every_other(even)
        of_15, of_37 = _every_other(odd)
        v0, v4 = tl.split(of_04)
        v2, v6 = tl.split(of_26)
        v1, v5 = tl.split(of_15)
        v3, v7 = tl.split(of_37)
        return v0, v1, v2, v3, v4, v5, v6, v7
    else:
        rows = ()
        for s in tl.static_range(STEPS):
            rows = rows + (tl.load(at + s * step, mask=inside & (t + s < length), other=0.0).to(tl.float32),)
        return rows


@triton.jit
def _every_other(block):
    """The values of even and those of odd place in the last dimension."""
    return tl.split(tl.reshape(block, [block.shape[0], block.shape[1], block.shape[2] // 2, 2]))


@triton.jit
def store_steps(at, step, t, length, inside, rows, TIME_LAST: tl.constexpr):
    if TIME_LAST:
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
        block = tl.reshape(tl.join(even, odd), [at.shape[0], at.shape[1], STEPS])
        s = tl.arange(0, STEPS)[None, None, :]
        where = at[:, :, None] + s * step
        tl.store(where, block.to(at.dtype.element_ty), mask=inside[:, :, None] & (t[:, :, None] + s < length))
    else:
        for s in tl.static_range(STEPS):
            tl.store(at + s * step, rows[s].to(at.dtype.element_ty), mask=inside & (t + s < length))


@triton.jit
def load_id(seq_idx, s_l, t, length):
    """The sequence of time t: that of time 0 before it, none (-1) after the last."""
    at = tl.maximum(t, 0)
    found = tl.load(seq_idx + at * s_l, mask=at < length, other=0)
    return tl.where(t < length, found, -1)


@triton.jit
def load_links(seq_idx, s_l, t, length, WIDTH: tl.constexpr):
    """Which of the times t .. t + STEPS + WIDTH - 2 are linked to their past: a number a position; () without seq_idx.

    Its bit WIDTH i + j: time t + i belongs to a sequence, and the time j steps before it to the same one.
    """
    if seq_idx is None:
        return ()
    else:
        # The sum runs along another dimension than the one it is then given, or its layout would become the tile's.
        ALONG: tl.constexpr = 1 if t.shape[0] == 1 else 0
        i = tl.expand_dims(tl.arange(0, 16), 1 - ALONG)
        later = tl.trans(t) + i
        own = load_id(seq_idx, s_l, later, length)
        bits = tl.zeros(own.shape, tl.int64)
        for j in tl.static_range(WIDTH):
            same = (own >= 0) & (load_id(seq_idx, s_l, later - j, length) == own)
            bits += tl.where(same & (i < STEPS + WIDTH - 1), 1, 0).to(tl.int64) << (WIDTH * i + j)
        return (tl.expand_dims(tl.sum(bits, axis=ALONG), 1 - ALONG),)


@triton.jit
def linked(links, i, j, WIDTH: tl.constexpr):
    return ((links[0] >> (WIDTH * i + j)) & 1) != 0


@triton.jit
def across(value, links, i, j, WIDTH: tl.constexpr):
    """``value``, or 0 where time t + i is not linked to the time j steps before it."""
    if len(links) == 0:
        return value
    else:
        return tl.where(linked(links, i, j, WIDTH), value, 0.0)


@triton.jit
def convolve(rows, links, s, taps, bias, WIDTH: tl.constexpr):
    """bias + sum_k taps[k] rows[s + k] at time t + s; the first of the rows is that of time t - (WIDTH - 1)."""
    a = bias
    for k in tl.static_range(WIDTH):
        a += taps[k] * across(rows[s + k], links, s, WIDTH - 1 - k, WIDTH)
    return a


@triton.jit
def sigmoid(a, x):
    """1 / (1 + exp(-a)); where x is stored in 16 bits, in five instructions: a reciprocal root needs no guards."""
    if x.dtype.element_ty == tl.float32:
        return tl.sigmoid(a)
    else:
        r = tl.rsqrt(1 + tl.exp2(a * -1.4426950408889634))
        return r * r


@triton.jit
def load_bias(bias, bias_d, c, inside):
    if bias is not None:
        return tl.load(bias + c * bias_d, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros(c.shape, tl.float32)
