"""The CUDA kernels of the LoRA linear layer (csrc/lora_linear/cuda*.cu).

    y_i = W x_i + bias + scale B_t A_t u_i,    u = dropout(x),    t = task of row i, -1: the base alone

Launches  up to FEW_ROWS rows: 1, and 1 more for many ranks, dropout or adapters of another type. More: 2 forward (low;
          y). Backward, each as needed: dlow 1, dB and dbias 2 (parts; their sum), dA 2, dx 1, dweight 1. int8 weights
          of many rows, or for dx: 1 more, which makes them dense in x's type.
Saved     low (rows, tasks r) float32, so that the backward does not read x for dB.
Products  16-bit operands of one type on the matrix units, on Hopper by a kernel of its own (cuda_sm90.cu) where the
          product fills a quarter of the chip; and int8 weights under few rows of 16 bits. Others, and rows that are
          not packs of 16 bytes, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .routing import tasks_of_rows

MATRIX = ("matmul16_kernel", "matmul_sm90_kernel", "few_rows_kernel", "few_rows_int8_kernel", "low_kernel")

# Up to so many rows, a block holds all of them beside its strip of the weights.
FEW_ROWS = 64


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return cuda.cannot_take(*tensors)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    task: Tensor | None,
    weight_scale: Tensor | None,
    *,
    one_task: int,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    task = tasks_of_rows(x, lora_A, task, one_task)
    dropout = _dropout(dropout_p, dropout_seed)
    low = None if task is None else _low_like(x, lora_A)
    if x.shape[0] <= FEW_ROWS:
        y = _few_rows(x, weight, weight_scale, lora_A, lora_B, bias, task, low, scale, dropout)
    else:
        if task is not None:
            _project(x, lora_A, task, low, scale, dropout)
        dense = _dense(weight, weight_scale, x.dtype)
        y = _matmul(x, dense.T, x.dtype, bias, low, None if task is None else lora_B.transpose(1, 2), {})
    return (y,), (x, weight, lora_A, lora_B, bias, task, weight_scale, low) if save else ()


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None],
    needs: tuple[bool, ...],
    *,
    one_task: int,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, bias, task, weight_scale, low = saved
    dx = dweight = dA = dB = dbias = dlow = None
    if grads[0] is None:
        return None, None, None, None, None, None, None
    dy = grads[0] if 0 not in grads[0].stride() else grads[0].contiguous()
    dropout = _dropout(dropout_p, dropout_seed)
    routed = task is not None
    if routed and (needs[0] or needs[2]):
        dlow = _low_like(x, lora_A)
        # The matrix units read B^T along the depth; it is small.
        up = lora_B.transpose(1, 2)
        _project(dy, up.contiguous() if dy.dtype is lora_B.dtype else up, task, dlow, scale, {})
    if (routed and needs[3]) or needs[4]:
        dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if routed and needs[3] else None
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if needs[4] else None
        _outer(dy, None if dB is None else low, None if dB is None else dB.transpose(1, 2), dbias, {})
    if needs[0]:
        dx = _matmul(dy, _dense(weight, weight_scale, dy.dtype), x.dtype, None, dlow, lora_A, dropout)
    if needs[1]:
        dweight = _matmul(dy.T, x, weight.dtype, None, None, None, {})
    if routed and needs[2]:
        dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _outer(x, dlow, dA, None, dropout)
    return dx, dweight, dA, dB, dbias, None, None


# ---- the parts ----


def _dropout(p: float, seed: int) -> dict[str, int | float | bool]:
    """The mask's numbers as the kernels take them."""
    return {"dropout": True, "seed": seed & 0xFFFFFFFF, "threshold": int(p * 2**32), "keep": 1 - p} if p else {}


def _low_like(x: Tensor, lora_A: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], lora_A.shape[0] * lora_A.shape[1], dtype=torch.float32)


def _few_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    task: Tensor | None,
    low: Tensor | None,
    scale: float,
    dropout: dict,
) -> Tensor:
    """y; low is filled on the way."""
    (rows, width), out = x.shape, weight.shape[0]
    tasks, rank = (0, 0) if task is None else lora_A.shape[:2]
    y = x.new_empty(rows, out)
    cuda.call(
        "lora_linear_forward",
        x.device,
        x=x,
        weight=weight,
        weight_scale=weight_scale,
        lora_A=lora_A,
        lora_B=lora_B,
        bias=bias,
        task=task,
        low=low,
        y=y,
        rows=rows,
        out=out,
        tasks=tasks,
        rank=rank,
        scale=scale,
        project=task is not None,
        **{"in": width},
        **dropout,
    )
    return y


def _project(u: Tensor, lora_A: Tensor, task: Tensor, low: Tensor, scale: float, dropout: dict) -> None:
    """low = scale u A^T in the columns of each row's own task, 0 in the others."""
    rows, width = u.shape
    cuda.call(
        "lora_linear_low",
        u.device,
        x=u,
        lora_A=lora_A,
        task=task,
        low=low,
        rows=rows,
        tasks=lora_A.shape[0],
        rank=lora_A.shape[1],
        scale=scale,
        **{"in": width},
        **dropout,
    )


def _dense(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights as floats: themselves, or int8 ones times their scales as ``dtype``, in memory of their own."""
    if weight_scale is None:
        return weight
    out, width = weight.shape
    dense = weight.new_empty(out, width, dtype=dtype)
    cuda.call(
        "int8_weight_dequantize",
        weight.device,
        dense=dense,
        weight=weight,
        weight_scale=weight_scale,
        out=out,
        **{"in": width},
    )
    return dense


def _matmul(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dropout: dict,
) -> Tensor:
    """a (m, k) b (k, n) + bias + low up, with up (tasks, r, n); ``dropout`` is that of the last term."""
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n, dtype=dtype)
    tasks, rank = (0, 0) if low is None else up.shape[:2]
    cuda.call(
        "lora_matmul",
        a.device,
        a=a,
        b=b,
        c=c,
        bias=bias,
        low=low,
        up=None if low is None else up,
        m=m,
        n=n,
        k=k,
        tasks=tasks,
        rank=rank,
        multiprocessors=cuda.limits(a.device)[0],
        **dropout,
    )
    return c


def _outer(v: Tensor, low: Tensor | None, gradient: Tensor | None, dbias: Tensor | None, dropout: dict) -> None:
    """gradient (tasks, r, width) = low^T u and dbias = the sum of v's rows, u = v with dropout."""
    rows, width = v.shape
    tasks, rank = (0, 0) if gradient is None else gradient.shape[:2]
    arguments = dict(
        v=v,
        low=low,
        gradient=gradient,
        dbias=dbias,
        rows=rows,
        width=width,
        tasks=tasks,
        rank=rank,
        **dropout,
    )
    workspace = v.new_empty(cuda.call("lora_outer_workspace", v.device, **arguments), dtype=torch.float32)
    cuda.call("lora_outer", v.device, workspace=workspace, **arguments)
