"""Definition of the task-routed LoRA linear layer, for each row i with task t:

    y_i = W x_i + bias + scale B_t A_t (m_i * x_i)        the LoRA term is absent where t = -1

m is the dropout mask over the LoRA input: keep(i, j) / (1 - dropout_p), a pure function of the seed and the position,
so that a backward computes it again. int8 weights stand for weight_scale times them (int8.py). Source: LoRA (arXiv
2106.09685), section 4; OmniMamba (arXiv 2503.08686) routes it by task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8 import dequantize_int8
from .routing import tasks_of_rows


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) whose output bits all depend on all input bits."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def dropout_mask(rows: int, width: int, dropout_p: float, seed: int, device: torch.device) -> Tensor:
    """(rows, width) booleans: kept where hash(seed, i * width + j) >= dropout_p 2^32."""
    counter = torch.arange(rows * width, device=device, dtype=torch.int64)
    key = _mix((counter >> 32) ^ _mix(torch.tensor(seed & 0xFFFFFFFF, device=device)))
    return (_mix((counter & 0xFFFFFFFF) ^ key) >= int(dropout_p * 2**32)).view(rows, width)


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
    """x (rows, in); without lora_A and lora_B the base alone."""
    task = tasks_of_rows(x, lora_A, task, one_task)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute)
    weight = weight.to(compute) if weight_scale is None else dequantize_int8(weight, weight_scale, compute)
    y = u @ weight.T
    if bias is not None:
        y = y + bias.to(compute)
    if task is not None:
        if dropout_p:
            u = u * dropout_mask(*x.shape, dropout_p, dropout_seed, x.device) / (1 - dropout_p)
        tasks, r, _ = lora_A.shape
        routed = task[:, None] == torch.arange(tasks, device=x.device).repeat_interleave(r)
        low = (u @ lora_A.to(compute).flatten(0, 1).T) * routed
        y = y + scale * low @ lora_B.to(compute).transpose(1, 2).flatten(0, 1)
    return (y.to(x.dtype),), ()
