"""The CUDA kernels of Mamba-2's scan (csrc/ssd_scan/cuda*.cu)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd, cuda

CHUNK = {torch.bfloat16: 64, torch.float32: 32}  # CHUNK in csrc/ssd_scan/chunk.cuh
STEPS = 5  # STEPS there
WIDEST = 256  # the most states of for_instance in csrc/ssd_scan/schedule.cuh
ROOM = 128 << 10  # bytes of shared memory that every backward fits into (BackLayout in csrc/ssd_scan/back_roles.cuh)

# What the report holds to the matrix units: all kernels but the one of the steps.
MATRIX = (
    "ssd_walk_kernel", "ssd_ends_kernel", "ssd_hopper_walk_kernel", "ssd_back_walk_kernel", "ssd_back_chunk_kernel",
    "ssd_hopper_back_chunk_kernel",
)  # fmt: skip


def why_not(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    *tensors: Tensor | None, **_: Any,
) -> str | None:  # fmt: skip
    if 0 in x.shape[2:] or 0 in B.shape[2:]:
        return f"it needs at least one head, channel, group and state: x is {tuple(x.shape)}, B is {tuple(B.shape)}"
    if B.shape[3] > WIDEST:
        return f"it holds at most {WIDEST} states a channel, B has {B.shape[3]}"
    reason = cuda.cannot_take(x, dt, A, B, C, D, z, *tensors)
    if reason or x.device.type != "cuda":
        return reason
    if not autograd.wants_gradients(x, dt, A, B, C, D, z, *tensors):  # the forward fits into any chip
        return None
    return too_large(B.shape[3], z is not None and x.dtype == torch.bfloat16, cuda.limits(x.device)[1])


def too_large(states: int, gated: bool, shared: int) -> str | None:
    """Why the backward's tiles do not fit beside one another; ``gated``: dy is held as three bfloat16 terms."""
    most = WIDEST if shared >= ROOM else 64 if gated else 128
    if states <= most:
        return None
    return f"it holds at most {most} states a channel in {shared} bytes of shared memory, B has {states}"


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple]:
    b, l, h, p = x.shape
    n = B.shape[3]

    def floats(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    fields = _fields(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit)
    storage = fields["x"].dtype
    chunks = -(-l // CHUNK[storage])
    y, final = x.new_empty(b, l, h, p, dtype=storage), floats(b, h, p, n)
    varlen = None if cu_seqlens is None else floats(cu_seqlens.shape[0] - 1, h, p, n)
    states = floats(b, chunks, h, p * n) if save else None
    ungated = torch.empty_like(y) if save and z is not None else None
    steps, used = floats(b, h, chunks, STEPS * CHUNK[storage]), x.new_empty(b, chunks, dtype=torch.int64)
    if l == 0:
        final.copy_(initial_states) if initial_states is not None else final.zero_()
        if varlen is not None:
            varlen.zero_()[:1] = final[: len(varlen)]
    elif b:
        fields |= dict(seq_idx=seq_idx, cu_seqlens=cu_seqlens, steps=steps, used=used, y=y, final_states=final)
        fields |= dict(varlen_states=varlen, states=states, ungated=ungated)
        fields["sequences"] = 0 if varlen is None else varlen.shape[0]
        segments = cuda.call("ssd_scan_segments", x.device, **fields)
        ends, decays = floats(b, h, segments - 1, p * n), floats(b, h, segments - 1)
        cuda.call("ssd_scan_forward", x.device, segments=segments, ends=ends, decays=decays, **fields)
    saved = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, steps, used, states, ungated)
    return (y.to(x.dtype), final, varlen), saved if save else ()


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor | None, ...]:
    *inputs, seq_idx, cu_seqlens, steps, used, states, ungated = saved
    x, dt, A, B, C, D, z, dt_bias, initial_states = inputs
    b, l, h, p = x.shape
    g, n = B.shape[2:]

    def floats(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    fields = _fields(*inputs, dt_softplus, dt_limit)
    storage = fields["x"].dtype
    dy, dfinal, dvarlen = grads
    dx = x.new_empty(x.shape, dtype=storage)
    ddt, dA, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (dt, A, B, C))
    dD, ddt_bias = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (D, dt_bias))
    dz = None if z is None else torch.empty_like(dx)
    dinitial = None if initial_states is None else floats(b, h, p, n)
    if dx.numel():
        fields |= dict(dy=_pieces(torch.zeros_like(dx) if dy is None else dy, storage), dx=dx, ddt=ddt, dA=dA, dz=dz)
        fields |= dict(dfinal_states=_floats(dfinal), dvarlen_states=_floats(dvarlen), dinitial_states=dinitial)
        fields |= dict(seq_idx=seq_idx, used=used, steps=steps, states=states, ungated=ungated)
        fields |= dict(dD=dD, ddt_bias=ddt_bias)
        if dvarlen is not None:
            fields |= dict(cu_seqlens=cu_seqlens, sequences=len(dvarlen))
        parts = cuda.call("ssd_scan_parts", x.device, **fields)
        workspace = floats(parts, 2, b, l * g * n)
        if parts == 1 and B.dtype == C.dtype == torch.float32:
            dB, dC = workspace.view(2, b, l, g, n)
        fields |= dict(dstates=torch.empty_like(states), sums=floats(b, states.shape[1], h, 2 + p))
        cuda.call("ssd_scan_backward", x.device, workspace=workspace, dB=dB, dC=dC, **fields)
    else:
        for grad in (ddt, dA, dB, dC, dD, ddt_bias):
            if grad is not None:
                grad.zero_()
        if dinitial is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
            if dvarlen is not None:
                dinitial[: len(dvarlen)] += dvarlen[:1]
    found = (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial)
    cast = [
        grad.to(t.dtype) if t is not None and need else None
        for t, grad, need in zip(inputs, found, needs[: len(inputs)], strict=True)
    ]
    return (*cast, None, None)


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _fields(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit) -> dict[str, Any]:
    """What forward and backward both tell the kernels: bfloat16 where x, B, C and z all have it, float32 else."""
    alike = all(t is None or t.dtype == torch.bfloat16 for t in (x, B, C, z))
    storage = torch.bfloat16 if alike else torch.float32
    if D is not None:
        D = (D[:, None] if D.dim() == 1 else D).float().expand(x.shape[2:])
    small = dict(A=A, dt_bias=dt_bias, initial_states=initial_states)
    multiprocessors, shared = cuda.limits(x.device)
    return {
        **{name: _pieces(t, storage) for name, t in dict(x=x, B=B, C=C, z=z).items()},
        **{name: None if t is None else t.float() for name, t in small.items()},
        "dt": dt,
        "D": D,
        "batch": x.shape[0],
        "length": x.shape[1],
        "heads": x.shape[2],
        "headdim": x.shape[3],
        "groups": B.shape[2],
        "state": B.shape[3],
        "dt_softplus": dt_softplus,
        "dt_low": dt_limit[0],
        "dt_high": dt_limit[1],
        "multiprocessors": multiprocessors,
        "shared_limit": shared,
    }


def _pieces(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``t`` in ``dtype``, its rows cut into whole pieces of 16 bytes; most often ``t`` itself."""
    if t is None:
        return None
    t = t.to(dtype)
    each = 16 // t.element_size()
    whole = t.shape[-1] % each == 0 and t.stride(-1) == 1 and t.data_ptr() % 16 == 0
    if whole and all(stride % each == 0 for stride in t.stride()[:-1]):
        return t
    return F.pad(t, (0, -t.shape[-1] % each)).contiguous()
