"""What the LoRA linear layer's Triton kernels load, store and multiply, against what nobody can do without.

Of a product's FLOPs those of one product of whole tiles are counted, whatever parts its operands are multiplied in.
Without ``task`` all rows have one, which is a number of the launch; without ``lora_A`` they are the base alone.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target, settings
from .tiles import FEW_ROWS, block_r, few_rows_settings, fused, low_backward_bytes, pairs, product_bytes, split

LOW = 4  # bytes of an element of low, dlow and of parts


def forward_floor(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None, task: Tensor | None,
    weight_scale: Tensor | None = None, **_: object,
) -> Cost:  # fmt: skip
    """Each input once, each output once; of the adapters' products each row's own."""
    (m, k), n = x.shape, weight.shape[0]
    rank = 0 if lora_A is None else lora_A.shape[1]
    loaded = nbytes(x, weight, weight_scale, lora_A, lora_B, bias) + (0 if task is None else 4 * m)
    return Cost(loaded, m * n * x.element_size(), 2 * m * n * k + 2 * m * rank * (k + n))


def backward_floor(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None, task: Tensor | None,
    weight_scale: Tensor | None = None, **_: object,
) -> Cost:  # fmt: skip
    """The same for the gradients of everything; int8 weights have none."""
    (m, k), n = x.shape, weight.shape[0]
    rank = 0 if lora_A is None else lora_A.shape[1]
    loaded = nbytes(x, weight, weight_scale, lora_A, lora_B) + m * n * x.element_size() + (0 if task is None else 4 * m)
    learned, products = (weight, 2) if weight_scale is None else (None, 1)
    flops = 2 * products * m * n * k + 6 * m * rank * (k + n)
    return Cost(loaded, nbytes(x, learned, lora_A, lora_B, bias), flops)


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None, task: Tensor | None,
    weight_scale: Tensor | None = None, *, target: Target, save: bool = False, dropout_p: float = 0.0, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    found: dict[str, Cost] = defaultdict(Cost)
    in_passing = lora_A is not None and fused(x, lora_A, dropout_p)
    low = None
    if lora_A is not None and not in_passing:
        ranks = lora_A.shape[0] * lora_A.shape[1]
        low = x.new_empty(x.shape[0], ranks, dtype=torch.float32, device="meta")
        parts = _narrow(found, x, lora_A.permute(2, 0, 1), task is not None, target)
        if parts > 1:
            _sum(found, parts, x.shape[0] * ranks, LOW)
    if x.shape[0] <= FEW_ROWS:
        _few_rows(found, x, weight, weight_scale, lora_A, lora_B, bias, task, in_passing, save, target)
    else:
        weight = _dense(found, x, weight, weight_scale)
        _matmul(found, x, weight.T, x, bias, low, None if low is None else lora_B.transpose(1, 2), target)
    return dict(found)


def backward(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None, task: Tensor | None,
    weight_scale: Tensor | None = None, *, target: Target, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """The gradients of everything; int8 weights have none."""
    found: dict[str, Cost] = defaultdict(Cost)
    dy = x.new_empty(x.shape[0], weight.shape[0], device="meta")
    low = None
    if lora_A is not None:
        ranks = lora_A.shape[0] * lora_A.shape[1]
        low = x.new_empty(x.shape[0], ranks, dtype=torch.float32, device="meta")
    if lora_A is not None or bias is not None:
        _low_backward(found, dy, lora_B, bias, task is not None, target)
    _matmul(found, dy, _dense(found, dy, weight, weight_scale), x, None, low, lora_A, target)
    if weight_scale is None:
        _matmul(found, dy.T, x, weight, None, None, None, target)
    if lora_A is not None:
        parts = _narrow(found, x.T, low.unflatten(1, lora_A.shape[:2]), False, target)
        _sum(found, parts, lora_A.numel(), lora_A.element_size())
    return dict(found)


def _dense(found, x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The weights, or what int8 ones become in x's type."""
    if weight_scale is None:
        return weight
    dense = weight.new_empty(weight.shape, dtype=x.dtype, device="meta")
    found["dequantize_kernel"] += Cost(nbytes(weight, weight_scale), nbytes(dense))
    return dense


def _few_rows(
    found, x, weight, weight_scale, lora_A, lora_B, bias, task, in_passing: bool, save: bool, target: Target
) -> None:
    (m, k), n = x.shape, weight.shape[0]
    ranks = 0 if lora_A is None else lora_A.shape[0] * lora_A.shape[1]
    use = few_rows_settings(x, weight, ranks if in_passing else 0, target)
    block_m, block_n = use["BLOCK_M"], use["BLOCK_N"]
    tiles, depth, step_r = blocks(n, block_n), blocks(k, use["BLOCK_K"]) * use["BLOCK_K"], block_r(ranks)
    loaded = tiles * nbytes(x) + nbytes(weight, bias)
    if weight_scale is not None:
        loaded += blocks(k, use["BLOCK_K"]) * n * weight_scale.element_size()
    stored = m * n * x.element_size()
    flops = 2 * tiles * block_m * block_n * depth
    if lora_A is not None:
        ids = 0 if task is None else 4 * m
        loaded += nbytes(lora_B) + tiles * (nbytes(lora_A) + ids if in_passing else m * ranks * LOW)
        stored += m * ranks * LOW if in_passing and save else 0
        flops += 2 * tiles * block_m * step_r * (depth if in_passing else 0)
        flops += 2 * tiles * block_m * block_n * blocks(ranks, step_r) * step_r
    found["few_rows_kernel"] += Cost(loaded, stored, flops)


def _matmul(found, a: Tensor, b: Tensor, like: Tensor, bias, low, up, target: Target) -> None:
    """Strips of a once for each column of tiles, strips of b once for each row of them: from L2 for the most part."""
    (m, k), n = a.shape, b.shape[1]
    ranks = 0 if low is None else low.shape[1]
    each = pairs(low, up, like.dtype, target)
    depth = 0 if low is None else block_r(ranks) * each
    use = settings("lora_linear", "matmul", target, m=m, n=n, k=k, bytes=product_bytes(a, b), depth=depth)
    tiles_m, tiles_n = blocks(m, use["BLOCK_M"]), blocks(n, use["BLOCK_N"])
    step_r = block_r(ranks, use["longest_r"])
    steps = blocks(k, use["BLOCK_K"]) * use["BLOCK_K"]
    steps += 0 if low is None else max(blocks(ranks, step_r), 1) * step_r * each
    loaded = tiles_n * (nbytes(a) + each * nbytes(low)) + tiles_m * (
        nbytes(b, bias) + (each * nbytes(up) if ranks else 0)
    )
    flops = 2 * tiles_m * use["BLOCK_M"] * tiles_n * use["BLOCK_N"] * steps
    found["matmul_kernel"] += Cost(loaded, m * n * like.element_size(), flops)


def _narrow(found, a: Tensor, b: Tensor, by_row: bool, target: Target) -> int:
    """b (k, tasks, r), ``by_row``: the tasks are read; how many parts there are."""
    (m, k), ranks = a.shape, b.shape[1] * b.shape[2]
    use = settings("lora_linear", "narrow", target, m=m, k=k, bytes=product_bytes(a, b))
    step_r = block_r(ranks, use["longest_r"])
    tiles_m, tiles_r = blocks(m, use["BLOCK_M"]), blocks(ranks, step_r)
    parts, chunk = split(k, use["BLOCK_K"], tiles_m * tiles_r, target, use["per_multiprocessor"])
    loaded = tiles_r * nbytes(a) + tiles_m * nbytes(b) + (4 * m * tiles_r * parts if by_row else 0)
    flops = 2 * tiles_m * use["BLOCK_M"] * parts * chunk * tiles_r * step_r
    found["narrow_kernel"] += Cost(loaded, parts * m * ranks * LOW, flops)
    return parts


def _low_backward(found, dy: Tensor, lora_B: Tensor | None, bias: Tensor | None, by_row: bool, target: Target) -> None:
    m, n = dy.shape
    ranks = 0 if lora_B is None else lora_B.shape[0] * lora_B.shape[2]
    use = settings("lora_linear", "low_backward", target, m=m, n=n, bytes=low_backward_bytes(dy, lora_B))
    step_r = block_r(ranks, use["longest_r"])
    tiles_m, tiles_r = blocks(m, use["BLOCK_M"]), max(1, blocks(ranks, step_r))
    parts, chunk = split(n, use["BLOCK_N"], tiles_m * tiles_r, target, use["per_multiprocessor"])
    loaded, stored, flops = tiles_r * nbytes(dy), 0, 0
    if lora_B is not None:
        loaded += tiles_m * nbytes(lora_B) + parts * m * (ranks * LOW + (4 * tiles_r if by_row else 0))
        stored += (parts * m + tiles_m * n) * ranks * LOW
        flops = 2 * 2 * tiles_m * use["BLOCK_M"] * parts * chunk * tiles_r * step_r
        if parts > 1:
            _sum(found, parts, m * ranks, LOW)
        _sum(found, tiles_m, n * ranks, lora_B.element_size())
    if bias is not None:
        stored += tiles_m * n * LOW
        _sum(found, tiles_m, n, bias.element_size())
    found["low_backward_kernel"] += Cost(loaded, stored, flops)


def _sum(found, parts: int, size: int, element: int) -> None:
    found["sum_kernel"] += Cost(parts * size * LOW, size * element)
