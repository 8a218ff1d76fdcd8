"""The CUDA kernel of one decode step (csrc/state_update/cuda.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .layout import floats


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return cuda.cannot_take(*tensors)


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
    dtype = x.dtype
    if not (B.dtype is dtype and C.dtype is dtype and (z is None or z.dtype is dtype)):
        x, B, C = x.float(), B.float(), C.float()
        z = None if z is None else z.float()
    b, h, d = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    cuda.call(
        "state_update_forward",
        x.device,
        state=state,
        x=x,
        dt=floats(dt),
        A=floats(A),
        B=B,
        C=C,
        D=None if D is None else floats(D),
        z=z,
        dt_bias=None if dt_bias is None else floats(dt_bias),
        state_batch_indices=state_batch_indices,
        out=out,
        batch=b,
        slots=state.shape[0],
        heads=h,
        width=d,
        groups=B.shape[1],
        n=B.shape[2],
        dt_softplus=dt_softplus,
    )
    return (out if out.dtype is dtype else out.to(dtype),), ()
