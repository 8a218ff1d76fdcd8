"""Tiles of the scan's backward in Triton, and their matrix products with as many digits as the result keeps.

A tile is exact where it came from memory and derived where it was computed. With NARROW (x, B, C, dy all bfloat16, no
gate) exact tiles stay bfloat16 and every product runs on the 16-bit matrix units:
    exact by exact     one product, without error
    exact by derived   three products where float32 results depend on it: float32's 24 digits as three bfloat16
    rounded            one product of the derived tile rounded to bfloat16, where the result is stored in 16 bits
Otherwise all tiles are float32 and the products have PRECISION's digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(at, row, row_stride, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, valid, NARROW: tl.constexpr):
    """The tile at[row, column]; zero where ``valid`` (of rows) is not and past the last column."""
    inside = valid[:, None]
    if COLUMNS % BLOCK != 0:
        inside = inside & (column < COLUMNS)[None, :]
    tile = tl.load(at + (row[:, None] * row_stride + column[None, :]), mask=inside, other=0.0)
    return tile if NARROW else tile.to(tl.float32)


@triton.jit
def load_state(at, column, state, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of a state (P, N)."""
    at += column[:, None] * N + state[None, :]
    if P % BLOCK_P == 0 and N % BLOCK_N == 0:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(column < P)[:, None] & (state < N)[None, :], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, both exact, or both derived and float32."""
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def upper_half(v):
    """The upper half of float32's bits: as float32, and as bfloat16."""
    bits = v.to(tl.int32, bitcast=True)
    return (bits & -65536).to(tl.float32, bitcast=True), (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def product_exact_derived(a, b, total, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, ``b`` derived: its 24 digits in three bfloat16, eight digits each."""
    if NARROW:
        upper, part = upper_half(b)
        total = tl.dot(a, part, total)
        b -= upper
        upper, part = upper_half(b)
        total = tl.dot(a, part, total)
        total = tl.dot(a, upper_half(b - upper)[1], total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def product_derived_exact(a, b, total, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, ``a`` derived."""
    if NARROW:
        upper, part = upper_half(a)
        total = tl.dot(part, b, total)
        a -= upper
        upper, part = upper_half(a)
        total = tl.dot(part, b, total)
        total = tl.dot(upper_half(a - upper)[1], b, total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def load_gradient(
    dy, z, row, dy_stride, z_stride, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, valid,
    NARROW: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """The gradient of y before its gate, a tile."""
    if HAS_DY:
        tile = load_tile(dy, row, dy_stride, column, COLUMNS, BLOCK, valid, NARROW)
        if HAS_Z:
            gate = load_tile(z, row, z_stride, column, COLUMNS, BLOCK, valid, NARROW)
            tile *= gate * tl.sigmoid(gate)
    else:
        tile = tl.zeros((row.shape[0], BLOCK), tl.bfloat16 if NARROW else tl.float32)
    return tile
