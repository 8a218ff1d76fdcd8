"""Public function of the task-routed LoRA linear layer."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from .. import autograd, checks
from ..backends import choose
from ..compile import traceable
from .int8 import GROUP


def _fake(x: Tensor, weight: Tensor, *_: object) -> list[Tensor]:
    return [torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)]


@traceable(_fake)
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    task: Tensor | None,
    weight_scale: Tensor | None,
    one_task: int,
    scale: float,
    dropout_p: float,
    dropout_seed: int,
    backend: str | None,
) -> Tensor:
    if task is not None:
        checks.in_range("task", task, -1, lora_A.shape[0])
    tensors = (x, weight, lora_A, lora_B, bias, task, weight_scale)
    options = {"one_task": one_task, "scale": scale, "dropout_p": dropout_p, "dropout_seed": dropout_seed}
    return autograd.run(choose("lora_linear", backend, *tensors, **options), *tensors, **options)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scale: float = 1.0,
    task: int | Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    weight_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer plus the low-rank adapter of each row's task.

    ``y = W x + bias + scale B[task] A[task] dropout(x)``

    Args:
        x: (..., in), any strides.
        weight: (out, in). Its dtype may be narrower than x's (bfloat16 weights under float32 activations): it is read
            once and multiplied in float32.
        lora_A: (tasks, r, in). lora_B: (tasks, out, r). Both None: the base layer alone.
        scale: lora_alpha / r.
        task: the adapter of all rows, or an integer tensor of x's leading shape; -1 is the base alone. None: adapter 0
            where there is only one, the base where there is none.
        bias: (out,).
        dropout_p: dropout on the adapter's input, in [0, 1).
        dropout_seed: its seed; required with dropout. The mask is a pure function of seed and position. A CUDA graph
            keeps the seed of its capture: every replay drops the same.
        weight_scale: (out, in / 64 rounded up), of int8 weights: one scale for every 64 neighbours of a row. Scales of
            whole rows (out, 1) fit as ``weight_scale.expand(-1, groups)``. With up to 48 rows of x, a CPU that has
            AVX-512 VNNI takes each activation within 2^-30 of the largest of the 64 that share a scale (exactly, where
            it is above 2^-6 of that); everything else is float32, as elsewhere. On a GPU up to 64 rows of x meet the
            int8 values themselves; for more, and for x's gradient, the weights that they stand for are rounded to x's
            dtype, in memory of their own.
        backend: one of ``backends()``; None chooses.

    Returns:
        y (..., out) in x's dtype. Gradients reach x, weight, lora_A, lora_B and bias; not int8 weights or
        their scales.

    Raises:
        ValueError: a shape, task or probability does not fit. TypeError: a dtype does not. RuntimeError: the backend
            cannot run.

    Source: LoRA (arXiv 2106.09685), section 4; routing by task as in OmniMamba (arXiv 2503.08686).
    """
    _check(x, weight, lora_A, lora_B, bias, weight_scale)
    tasks = 0 if lora_A is None else lora_A.shape[0]
    scale, dropout_p = checks.number("scale", scale), checks.number("dropout_p", dropout_p, 0.0)
    if dropout_p >= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if dropout_p and dropout_seed is None:
        raise ValueError("dropout_seed: got None with dropout_p > 0; pass an integer that the backward can use again")
    rows, one_task = _route(x, task, tasks)
    if rows is None and one_task == -1:
        lora_A = lora_B = None
        dropout_p = 0.0
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    seed = _seed(dropout_seed) if dropout_p else 0
    if weight_scale is not None:
        weight_scale = weight_scale.detach()
    y = _lora_linear(flat, weight, lora_A, lora_B, bias, rows, weight_scale, one_task, scale, dropout_p, seed, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _seed(value: object) -> int:
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"dropout_seed: got {value!r}, expected an integer") from None


@checks.once_a_kind
def _check(x, weight, lora_A, lora_B, bias, weight_scale) -> None:
    checks.is_tensor("x", x)
    checks.rank("weight", weight, 2, letters="(out, in)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {weight.shape[1]}) to fit weight (out, in)")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A, lora_B: got one without the other; pass both, or neither for the base layer alone")
    if lora_A is not None:
        checks.rank("lora_A", lora_A, 3, letters="(tasks, r, in)")
        tasks, r, _ = lora_A.shape
        checks.shape("lora_A", lora_A, tasks, r, weight.shape[1], letters="(tasks, r, in)")
        checks.shape("lora_B", lora_B, tasks, weight.shape[0], r, letters="(tasks, out, r)")
    checks.shape("bias", bias, weight.shape[0], letters="(out,)")
    checks.floating(x=x, lora_A=lora_A, lora_B=lora_B, bias=bias, weight_scale=weight_scale)
    if weight.dtype is not torch.int8:
        checks.floating(weight=weight)
    if (weight.dtype is torch.int8) != (weight_scale is not None):
        raise TypeError(
            f"weight, weight_scale: got weights of {weight.dtype} {'without' if weight_scale is None else 'with'} "
            "scales; int8 weights need them and no others do (quantize_int8 makes both)"
        )
    groups = -(-weight.shape[1] // GROUP)
    checks.shape("weight_scale", weight_scale, weight.shape[0], groups, letters=f"(out, in / {GROUP} rounded up)")
    checks.same_device(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, weight_scale=weight_scale)


def _route(x: Tensor, task: int | Tensor | None, tasks: int) -> tuple[Tensor | None, int]:
    """The task of each row, or None and that of all rows."""
    if task is None:
        if tasks > 1:
            raise ValueError(
                f"task: got None with {tasks} adapters; pass the task of all rows, a tensor of tasks, or -1"
            )
        task = 0 if tasks else -1
    if isinstance(task, Tensor):
        checks.dense(task=task)
        checks.integer(task=task)
        checks.shape("task", task, *x.shape[:-1], letters="x's leading shape")
        checks.same_device(x=x, task=task)
        if tasks:
            return task.reshape(-1), -1
        if not torch.compiler.is_compiling():
            checks.in_range("task", task, -1, 0)
        return None, -1
    if isinstance(task, bool) or not isinstance(task, int):
        raise TypeError(f"task: got {task!r}, expected an integer or an integer tensor of x's leading shape")
    if not -1 <= task < tasks:
        raise ValueError(f"task: got {task}, expected -1 (the base alone) to {tasks - 1}")
    return None, task
