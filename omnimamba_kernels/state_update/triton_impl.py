"""The Triton kernel of one decode step of the selective scan, in one launch. For each row b, head h and channel c:

    dt = softplus(dt + dt_bias)
    state = exp(dt A) state + dt x B        in place
    out = (sum over n of state C + D x) silu(z)

The state is rounded to its storage type only when it is written; out uses the unrounded one. A row without a slot (a
negative index) has out = 0 and touches no state.

Shapes: state (slots, h, d, n); x, dt, z, out (b, h, d); A (h, d, n); B, C (b, g, n); D, dt_bias (h, d); slots (b,).
Plan: a program has BLOCK_D channels of one head of one row, and all their n values at once (a longer n in blocks); all
  that it reads is in flight together. Where a head's decay is TIED (A, dt and dt_bias have stride 0 within it) one
  exponential serves the whole program.
Traffic: the state read and written once, 16 bytes an access: in float32 4 MiB for a sequence of 64 heads of 64 x 128.
  All else is less by a factor of n or of d, but for an A that is not tied, which is as large as the state of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import launch


@triton.jit
def _softplus(a):
    """log(1 + exp(a)) without overflow; log(1 + u) = 2 artanh(u / (2 + u)) for u at most 1, as a series."""
    u = tl.exp(-tl.abs(a))
    r = u / (2 + u)
    q = r * r
    series = 1.0 / 17
    for k in tl.static_range(7, -1, -1):
        series = series * q + 1.0 / (2 * k + 1)
    return tl.maximum(a, 0.0) + 2 * r * series


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _update(
    state, x, dt, A, B, C, D, z, dt_bias, slots, out,
    rows, heads, width, ratio, tiles,
    state_s, state_h, state_d, state_n, x_b, x_h, x_d, dt_b, dt_h, dt_d, A_h, A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n,
    D_h, D_d, z_b, z_h, z_d, bias_h, bias_d, slots_b,
    N: tl.constexpr, ALIGN: tl.constexpr, TIED: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    g = h // ratio
    c = (pid % tiles).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    known = c < width
    slot = b
    if slots is not None:
        slot = tl.load(slots + b * slots_b).to(tl.int64)
    live = (slot >= 0) & (slot < rows)
    state += slot * state_s * ALIGN + h * state_h * ALIGN + c[:, None] * state_d * ALIGN
    B += b * B_b + g * B_g
    C += b * C_b + g * C_g
    A += h * A_h
    dt += b * dt_b + h * dt_h
    if not TIED:
        A += c[:, None] * A_d
        dt += c * dt_d

    xc = _load(x + b * x_b + h * x_h + c * x_d, known)
    step = tl.load(dt).to(tl.float32) if TIED else _load(dt, known)
    if dt_bias is not None:
        dt_bias += h * bias_h
        step += tl.load(dt_bias).to(tl.float32) if TIED else _load(dt_bias + c * bias_d, known)
    if D is not None:
        skip = _load(D + h * D_h + c * D_d, known)
    if z is not None:
        gate = _load(z + b * z_b + h * z_h + c * z_d, known)

    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = known[:, None] & (n < N)[None, :] & live
        old = _load(state + n[None, :] * state_n, inside)
        # As vectors: a tile of one row would have a layout of its own, and the state would be moved to it.
        Bn = _load(B + n * B_n, n < N)
        Cn = _load(C + n * C_n, n < N)
        length = _softplus(step) if SOFTPLUS else step
        if TIED:
            new = tl.exp(length * tl.load(A).to(tl.float32)) * old
        else:
            An = _load(A + n[None, :] * A_n, known[:, None] & (n < N)[None, :])
            new = tl.exp(length[:, None] * An) * old
        new += (length * xc)[:, None] * Bn[None, :]
        tl.debug_barrier()  # threads without a value of their own repeat others' loads
        tl.store(state + n[None, :] * state_n, new.to(state.dtype.element_ty), mask=inside)
        total += tl.sum(new * Cn[None, :], axis=1)

    if D is not None:
        total += skip * xc
    if z is not None:
        total *= gate * tl.sigmoid(gate)
    out += (b * heads + h) * width + c
    tl.store(out, tl.where(live, total, 0.0).to(out.dtype.element_ty), mask=known)


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return triton_launch.cannot_store(*tensors)


def forward(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    *,
    dt_softplus: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    b, h, d = x.shape
    n = state.shape[3]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    use = triton_launch.settings("state_update", "update", triton_launch.target_of(x), values=b * h * d * n)
    BLOCK_N = min(triton.next_power_of_2(max(n, 1)), use["longest"])
    BLOCK_D = min(triton.next_power_of_2(max(d, 1)), max(1, use["values"] // BLOCK_N))
    tiles = triton.cdiv(d, BLOCK_D)
    align = math.gcd(16, *state.stride()[:3])
    launch(
        _update, (b * h * tiles,),
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out,
        state.shape[0], h, d, h // B.shape[1], tiles,
        *(step // align for step in state.stride()[:3]), state.stride(3), *x.stride(), *dt.stride(), *A.stride(),
        *B.stride(), *C.stride(), *_strides(D, 2), *_strides(z, 3), *_strides(dt_bias, 2),
        *_strides(state_batch_indices, 1),
        N=n, ALIGN=align, TIED=_tied(dt, A, dt_bias), SOFTPLUS=dt_softplus, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N,
        **{name: use[name] for name in use if name.startswith("num_")},
    )  # fmt: skip
    return (out,), ()


def _tied(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether each head has one decay and one step, seen from the strides."""
    steps = [*zip(dt.stride()[2:], dt.shape[2:], strict=True), *zip(A.stride()[1:], A.shape[1:], strict=True)]
    if dt_bias is not None:
        steps.append((dt_bias.stride(1), dt_bias.shape[1]))
    return all(stride == 0 or size == 1 for stride, size in steps)


def _strides(t: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if t is None else t.stride()
