"""The wide matrix products of the LoRA linear layer: y = x W^T, dx = dy W, dW = dy^T x.

Maths    c[m, n] = sum_k a[m, k] b[k, n] + bias[n] + sum_r low[m, r] up[r, n]
         In x's gradient dropout masks the last term: keep[m, n] / (1 - p) sum_r.
Shapes   a (M, K), b (K, N), up (ranks, N) as (tasks, rank, N), any strides and any float type each;
         low (M, ranks) float32 contiguous; bias (N,); c (M, N) contiguous.
Plan     a program owns one tile of c. Its accumulator starts from low up, one step of K for two adapters of rank 8, and
         then walks along K. Tiles run down GROUP_M rows of tiles before the next column of them, so that the programs
         alive together share strips of a and b in the L2 cache.
Traffic  a and b once from memory while the strips of one such group stay in L2; c once. low and up are 4 M ranks and
         2 N ranks bytes: below 1 % of the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import kept, multiply


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's place among the tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid, in_group = tl.program_id(0).to(tl.int64), GROUP_M * tiles_n
    first = pid // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def _part(t, second):
    """t in bfloat16, rounded; and where ``second``, what the rounding took away."""
    high = t.to(tl.bfloat16)
    return tl.where(second, (t.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), high)


@triton.jit
def _add_low(
    acc, low, up, row, col, M, N, start, ranks, rank, up_task, up_rank, up_n,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + low up over BLOCK_R ranks. With SPLIT as one bfloat16 product along whose depth the pairs of parts of low
    and up lie side by side: two pairs where up is bfloat16 already, else four."""
    UP_IS_ONE: tl.constexpr = up.dtype.element_ty == tl.bfloat16
    PAIRS: tl.constexpr = (2 if UP_IS_ONE else 4) if SPLIT else 1
    lane = tl.arange(0, PAIRS * BLOCK_R)
    r = (start + lane % BLOCK_R).to(tl.int64)
    left = tl.load(low + row[:, None] * ranks + r[None, :], mask=(row[:, None] < M) & (r[None, :] < ranks), other=0.0)
    up_row = up + r // rank * up_task + r % rank * up_rank
    in_up = (r[:, None] < ranks) & (col[None, :] < N)
    right = tl.load(up_row[:, None] + col[None, :] * up_n, mask=in_up, other=0.0)
    if SPLIT:
        left = _part(left, lane[None, :] // BLOCK_R % 2 == 1)
        if not UP_IS_ONE:
            right = _part(right, lane[:, None] // BLOCK_R >= 2)
    return multiply(left, right, acc, False, PRECISION)


@triton.jit(do_not_specialize=["seed", "threshold"])
def matmul_kernel(
    a, b, c, bias, low, up, M, N, K, ranks, rank, a_m, a_k, b_k, b_n, bias_n, up_task, up_rank, up_n,
    seed, threshold, keep,
    HAS_BIAS: tl.constexpr, HAS_LOW: tl.constexpr, MORE_RANKS: tl.constexpr, DROPOUT: tl.constexpr, BIG: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    row_in, col_in = row[:, None] < M, col[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if HAS_LOW:
        acc = _add_low(acc, low, up, row, col, M, N, 0, ranks, rank, up_task, up_rank, up_n, SPLIT, PRECISION, BLOCK_R)
        if MORE_RANKS:
            for start in tl.range(BLOCK_R, ranks, BLOCK_R, num_stages=1):
                acc = _add_low(
                    acc, low, up, row, col, M, N, start, ranks, rank, up_task, up_rank, up_n, SPLIT, PRECISION, BLOCK_R
                )
        if DROPOUT:
            acc = tl.where(kept(row[:, None], col[None, :], N, seed, threshold, BIG), acc / keep, 0.0)

    a_tile = a + row[:, None] * a_m + depth[None, :] * a_k
    b_tile = b + depth[:, None] * b_k + col[None, :] * b_n
    for start in range(0, K, BLOCK_K):
        left = tl.load(a_tile, mask=row_in & (depth[None, :] < K - start), other=0.0)
        right = tl.load(b_tile, mask=(depth[:, None] < K - start) & col_in, other=0.0)
        acc = multiply(left, right, acc, SPLIT, PRECISION)
        a_tile += BLOCK_K * tl.cast(a_k, tl.int64)
        b_tile += BLOCK_K * tl.cast(b_k, tl.int64)

    if HAS_BIAS:
        acc += tl.load(bias + col * bias_n, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(c + row[:, None] * N + col[None, :], acc.to(c.dtype.element_ty), mask=row_in & col_in)
