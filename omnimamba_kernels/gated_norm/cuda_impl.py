"""The CUDA kernels of the gated RMSNorm (csrc/gated_norm/cuda.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .layout import floats, rows_of, sizes


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return cuda.cannot_take(*tensors)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    rows = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    cuda.call(
        "gated_norm_forward",
        x.device,
        x=rows,
        z=None if z is None else rows_of(z.to(x.dtype)),
        weight=floats(weight),
        bias=None if bias is None else floats(bias),
        y=rows_of(y),
        **sizes(rows),
        group_size=group_size,
        eps=eps,
        norm_before_gate=norm_before_gate,
    )
    return (y,), (x, weight, bias, z) if save else ()


def add_forward(residual: Tensor, update: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    width = residual.shape[-1]
    if residual.dim() > 3 or residual.stride(-1) != 1:  # not as the kernel's three dimensions without a copy
        residual += update
        (y,), _ = forward(residual, weight, None, None, eps=eps, group_size=width, norm_before_gate=True)
        return y
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    cuda.call(
        "gated_norm_forward",
        residual.device,
        x=residual,
        update=rows_of(update.to(residual.dtype)),
        weight=floats(weight),
        y=y,
        **sizes(residual),
        group_size=width,
        eps=eps,
    )
    return y


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None],
    needs: tuple[bool, ...],
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = saved
    d = x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(dx)
    dweight, dbias = (x.new_empty(d, dtype=torch.float32) for _ in range(2))
    rows = rows_of(x)
    arguments = dict(
        x=rows,
        z=None if z is None else rows_of(z.to(x.dtype)),
        weight=floats(weight),
        bias=None if bias is None else floats(bias),
        dy=rows_of(grads[0]),
        dx=rows_of(dx),
        dz=None if dz is None else rows_of(dz),
        dweight=dweight,
        dbias=dbias,
        **sizes(rows),
        group_size=group_size,
        eps=eps,
        norm_before_gate=norm_before_gate,
    )
    if x.numel():
        workspace = x.new_empty(cuda.call("gated_norm_workspace", x.device, **arguments), dtype=torch.float32)
        cuda.call("gated_norm_backward", x.device, workspace=workspace, **arguments)
    else:
        dweight.zero_()
        dbias.zero_()
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if dz is None else dz.to(z.dtype),
    )
