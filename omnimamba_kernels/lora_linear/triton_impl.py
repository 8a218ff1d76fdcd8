"""The LoRA linear layer in Triton, host side.

    y_i = W x_i + bias + scale B_t A_t u_i,    u = dropout(x),    t = task of row i, -1: the base alone

The adapters are concatenated by rank: low = scale (u [A_1; A_2; ..]^T), masked by each row's task, and the accumulators
of x W^T start from low [B_1 | B_2 | ..]^T. No sorting, nothing read back, any mix of tasks; one task of all rows goes
as a number and makes no tensor.

Launches  up to FEW_ROWS rows: 1. More: 2 forward (low; y), 3 where low is split along ``in``. Backward, each as needed:
          one pass over dy for dlow, dB and dbias, with a small sum for each; dx; dweight; dA and its sum. int8 weights
          of many rows or for dx: 1 more, which makes them dense in x's type.
Saved     low (rows, tasks r) float32, so that the backward does not read x for dB.
Products  16-bit operands of one type as they are; others in float32: as three tf32 products, on AMD in float32 itself.
          Where the result is stored in 16 bits a float32 operand beside bfloat16 goes as two bfloat16 parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import triton_launch
from ..triton_launch import Target, launch, settings, target_of, together
from .int8 import GROUP
from .tiles import FEW_ROWS, block_r, few_rows_settings, fused, low_backward_bytes, pairs, product_bytes, split
from .triton_few_rows import few_rows_kernel
from .triton_int8 import dequantize_kernel
from .triton_low_rank import low_backward_kernel, narrow_kernel, sum_kernel
from .triton_matmul import matmul_kernel


class Route(NamedTuple):
    """The task of each row, or None and that of all rows."""

    task: Tensor | None
    one_task: int


class Dropout(NamedTuple):
    """The mask's numbers as the kernels take them: 32 bits each, as signed integers; ``keep`` is 1 - p."""

    seed: int
    threshold: int
    keep: float

    @classmethod
    def of(cls, p: float, seed: int) -> Dropout | None:
        return cls(_signed(seed), _signed(int(p * 2**32)), 1 - p) if p else None


NO_DROPOUT = (0, 0, 1.0)


def _signed(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return triton_launch.cannot_store(*tensors)


@together()
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
    dropout = Dropout.of(dropout_p, dropout_seed)
    if task is not None and task.dtype is torch.int64:  # cut to 32 bits, 2^32 would be adapter 0
        task = task.clamp(-1, lora_A.shape[0]).int()
    route = None if lora_A is None else Route(task, one_task)
    in_passing = route is not None and fused(x, lora_A, dropout_p)
    low = None if route is None or in_passing else _project_down(x, lora_A, route, scale, dropout)
    if x.shape[0] <= FEW_ROWS:
        y, low = _few_rows(x, weight, weight_scale, lora_A, lora_B, bias, route, low, scale, in_passing, save)
    else:
        dense = _dense(weight, weight_scale, x.dtype)
        y = _matmul(x, dense.T, x.dtype, bias, low, None if low is None else lora_B.transpose(1, 2))
    return (y,), (x, weight, lora_A, lora_B, bias, task, weight_scale, low) if save else ()


@together()
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
    dx = dweight = dA = None
    if grads[0] is None:
        return None, None, None, None, None, None, None
    dy = grads[0]
    dropout = Dropout.of(dropout_p, dropout_seed)
    routed = lora_A is not None
    route = Route(task, one_task) if routed else None
    wanted = (routed and (needs[0] or needs[2]), routed and needs[3], needs[4])
    dlow, dB, dbias = _low_backward(dy, lora_B, low, route, bias, scale, wanted)
    if needs[0]:
        dx = _matmul(dy, _dense(weight, weight_scale, dy.dtype), x.dtype, None, dlow, lora_A, dropout)
    if needs[1]:
        dweight = _matmul(dy.T, x, weight.dtype)
    if routed and needs[2]:
        dA = _gradient_A(x, dlow, lora_A, dropout)
    return dx, dweight, dA, dB, dbias, None, None


# ---- the parts ----


def _matmul(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """a (m, k) b (k, n) + bias + low up, with up (tasks, r, n); ``dropout`` is that of the last term."""
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n, dtype=dtype)
    target = target_of(a)
    ranks, rank = (0, 1) if low is None else (low.shape[1], up.shape[1])
    depth = 0 if low is None else block_r(ranks) * pairs(low, up, dtype, target)
    use = settings("lora_linear", "matmul", target, m=m, n=n, k=k, bytes=product_bytes(a, b), depth=depth)
    tiles = triton.cdiv(m, use["BLOCK_M"]) * triton.cdiv(n, use["BLOCK_N"])
    step_r = block_r(ranks, use.pop("longest_r"))
    launch(
        matmul_kernel, (tiles,),
        a, b, c, bias, low, up, m, n, k, ranks, rank, *a.stride(), *b.stride(), _stride(bias),
        *((0, 0, 0) if up is None else up.stride()), *(dropout or NO_DROPOUT),
        HAS_BIAS=bias is not None, HAS_LOW=low is not None, MORE_RANKS=ranks > step_r,
        **_dropout_flags(dropout, m, n), **_dot_flags(dtype, target), BLOCK_R=step_r, **use,
    )  # fmt: skip
    return c


def _dense(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights as floats: themselves, or int8 ones times their scales as ``dtype``, in memory of their own."""
    if weight_scale is None:
        return weight
    n, k = weight.shape
    dense = weight.new_empty(n, k, dtype=dtype)
    use = settings("lora_linear", "dequantize", target_of(weight))
    launch(
        dequantize_kernel, (triton.cdiv(n, use["BLOCK_N"]) * triton.cdiv(k, GROUP),),
        weight, weight_scale, dense, n, k, *weight.stride(), *weight_scale.stride(), GROUP=GROUP, **use,
    )  # fmt: skip
    return dense


def _few_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    route: Route | None,
    low: Tensor | None,
    scale: float,
    in_passing: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and low where it was given or is to be saved."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    tasks, rank = (0, 1) if route is None else lora_A.shape[:2]
    task, one_task, task_m = _route(route)
    if in_passing and save:
        low = x.new_empty(m, tasks * rank, dtype=torch.float32)
    target = target_of(x)
    use = few_rows_settings(x, weight, tasks * rank if in_passing else 0, target)
    launch(
        few_rows_kernel, (triton.cdiv(n, use["BLOCK_N"]),),
        x, weight, weight_scale, lora_A, lora_B, bias, task, low, y, m, n, k, tasks * rank, max(rank, 1), scale,
        *x.stride(), *weight.stride(), *((0, 0) if weight_scale is None else weight_scale.stride()),
        *((0,) * 6 if route is None else (*lora_A.stride(), *lora_B.stride())),
        _stride(bias), task_m, one_task,
        HAS_BIAS=bias is not None, HAS_LOW=route is not None, FUSED=in_passing, SAVE=in_passing and save,
        **_dot_flags(x.dtype, target), BLOCK_R=block_r(tasks * rank), GROUP=GROUP, **use,
    )  # fmt: skip
    return y, low


def _project_down(x: Tensor, lora_A: Tensor, route: Route, scale: float, dropout: Dropout | None) -> Tensor:
    """low (rows, tasks r) = scale u A^T, masked by task."""
    parts = _narrow(x, lora_A.permute(2, 0, 1), route, scale, dropout, transposed=False, dtype=torch.float32)
    if parts.shape[0] == 1:
        return parts[0]
    low = torch.empty_like(parts[0])
    _sum(parts, low, lora_A.shape[1], low.shape[1], lora_A.shape[1], 1)
    return low


def _gradient_A(x: Tensor, dlow: Tensor, lora_A: Tensor, dropout: Dropout | None) -> Tensor:
    tasks, rank, width = lora_A.shape
    parts = _narrow(x.T, dlow.unflatten(1, (tasks, rank)), None, 1.0, dropout, transposed=True, dtype=lora_A.dtype)
    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
    _sum(parts, dA, rank, 1, rank * width, width)
    return dA


def _narrow(
    a: Tensor,
    b: Tensor,
    route: Route | None,
    scale: float,
    dropout: Dropout | None,
    *,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Parts (s, m, tasks r) of a (m, k) b (k, tasks, r), the dropout on a; their sum will be stored in ``dtype``."""
    (m, k), (_, tasks, rank) = a.shape, b.shape
    ranks = tasks * rank
    target = target_of(a)
    use = settings("lora_linear", "narrow", target, m=m, k=k, bytes=product_bytes(a, b))
    step_r = block_r(ranks, use.pop("longest_r"))
    tiles_m, tiles_r = triton.cdiv(m, use["BLOCK_M"]), triton.cdiv(ranks, step_r)
    splits, chunk = split(k, use["BLOCK_K"], tiles_m * tiles_r, target, use.pop("per_multiprocessor"))
    parts = a.new_empty(splits, m, ranks, dtype=torch.float32)
    task, one_task, task_m = _route(route)
    launch(
        narrow_kernel, (tiles_m, splits, tiles_r),
        a, b, task, parts, m, k, ranks, max(rank, 1), chunk, scale, *a.stride(), *b.stride(), task_m, one_task,
        m if transposed else k, *(dropout or NO_DROPOUT),
        ROUTE=route is not None, TRANSPOSED=transposed, **_dropout_flags(dropout, m, k),
        **_dot_flags(dtype, target), BLOCK_R=step_r, **use,
    )  # fmt: skip
    return parts


def _low_backward(
    dy: Tensor,
    lora_B: Tensor | None,
    low: Tensor | None,
    route: Route | None,
    bias: Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dlow (rows, tasks r), dB and dbias, those ``wanted``, from one pass over dy."""
    if not any(wanted):
        return None, None, None
    (m, n), target = dy.shape, target_of(dy)
    tasks, rank = (0, 1) if route is None else (lora_B.shape[0], lora_B.shape[2])
    task, one_task, task_m = _route(route)
    ranks = tasks * rank
    use = settings("lora_linear", "low_backward", target, m=m, n=n, bytes=low_backward_bytes(dy, lora_B))
    step_r = block_r(ranks, use.pop("longest_r"))
    blocks, tiles_r = triton.cdiv(m, use["BLOCK_M"]), max(1, triton.cdiv(ranks, step_r))
    splits, chunk = split(n, use["BLOCK_N"], blocks * tiles_r, target, use.pop("per_multiprocessor"))
    shapes = ((splits, m, ranks), (blocks, n, ranks), (blocks, n, 1))
    parts = [dy.new_empty(s, dtype=torch.float32) if want else None for s, want in zip(shapes, wanted, strict=True)]
    launch(
        low_backward_kernel, (blocks, splits, tiles_r),
        dy, lora_B, low, task, *parts, m, n, ranks, max(rank, 1), chunk, scale,
        *dy.stride(), *((0, 0, 0) if route is None else lora_B.stride()), task_m, one_task,
        NEEDS_LOW=wanted[0], NEEDS_B=wanted[1], NEEDS_BIAS=wanted[2],
        **_dot_flags(dy.dtype if lora_B is None else lora_B.dtype, target), BLOCK_R=step_r, **use,
    )  # fmt: skip
    return _summed(parts, lora_B, bias, rank)


def _summed(
    parts: list[Tensor | None], lora_B: Tensor | None, bias: Tensor | None, rank: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dlow = dB = dbias = None
    if parts[0] is not None:
        dlow = parts[0][0]
        if parts[0].shape[0] > 1:
            dlow = torch.empty_like(dlow)
            _sum(parts[0], dlow, rank, dlow.shape[1], rank, 1)
    if parts[1] is not None:
        dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        _sum(parts[1], dB, rank, rank, lora_B.shape[1] * rank, 1)
    if parts[2] is not None:
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        _sum(parts[2], dbias, 1, 1, 0, 0)
    return dlow, dB, dbias


def _sum(parts: Tensor, out: Tensor, rank: int, out_m: int, out_task: int, out_rank: int) -> None:
    """out = the sum of parts (s, m, tasks r) over s; the strides say where (m, task, r) lies in ``out``."""
    count, m, ranks = parts.shape
    use = settings("lora_linear", "sum", target_of(parts))
    launch(
        sum_kernel, (triton.cdiv(m * ranks, use["BLOCK"]),),
        parts, out, count, m, ranks, max(rank, 1), out_m, out_task, out_rank, **use,
    )  # fmt: skip


# ---- launch arguments ----


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def _route(route: Route | None) -> tuple[Tensor | None, int, int]:
    """task, one_task and task's stride."""
    return (None, -1, 0) if route is None else (*route, _stride(route.task))


def _dropout_flags(dropout: Dropout | None, m: int, n: int) -> dict[str, bool]:
    return {"DROPOUT": dropout is not None, "BIG": dropout is not None and m * n > 2**32}


def _dot_flags(stored: torch.dtype, target: Target) -> dict[str, bool | str]:
    """How float32 operands are multiplied: in bfloat16 parts (which the interpreter cannot multiply) for a result
    ``stored`` in 16 bits, else as PRECISION says."""
    split = stored is not torch.float32 and target.arch != "interpreter"
    return {"SPLIT": split, "PRECISION": "ieee" if target.arch.startswith("gfx") else "tf32x3"}
