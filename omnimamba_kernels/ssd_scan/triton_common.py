"""What the scan's Triton kernels share: step sizes, decay within a chunk, sequences within a chunk.

A chunk is CHUNK positions, cut at multiples of CHUNK whatever the sequences. Vectors below have one entry a position of
a chunk; a position at or after l has dt = 0 and belongs to the sequence before it, so that it changes nothing.

    dt    = clamp(softplus(raw + bias), low, high), 0 in padding
    a_t   = log2(e) dt_t A, the step's decay in powers of two; cum_t = a_0 + ... + a_t
    L_ts  = 2^(cum_t - cum_s)        for s <= t of one sequence, else 0
    carry_t = 2^cum_t                what is left at t of the state before the chunk; 0 once a sequence has begun
    tail_s  = 2^(cum_end - cum_s)    what is left of s after the chunk; 0 before the chunk's last sequence

Sums are kept as float64 and handed out as two float32 (the number and what it lacks), so that differences of sums stay
exact beside steps that wipe out the state. One step is cut at 2^FLOOR, which is 0 in float32.

A sequence is a run of equal ``seq_idx``; a negative index is padding. Before position 0 counts as index 0. Without
``seq_idx``, ``cu_seqlens`` has where packed sequences begin and end; after the last all is padding. ``run`` numbers the
sequences of a chunk: 0 is the one that the state before the chunk belongs to.

What ``forward(save=True)`` keeps for ``backward``, in this order:

    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens    the arguments as they came
    states       (b, ceil(l / CHUNK), h, p, n), contiguous, float32: the state after position CHUNK k - 1, in chunk k's
                 place (the initial states for k = 0), before a sequence that begins at CHUNK k drops it
    ungated      (b, l, h, p), contiguous, in the type of x, B, C and z, float32 if they differ: y before the gate; None
                 without z
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-160.0)
TERMS = tl.constexpr(tiles.TERMS)


@triton.jit
def exact_exp(v):
    """e^v for v <= 0 to one rounding: exp2 of the product, and what the product lacks by its derivative."""
    power = v * LOG2E
    lacks = tl.fma(v, LOG2E, -power) + v * 1.925963033500e-08  # log2(e) minus its float32
    return tl.exp2(power) * tl.where(power < FLOOR, 1.0, 1.0 + 0.6931471805599453 * lacks)


@triton.jit
def softplus(v):
    """log(1 + e^v), and its derivative: with u = e^-|v|, log(1 + u) = 2 artanh(u / (2 + u))."""
    u = exact_exp(-tl.abs(v))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 17 + q * (1.0 / 19)
    series = 1.0 / 15 + q * series
    series = 1.0 / 13 + q * series
    series = 1.0 / 11 + q * series
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    value = tl.where(v > 0, v, 0.0) + 2.0 * (s + s * q * series)
    return value, tl.where(v > 0, 1.0, u) / (1.0 + u)


@triton.jit
def step_sizes(raw, bias, low, high, SOFTPLUS: tl.constexpr):
    """dt of raw steps, and d dt / d raw. Comparisons, not minimum and maximum, let NaN pass."""
    v = raw + bias
    slope = v * 0.0 + 1.0
    if SOFTPLUS:
        v, slope = softplus(v)
    slope = tl.where((v < low) | (v > high), 0.0, slope)
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v), slope


@triton.jit
def decay_powers(dt, A):
    """log2 of the steps' decays. A step of no length changes nothing, even of an A that forgets all at once, -inf."""
    return tl.where(dt == 0.0, 0.0, dt * (A * LOG2E))


@triton.jit
def decay_sums(dt, A):
    """cum as two float32 vectors, and its last entry as two float32 scalars. ``A`` (a scalar) is without log2(e)."""
    a = decay_powers(dt, A)
    wide = tl.where(a < FLOOR, FLOOR, a).to(tl.float64)
    cum, end = tl.cumsum(wide, 0), tl.sum(wide, 0)
    high, end_high = cum.to(tl.float32), end.to(tl.float32)
    return high, (cum - high).to(tl.float32), end_high, (end - end_high).to(tl.float32)


@triton.jit
def listed_sequences(seq_idx, seq_l, t, valid):
    """Which of the positions ``t`` belong to a sequence, and at which one begins, or padding: by seq_idx."""
    here = tl.load(seq_idx + t.to(tl.int64) * seq_l, mask=valid, other=0)
    before = tl.load(seq_idx + (t - 1).to(tl.int64) * seq_l, mask=valid & (t > 0), other=0)
    return valid & (here >= 0), valid & (here != before)


@triton.jit
def packed_sequences(offsets, offset_i, sequences, t, valid, l):
    """The same by the sequences + 1 ``offsets`` of packed sequences."""
    count = offsets_up_to(offsets, offset_i, sequences + 1, t, l)
    last = tl.load(offsets + (count - 1).to(tl.int64) * offset_i, mask=valid & (count > 0), other=-1)
    # Empty sequences before the first position end there: the state before them is not that of the one that begins.
    return valid & (count > 0) & (count <= sequences), valid & tl.where(
        t == 0, (count != 1) | (sequences == 0), last == t
    )


@triton.jit
def offsets_up_to(offsets, offset_i, count, t, l):
    """How many of ``count`` rising offsets, none of which counts as more than ``l``, are at most ``t``: a number, or
    for many t as many numbers."""
    found, step = t * 0, 1
    while step < count:
        step *= 2
    while step > 0:
        tried = tl.minimum(found + step, count)
        offset = tl.load(offsets + (tried - 1).to(tl.int64) * offset_i)
        found = tl.where(tl.minimum(offset, l) <= t, tried, found)
        step //= 2
    return found


@triton.jit
def centred(high, low, end_high):
    """cum about the middle of its range, as one float32: half the rounding of cum itself."""
    return (high - end_high * 0.5) + low


@triton.jit
def decay_between(high_t, low_t, high_s, low_s, mask):
    """L of a tile: cum_t and cum_s broadcast against each other, ``mask`` where s <= t in one sequence.

    The low parts may be None, where ``centred`` sums are exact enough.
    """
    power = high_t - high_s
    if low_t is not None:
        power += low_t - low_s
    return tl.exp2(tl.where(mask, power, float("-inf")))


@triton.jit
def split_dot(a, b, acc, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, with float32 ``a`` split into TERMS parts of b's 16-bit type; in float32 if not NARROW."""
    if NARROW:
        for _ in tl.static_range(TERMS):
            part = a.to(b.dtype)
            acc = tl.dot(part, b, acc)
            a -= part.to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
