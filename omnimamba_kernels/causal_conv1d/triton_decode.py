"""The causal convolution at decode: continued from a state, and the states of packed sequences. One launch each.

    y[b, c, t] = act(bias[c] + sum_k weight[c, k] u[t + k])

where u is the last w - 1 inputs of the state, rounded as they are stored in x, followed by x[b, c]. Afterwards the
state is the last state_len values of itself followed by x; as a ring (``seqlens``) it has input i of a sequence in
place i modulo state_len. A row without a slot (a negative index) has y = 0 and touches no state.

Shapes: x, y (b, d, l); state (slots, d, state_len); weight (d, w); bias (d,); seqlens, slots (b,); any strides.
Plan: a program has BLOCK_D channels of a row; all its threads have read the state before one of them writes there.
Traffic: b d (2 l + 2 state_len) elements, and weight once from memory; a ring: b d (3 l + w - 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_steps import load_bias, sigmoid


@triton.jit
def _load_input(x, x_l, state, s_k, start, t, state_len, inside, WIDTH: tl.constexpr):
    """Input t of this call; t < 0: of the state, whose latest input is in the place before ``start``."""
    place = start + t
    place = tl.where(place < 0, place + state_len, place)
    before = tl.load(state + place * s_k, mask=inside & (t < 0), other=0.0)
    now = tl.load(x + t * x_l, mask=inside & (t >= 0), other=0.0)
    return tl.where(t < 0, before.to(now.dtype), now).to(tl.float32)


@triton.jit
def _shift(x, x_l, state, s_k, length, state_len, inside, BLOCK_S: tl.constexpr):
    """The state forgets its first ``length`` values and takes in x. x, state: one column for each channel."""
    for first in range(0, state_len, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S)[None, :].to(tl.int64)
        kept = i + length < state_len
        old = tl.load(state + (i + length) * s_k, mask=inside & kept, other=0.0)
        new = tl.load(
            x + (i + length - state_len) * x_l, mask=inside & (i < state_len) & (i + length >= state_len), other=0.0
        )
        tl.debug_barrier()  # a thread may write where another one reads
        tl.store(state + i * s_k, tl.where(kept, old, new.to(old.dtype)), mask=inside & (i < state_len))


@triton.jit
def update_kernel(
    x, state, weight, bias, seqlens, slots, y,
    rows, channels, length, state_len, tiles_d,
    x_b, x_d, x_l, s_b, s_d, s_k, w_d, w_k, bias_d, seqlens_b, slots_b, y_b, y_d, y_l,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // tiles_d).to(tl.int64)
    c = (tl.program_id(0) % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    length, state_len = tl.cast(length, tl.int64), tl.cast(state_len, tl.int64)
    inside = c < channels
    slot = b
    if slots is not None:
        slot = tl.load(slots + b * slots_b).to(tl.int64)
    live = inside & (slot >= 0) & (slot < rows)
    start = tl.zeros([], tl.int64)
    if seqlens is not None:
        start = tl.maximum(tl.load(seqlens + b * seqlens_b).to(tl.int64), 0) % state_len
    x += b * x_b + c * x_d
    y += b * y_b + c * y_d
    state += slot * s_b + c * s_d
    offset = load_bias(bias, bias_d, c, inside)
    for t in range(length):
        a = offset
        for k in tl.static_range(WIDTH):
            tap = tl.load(weight + c * w_d + k * w_k, mask=inside, other=0.0).to(tl.float32)
            a += tap * _load_input(x, x_l, state, s_k, start, t + (k - (WIDTH - 1)), state_len, live, WIDTH)
        if ACTIVATION:
            a *= sigmoid(a, x)
        tl.store(y + t * y_l, tl.where(live, a, 0.0).to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # a thread may write where another one reads
    if seqlens is None:
        _shift(x[:, None], x_l, state[:, None], s_k, length, state_len, live[:, None], BLOCK_S)
    else:
        first = tl.maximum(length - state_len, 0)  # a longer x leaves its last values
        place = (start + first) % state_len
        for t in range(first, length):
            value = tl.load(x + t * x_l, mask=live, other=0.0)
            tl.store(state + place * s_k, value.to(state.dtype.element_ty), mask=live)
            place = tl.where(place + 1 == state_len, 0, place + 1)


@triton.jit
def varlen_states_kernel(
    x, cu_seqlens, states, total, channels, state_len, tiles_d, tiles_s, x_t, x_d, cu_i,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """states (sequences, d, state_len): the last inputs of x (total, d), right-aligned, zeros before a shorter one."""
    pid = tl.program_id(0)
    sequence = (pid // tiles_d // tiles_s).to(tl.int64)
    i = (pid // tiles_d % tiles_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    c = (pid % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first = tl.load(cu_seqlens + sequence * cu_i).to(tl.int64)
    end = tl.load(cu_seqlens + (sequence + 1) * cu_i).to(tl.int64)
    t = end - state_len + i
    inside = (i < state_len) & (c < channels)
    value = tl.load(x + t * x_t + c * x_d, mask=inside & (t >= tl.maximum(first, 0)) & (t < total), other=0.0)
    states += sequence * channels * state_len
    tl.store(states + c * state_len + i, value, mask=inside)
