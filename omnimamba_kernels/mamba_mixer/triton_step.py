"""One decode step of a Mamba-2 mixer between its two projections: one launch.

Maths    [z0, x0, z, xBC, dt] = zxbcdt;  [x, B, C] = act(convolution of xBC continued from conv_state);
         dt = softplus(dt + dt_bias);  S = exp(dt A) S + dt x B^T;  y = S C + D x  for each head;
         out = [silu(z0) x0, y silu(z)], or with a norm weight the gated RMSNorm of y over each of the g groups.
Shapes   zxbcdt (b, 2 extra + 2 h p + 2 g n + h), conv_state (slots, h p + 2 g n, state_len),
         ssm_state (slots, h, p, n), out (b, extra + h p); any strides (out: contiguous), any float type each; both
         states change in place. tickets (slots, h) int32, of which g a slot are used, 0 before and after.
Plan     a program owns BLOCK_C channels of one group of one row, of one head or several: their convolution, its state,
         and their rows of S, read and written once. B and C are few and each program convolves them for itself.
         Two things need all programs of a group: the norm, and moving B's and C's convolution state on, which no
         program may do while another still reads it. Whoever takes the group's last ticket does both. No program
         waits, so no order of programs can lock up; sums are taken in a fixed order, so no order changes a bit; the
         last one takes the group's tickets back, so that a captured graph can run again, and a slot that two rows
         shared against the rules, whose state is lost, still counts right at the next step.
Order    on NVIDIA the barrier before a ticket and the ticket's own release and acquire publish what all threads of the
         program stored. On gfx942 (read in what Triton 3.6 emits, not seen on a chip) the barrier waits for no store,
         and the wave that takes the ticket for its own alone (s_waitcnt vmcnt(0), buffer_wbl2 sc1): there a program
         is one wave.
Traffic  2 h p n elements of ssm_state a row. Beside it, mostly in L2: 2 g n (2 w + 1) elements for B and C in each
         program, whose own rows of S are 2 BLOCK_C n, and 8 h p bytes of y on their way to the norm.
Cost     the norm of a group is left to one program at the end, size / BLOCK rounds to L2: what a launch of its own
         would take, without the launch. A program for each group alone would need no tickets, but would draw the
         group's whole state through one multiprocessor: of 4 MB, at 64 heads, that is some 50 us (estimated).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(v):
    """e^v, exact for large |v| too: what v log2(e) loses in float32 comes back to first order."""
    power = v * 1.4426950408889634
    lost = tl.fma(v, 1.4426950408889634, -power) + v * 1.925963033500e-08  # log2(e) minus its float32
    return tl.exp2(power) * tl.where(tl.abs(power) < 150.0, 1.0 + 0.6931471805599453 * lost, 1.0)


@triton.jit
def _softplus(v):
    """log(1 + e^v) as max(v, 0) + log(1 + u), u = e^-|v|, and log(1 + u) = 2 artanh(s), s = u / (2 + u) at most 1/3: a
    chip's fast logarithm is wrong where dt is small."""
    u = _exp(-tl.abs(v))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 15 + q * (1.0 / 17 + q * (1.0 / 19))
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * series))
    series = 1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series))
    return tl.where(v > 0.0, v, 0.0) + 2.0 * (s + s * q * series)


@triton.jit
def _silu(v):
    return v * tl.sigmoid(v)


@triton.jit
def _convolved(
    new, state, weight, bias, channel, inside, new_c, state_c, state_l, weight_c, weight_k, bias_c,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The convolution's output for some channels; ``state`` points to the oldest input under the filter."""
    acc = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + channel * bias_c, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        at = state + channel * state_c + k * state_l if k < WIDTH - 1 else new + channel * new_c
        tap = tl.load(weight + channel * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)
        acc += tap * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return _silu(acc) if ACTIVATION else acc


@triton.jit
def _move_on(new, state, channel, inside, new_c, state_c, state_l, STATE_LEN: tl.constexpr, BLOCK_L: tl.constexpr):
    """Drops the oldest inputs of some channels and appends the new ones. An element may lie in several threads: hence
    the barrier between the last reading and the first writing."""
    at = state + (channel * state_c)[:, None]
    newest = tl.load(new + channel * new_c, mask=inside, other=0.0)[:, None]
    for start in range(0, STATE_LEN, BLOCK_L):
        l = (start + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :]
        moved = tl.load(at + (l + 1) * state_l, mask=inside[:, None] & (l + 1 < STATE_LEN), other=0.0)
        moved = tl.where(l == STATE_LEN - 1, newest.to(moved.dtype), moved)
        tl.debug_barrier()
        tl.store(at + l * state_l, moved, mask=inside[:, None] & (l < STATE_LEN))


@triton.jit
def _bypass(row, out, extra, row_c, live, BLOCK: tl.constexpr):
    """out = silu(z0) x0, the columns beside the scan; 0 in padding."""
    for start in range(0, extra, BLOCK):
        c = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (c < extra) & live
        z0 = tl.load(row + c * row_c, mask=inside, other=0.0).to(tl.float32)
        x0 = tl.load(row + (extra + c) * row_c, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + c, (_silu(z0) * x0).to(out.dtype.element_ty), mask=c < extra)


@triton.jit
def _normalised(
    u, squares, z, weight, out, size, members, eps, z_c, weight_c,
    NORM_BEFORE_GATE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the norm of one group of ``size`` values u that other programs have just written: hence no L1 cache."""
    s = tl.arange(0, BLOCK_S)
    total = tl.sum(tl.load(squares + s, mask=s < members, other=0.0, cache_modifier=".cg"), 0)
    r = tl.rsqrt(total / size + eps)
    for start in range(0, size, BLOCK):
        c = (start + tl.arange(0, BLOCK)).to(tl.int64)
        v = tl.load(u + c, mask=c < size, other=0.0, cache_modifier=".cg") * r
        v *= tl.load(weight + c * weight_c, mask=c < size, other=0.0).to(tl.float32)
        if NORM_BEFORE_GATE:
            v *= _silu(tl.load(z + c * z_c, mask=c < size, other=0.0).to(tl.float32))
        tl.store(out + c, v.to(out.dtype.element_ty), mask=c < size)


@triton.jit(do_not_specialize=["slot_count"])
def step_kernel(
    zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, slots, out, u, squares, tickets,
    heads, groups, p, n, extra, slot_count, eps,
    row_b, row_c, conv_b, conv_c, conv_l, state_b, state_h, state_p, state_n, weight_c, weight_k, bias_c,
    dt_bias_h, A_h, D_h, D_p, norm_c, slots_b,
    HAS_SLOTS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_NORM: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
    STATE_LEN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size = tl.cast(heads // groups, tl.int64) * p  # channels of a group
    members = tl.cdiv(size, BLOCK_C)
    pid = tl.program_id(0)
    member, group, b = pid % members, pid // members % groups, pid // members // groups
    dim, states = size * groups, tl.cast(groups, tl.int64) * n
    c = (member * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    j = tl.arange(0, BLOCK_N).to(tl.int64)
    inside, in_n = c < size, j < n
    channel = group * size + c
    head, i = channel // p, channel % p
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b * slots_b).to(tl.int64)
    live = (slot >= 0) & (slot < slot_count)  # else padding: of a GPU's indices nobody knows more before
    row = zxbcdt + b * row_b
    out += b * (extra + dim)
    if pid % (members * groups) == 0:
        _bypass(row, out, extra, row_c, live, BLOCK)
    out += extra
    if ~live:
        tl.store(out + channel, tl.zeros((BLOCK_C,), out.dtype.element_ty), mask=inside)
        return

    # S is the longest way to memory: asked for first.
    both = inside[:, None] & in_n[None, :]
    S_at = ssm_state + slot * state_b + (head * state_h + i * state_p)[:, None] + j[None, :] * state_n
    S = tl.load(S_at, mask=both, other=0.0).to(tl.float32)
    z = row + 2 * tl.cast(extra, tl.int64) * row_c
    xBC = z + dim * row_c
    conv_state += slot * conv_b
    window = conv_state + (STATE_LEN - (WIDTH - 1)) * tl.cast(conv_l, tl.int64)
    B_channel = dim + group * n + j
    C_channel = B_channel + states
    x = _convolved(xBC, window, conv_weight, conv_bias, channel, inside, row_c, conv_c, conv_l, weight_c, weight_k,
                   bias_c, WIDTH, HAS_CONV_BIAS, ACTIVATION)  # fmt: skip
    B = _convolved(xBC, window, conv_weight, conv_bias, B_channel, in_n, row_c, conv_c, conv_l, weight_c, weight_k,
                   bias_c, WIDTH, HAS_CONV_BIAS, ACTIVATION)  # fmt: skip
    C = _convolved(xBC, window, conv_weight, conv_bias, C_channel, in_n, row_c, conv_c, conv_l, weight_c, weight_k,
                   bias_c, WIDTH, HAS_CONV_BIAS, ACTIVATION)  # fmt: skip

    dt = tl.load(xBC + (dim + 2 * states + head) * row_c, mask=inside, other=0.0).to(tl.float32)
    if HAS_DT_BIAS:
        dt += tl.load(dt_bias + head * dt_bias_h, mask=inside, other=0.0).to(tl.float32)
    dt = _softplus(dt)
    decay = _exp(dt * tl.load(A + head * A_h, mask=inside, other=0.0).to(tl.float32))
    S = decay[:, None] * S + (dt * x)[:, None] * B[None, :]
    tl.debug_barrier()  # threads without an element of their own repeat others' loads
    tl.store(S_at, S.to(ssm_state.dtype.element_ty), mask=both)
    y = tl.sum(S * C[None, :], 1)
    if HAS_D:
        y += tl.load(D + head * D_h + i * D_p, mask=inside, other=0.0).to(tl.float32) * x
    if not HAS_NORM or not NORM_BEFORE_GATE:
        y *= _silu(tl.load(z + channel * row_c, mask=inside, other=0.0).to(tl.float32))
    if HAS_NORM:
        tl.store(u + b * dim + channel, y, mask=inside)
        tl.store(squares + pid, tl.sum(tl.where(inside, y * y, 0.0), 0))
    else:
        tl.store(out + channel, y.to(out.dtype.element_ty), mask=inside)
    _move_on(xBC, conv_state, channel, inside, row_c, conv_c, conv_l, STATE_LEN, BLOCK_L)

    ticket = tickets + slot * heads + group
    tl.debug_barrier()  # the atomic publishes what this thread has seen; the barrier shows it the other threads' stores
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") % members == members - 1:
        tl.debug_barrier()
        tl.atomic_add(ticket, (-members).to(tl.int32), sem="relaxed", scope="gpu")
        _move_on(xBC, conv_state, B_channel, in_n, row_c, conv_c, conv_l, STATE_LEN, BLOCK_L)
        _move_on(xBC, conv_state, C_channel, in_n, row_c, conv_c, conv_l, STATE_LEN, BLOCK_L)
        if HAS_NORM:
            first = group * size
            _normalised(
                u + b * dim + first, squares + pid - member, z + first * row_c, norm_weight + first * norm_c,
                out + first, size, members, eps, row_c, norm_c, NORM_BEFORE_GATE, BLOCK_S, BLOCK,
            )  # fmt: skip
