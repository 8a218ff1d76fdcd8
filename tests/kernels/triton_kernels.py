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
