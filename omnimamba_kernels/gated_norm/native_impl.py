"""The compiled CPU kernels of the gated RMSNorm (csrc/gated_norm)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .layout import floats, rows_of, sizes


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return native.cannot_store(*tensors)


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
    y = native.empty(x.shape, x.dtype)
    native.call(
        "gated_norm_forward",
        x=rows,
        z=None if z is None else rows_of(native.stored_as(x.dtype, z)),
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
    if residual.dim() > 3 or residual.stride(-1) != 1:  # not as the kernel's three dimensions without a copy
        residual += update
        return forward(residual, weight, None, None, eps=eps, group_size=residual.shape[-1], norm_before_gate=True)[0][
            0
        ]
    y = native.empty(residual.shape, residual.dtype)
    native.call(
        "gated_norm_forward",
        x=residual,
        update=rows_of(native.stored_as(residual.dtype, update)),
        weight=floats(weight),
        y=y,
        **sizes(residual),
        group_size=residual.shape[-1],
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
    dx = native.empty(x.shape, x.dtype)
    dz = None if z is None else native.empty(x.shape, x.dtype)
    dweight, dbias = (x.new_empty(d, dtype=torch.float32) for _ in range(2))
    rows = rows_of(x)
    arguments = dict(
        x=rows,
        z=None if z is None else rows_of(native.stored_as(x.dtype, z)),
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
    workspace = x.new_empty(native.call("gated_norm_workspace", **arguments), dtype=torch.float32)
    native.call("gated_norm_backward", workspace=workspace, **arguments)
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if dz is None else dz.to(z.dtype),
    )
