"""The LoRA linear layer on a CPU: one kernel for few rows, which reads the weights once, and one for matrix products.

    y_i = W x_i + bias + scale B_t A_t u_i,    u = dropout(x)

Many rows: the adapters are concatenated by rank, S = (u [A_1; A_2; ..]^T) masked by the row's task, then
S [B_1 | B_2 | ..]^T is added to x W^T. All arithmetic is float32, whatever the operands are stored in, and has the same
bits at every thread count; neither is true of torch's own products on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .int8 import GROUP
from .routing import tasks_of_rows

# Up to so many rows, one pass over the weights beats unpacking them for a matrix product.
FEW_ROWS = 48
# Floats for 64 values of x in digits, as kDigitGroupFloats in lora_linear.h.
DIGITS = 80
# The matrix product's blocks, as in matmul.h.
DEPTH, COLUMNS = 256, 128


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return native.cannot_store(*tensors)


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
    saved = (x, weight, lora_A, lora_B, task, weight_scale) if save else ()
    if x.shape[0] <= FEW_ROWS and not dropout_p and x.numel() and weight.numel():
        return (_few_rows(x, weight, weight_scale, lora_A, lora_B, bias, task, scale),), saved
    y = None if bias is None else bias.float().repeat(x.shape[0], 1)
    y = _matmul(x, _dense(weight, weight_scale).T, onto=y)
    if task is not None:
        low = _low(_dropped(x, dropout_p, dropout_seed), lora_A, task, scale)
        _matmul(low, _by_rank(lora_B), onto=y)
    return (y.to(x.dtype),), saved


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
    x, weight, lora_A, lora_B, task, weight_scale = saved
    dx = dweight = dA = dB = dbias = None
    if grads[0] is None:
        return None, None, None, None, None, None, None
    dy = grads[0]
    if needs[0]:
        dx = _matmul(dy, _dense(weight, weight_scale))
    if needs[1]:
        dweight = _matmul(dy.T, x).to(weight.dtype)
    if needs[4]:
        dbias = _matmul(native.floats(1, dy.shape[0]).fill_(1.0), dy)[0]
    if task is not None and (needs[0] or needs[2] or needs[3]):
        u = _dropped(x, dropout_p, dropout_seed) if needs[2] or needs[3] else None
        A = lora_A.flatten(0, 1)
        dlow = _matmul(dy, _by_rank(lora_B).T).mul_(_routed(task, lora_A, scale))
        if needs[0] and dropout_p:
            _drop(_matmul(dlow, A), dropout_p, dropout_seed, onto=dx)
        elif needs[0]:
            _matmul(dlow, A, onto=dx)
        if needs[2]:
            dA = _matmul(dlow.T, u).view(lora_A.shape).to(lora_A.dtype)
        if needs[3]:
            dB = _matmul(_low(u, lora_A, task, scale).T, dy)
            dB = dB.unflatten(0, lora_A.shape[:2]).transpose(1, 2).to(lora_B.dtype)
    return dx if dx is None else dx.to(x.dtype), dweight, dA, dB, dbias, None, None


# ---- few rows ----


def _rows_apart(t: Tensor | None) -> Tensor | None:
    """The tensor with its innermost stride 1, as the kernel reads it."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _few_rows(x, weight, weight_scale, lora_A, lora_B, bias, task, scale: float) -> Tensor:
    rows, width = x.shape
    out = weight.shape[0]
    y = x.new_empty(rows, out)
    rank = 0 if task is None else lora_A.shape[1]
    kept = width + 31 if weight_scale is None else -(-width // GROUP) * DIGITS
    native.call(
        "lora_linear_forward",
        x=_rows_apart(x),
        weight=_rows_apart(weight),
        weight_scale=weight_scale,
        lora_A=_rows_apart(lora_A),
        lora_B=_rows_apart(lora_B),
        bias=bias,
        task=task,
        y=y,
        workspace=native.floats(rows * (kept + rank)),
        rows=rows,
        out=out,
        rank=rank,
        scale=scale,
        vnni=native.may_use_vnni(),
        **{"in": width},
    )
    return y


# ---- many rows ----


def _dense(weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The weights as floats: themselves, or int8 ones times their scales in memory of their own."""
    if weight_scale is None or not weight.numel():
        return weight
    out, width = weight.shape
    dense = native.floats(out, width)
    weight = _rows_apart(weight)
    native.call(
        "int8_weight_dequantize", dense=dense, weight=weight, weight_scale=weight_scale, out=out, **{"in": width}
    )
    return dense


def _matmul(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a (m, k) b (k, n) in float32, of any strides; added to ``onto`` where it is given."""
    (m, k), n = a.shape, b.shape[1]
    c = native.floats(m, n) if onto is None else onto
    if not (m and n and k):
        return c.zero_() if onto is None else c
    native.call(
        "matmul",
        a=a,
        b=b,
        c=c,
        workspace=native.floats((m + 12 + torch.get_num_threads() * COLUMNS) * DEPTH),
        m=m,
        n=n,
        k=k,
        accumulate=onto is not None,
    )
    return c


def _by_rank(lora_B: Tensor) -> Tensor:
    """lora_B (tasks, out, r) as (tasks r, out)."""
    return lora_B.transpose(1, 2).flatten(0, 1)


def _routed(task: Tensor, lora_A: Tensor, scale: float) -> Tensor:
    """(rows, tasks r): ``scale`` in the columns of the row's own task, 0 in the others."""
    tasks, r, _ = lora_A.shape
    own = task[:, None] == torch.arange(tasks, device=task.device).repeat_interleave(r)
    return own.float().mul_(scale)


def _low(u: Tensor, lora_A: Tensor, task: Tensor, scale: float) -> Tensor:
    return _matmul(u, lora_A.flatten(0, 1).T).mul_(_routed(task, lora_A, scale))


def _dropped(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """u: x itself without dropout."""
    return _drop(x, dropout_p, seed) if dropout_p else x


def _drop(x: Tensor, dropout_p: float, seed: int, onto: Tensor | None = None) -> Tensor:
    """The kept elements of x (rows, width) over 1 - dropout_p, in float32, added to ``onto`` where it is given."""
    x = _rows_apart(x)
    y = native.floats(*x.shape) if onto is None else onto
    native.call(
        "lora_dropout",
        x=x,
        y=y,
        rows=x.shape[0],
        width=x.shape[1],
        seed=seed & 0xFFFFFFFF,
        threshold=int(dropout_p * 2**32),
        keep=1 - dropout_p,
        accumulate=onto is not None,
    )
    return y
