"""Small kernels for the tests of their start."""

import triton
import triton.language as tl


@triton.jit
def double(x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(x + i) * 2)


@triton.jit
def square(x, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(x + i, value * value)


@triton.jit
def double_first(x, N: tl.constexpr):
    """Doubles the first program's numbers."""
    i = tl.arange(0, N)
    inside = (i < N) & (tl.program_id(0) == 0)
    tl.store(x + i, tl.load(x + i, mask=inside, other=0.0) * 2, mask=inside)


@triton.jit(do_not_specialize=["n"])
def add_both(x, m, n):
    tl.store(x, tl.load(x) + m + n)


@triton.jit
def near_row(x, rows, stride):
    """A row's address in 32 bits."""
    tl.store(x + tl.program_id(0) % rows * stride, 1.0)


@triton.jit
def far_row(x, rows, stride):
    tl.store(x + (tl.program_id(0) % rows).to(tl.int64) * stride, 1.0)


@triton.jit
def near_loop(x, rows, stride):
    """Rows, one after another: their offset grows in 32 bits."""
    at = tl.program_id(0) * 0
    for _ in range(rows):
        tl.store(x + at, 1.0)
        at += stride


@triton.jit
def far_loop(x, rows, stride):
    for _ in range(rows):
        tl.store(x, 1.0)
        x += stride


@triton.jit
def near_branch(x, rows, stride):
    at = tl.program_id(0).to(tl.int64)
    if at < rows:
        at = (tl.program_id(0) % rows * stride).to(tl.int64)
    tl.store(x + at, 1.0)


@triton.jit
def near_mask(x, rows, stride):
    """A position that wraps passes the comparison with the end."""
    t = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(x + t.to(tl.int64) * stride, 1.0, mask=t < rows)
