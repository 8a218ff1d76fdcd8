"""The narrow products of the LoRA linear layer, whose result has one column for each rank of each adapter.

Maths    low = u A^T and dA^T = u^T dlow                       (narrow_kernel; u = x with dropout)
         dlow = dy B,  dB = dy^T low,  dbias = dy^T 1           (low_backward_kernel)
         low and dlow times scale in the columns of the row's own task, 0 in the others.
Shapes   u (M, K), dy (M, N), A (tasks, rank, K), B (tasks, N, rank), any strides and any float type each;
         low, dlow (M, ranks) float32 contiguous, ranks = tasks rank.
Plan     both are bound by the one pass over u or dy. narrow_kernel splits K into parts where rows alone make too few
         programs. low_backward_kernel splits N, and the tile of dy that dlow needs gives its share of dB and dbias too.
         Parts are float32 and sum_kernel adds them in their order: the same bits in every run.
Traffic  u or dy once. Parts are written and read: 8 ranks bytes for each part of a row of low, dlow or dA, and for each
         BLOCK_M rows of dy and each column (dB): at ranks 16, BLOCK_M 256, 16-bit dy a quarter of dy's own bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import kept, multiply, routed


@triton.jit(do_not_specialize=["one_task", "seed", "threshold"])
def narrow_kernel(
    a, b, task, parts, M, K, ranks, rank, chunk, scale, a_m, a_k, b_k, b_task, b_rank, task_m, one_task, width,
    seed, threshold, keep,
    ROUTE: tl.constexpr, DROPOUT: tl.constexpr, TRANSPOSED: tl.constexpr, BIG: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[s] (M, ranks) = a[:, chunk s] b[chunk s]. Dropout is on a, which is x or, TRANSPOSED, x^T."""
    split = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    row_in, r_in = row[:, None] < M, r[None, :] < ranks
    b_row = b + (r // rank * b_task + r % rank * b_rank)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, chunk, BLOCK_K):
        k = split * chunk + start + depth
        left = tl.load(a + row[:, None] * a_m + k[None, :] * a_k, mask=row_in & (k[None, :] < K), other=0.0)
        right = tl.load(b_row + k[:, None] * b_k, mask=(k[:, None] < K) & r_in, other=0.0)
        if DROPOUT:
            if TRANSPOSED:
                keeps = kept(k[None, :], row[:, None], width, seed, threshold, BIG)
            else:
                keeps = kept(row[:, None], k[None, :], width, seed, threshold, BIG)
            left = tl.where(keeps, left, tl.zeros_like(left))
        acc = multiply(left, right, acc, SPLIT, PRECISION)
    if DROPOUT:
        acc /= keep
    if ROUTE:
        acc = routed(acc, task, task_m, one_task, row, M, r, rank, scale)
    tl.store(parts + (split * M + row)[:, None] * ranks + r[None, :], acc, mask=row_in & r_in)


@triton.jit(do_not_specialize=["one_task"])
def low_backward_kernel(
    dy, lora_B, low, task, parts_low, parts_B, parts_bias, M, N, ranks, rank, chunk, scale,
    dy_m, dy_n, B_task, B_n, B_rank, task_m, one_task,
    NEEDS_LOW: tl.constexpr, NEEDS_B: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in, r_in = row[:, None] < M, r[None, :] < ranks
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if NEEDS_B:
        right_low = tl.load(low + row[:, None] * ranks + r[None, :], mask=row_in & r_in, other=0.0)
    for start in range(0, chunk, BLOCK_N):
        col = split * chunk + start + tl.arange(0, BLOCK_N)
        tile = tl.load(dy + row[:, None] * dy_m + col[None, :] * dy_n, mask=row_in & (col[None, :] < N), other=0.0)
        if NEEDS_LOW:
            at = lora_B + (r // rank * B_task + r % rank * B_rank)[None, :] + col[:, None] * B_n
            acc = multiply(tile, tl.load(at, mask=(col[:, None] < N) & r_in, other=0.0), acc, False, PRECISION)
        if NEEDS_B:
            dB = multiply(tl.trans(tile), right_low, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), SPLIT, PRECISION)
            at = parts_B + (block * N + col)[:, None] * ranks + r[None, :]
            tl.store(at, dB, mask=(col[:, None] < N) & r_in)
        if NEEDS_BIAS:
            tl.store(
                parts_bias + block * N + col, tl.sum(tile.to(tl.float32), 0), mask=(col < N) & (tl.program_id(2) == 0)
            )
    if NEEDS_LOW:
        acc = routed(acc, task, task_m, one_task, row, M, r, rank, scale)
        tl.store(parts_low + (split * M + row)[:, None] * ranks + r[None, :], acc, mask=row_in & r_in)


@triton.jit
def sum_kernel(
    parts, out, count, M, ranks, rank, out_m, out_task, out_rank, BLOCK: tl.constexpr
):  # fmt: skip
    """out[m, r] = sum over s of parts[s, m, r], with r as (task, rank) in out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(M, tl.int64) * ranks
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        acc += tl.load(parts + part * size + i, mask=i < size, other=0.0)
    m, r = i // ranks, i % ranks
    at = out + m * out_m + r // rank * out_task + r % rank * out_rank
    tl.store(at, acc.to(out.dtype.element_ty), mask=i < size)
