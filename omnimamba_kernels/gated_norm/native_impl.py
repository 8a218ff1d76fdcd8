"""The compiled CPU kernels of the gated RMSNorm (csrc/gated_norm)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


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
    rows = _rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.call(
        "gated_norm_forward",
        x=rows,
        z=None if z is None else _rows(z if z.dtype is x.dtype else z.to(x.dtype)),
        weight=_floats(weight),
        bias=None if bias is None else _floats(bias),
        y=_rows(y),
        **_sizes(rows),
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
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    native.call(
        "gated_norm_forward",
        x=residual,
        update=_rows(update if update.dtype is residual.dtype else update.to(residual.dtype)),
        weight=_floats(weight),
        y=y,
        **_sizes(residual),
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
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(dx)
    dweight, dbias = (x.new_empty(d, dtype=torch.float32) for _ in range(2))
    rows = _rows(x)
    arguments = dict(
        x=rows,
        z=None if z is None else _rows(z if z.dtype is x.dtype else z.to(x.dtype)),
        weight=_floats(weight),
        bias=None if bias is None else _floats(bias),
        dy=_rows(grads[0]),
        dx=_rows(dx),
        dz=None if dz is None else _rows(dz),
        dweight=dweight,
        dbias=dbias,
        **_sizes(rows),
        group_size=group_size,
        eps=eps,
        norm_before_gate=norm_before_gate,
    )
    floats = native.call("gated_norm_workspace", **arguments)
    native.call("gated_norm_backward", workspace=x.new_empty(floats, dtype=torch.float32), **arguments)
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if dz is None else dz.to(z.dtype),
    )


def _rows(t: Tensor) -> Tensor:
    """t as at most three dimensions, the last of them contiguous: a view where its strides allow one."""
    strides = t.stride()
    if strides[-1] != 1:
        t = t.contiguous()
    return t if len(strides) <= 3 else t.flatten(0, -3)


def _sizes(rows: Tensor) -> dict[str, int]:
    shape = rows.shape
    leading = len(shape) - 1
    return {"outer": shape[0] if leading else 1, "inner": shape[1] if leading == 2 else 1, "width": shape[-1]}


def _floats(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()
