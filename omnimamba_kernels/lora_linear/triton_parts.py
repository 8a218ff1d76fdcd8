"""What the LoRA linear layer's Triton kernels share: products of mixed types, routing by task, the dropout mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b in float32. Two operands of one 16-bit type go to the matrix units as they are. With SPLIT a float32
    operand beside a bfloat16 one goes as two bfloat16 parts: 16 bits of it, enough for results that become bfloat16."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif SPLIT and a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), b, acc)
    elif SPLIT and b.dtype == tl.float32 and a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        acc = tl.dot(a, high, acc)
        acc = tl.dot(a, (b - high.to(tl.float32)).to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def routed(low, task, task_m, one_task, row, M, r, rank, scale):
    """low (rows, ranks) times ``scale`` in the columns of each row's own task, 0 in the others. Where ``task`` is None
    ``one_task`` is that of all rows."""
    if task is None:
        own = (r // rank == one_task)[None, :]
    else:
        own = tl.load(task + row * task_m, mask=row < M, other=-1)[:, None] == (r // rank)[None, :]
    return tl.where(own, low * scale, 0.0)


@triton.jit
def _mix(h):
    """A bijection of 32-bit integers whose output bits all depend on all input bits."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def kept(row, column, width, seed, threshold, BIG: tl.constexpr):
    """Whether dropout keeps x[row, column], as in reference.py. BIG: some position may need more than 32 bits."""
    position = row * width + column
    key = _mix(tl.cast(seed, tl.uint32))
    if BIG:
        key = _mix((position >> 32).to(tl.uint32) ^ key)
    else:
        key = _mix(key)
    return _mix(position.to(tl.uint32) ^ key) >= tl.cast(threshold, tl.uint32)
