"""The LoRA linear layer for few rows (decode): one launch, the weights read once.

Maths    low[m, r] = scale sum_k A[r, k] x[m, k] in the columns of row m's task, else 0
         y[m, n] = sum_k W[n, k] x[m, k] + bias[n] + sum_r low[m, r] B[r, n]
Shapes   x (M, K), weight (N, K), lora_A (tasks, rank, K), lora_B (tasks, N, rank), any strides and any float type each;
         y (M, N) contiguous; M <= BLOCK_M, ranks = tasks rank. Or weight int8 with weight_scale (N, K / GROUP rounded
         up), any strides: W[n, k] = weight_scale[n, k / GROUP] weight[n, k].
Plan     a program owns BLOCK_N columns of y for all rows and walks along K once, with a few stages of the weight strip
         on their way. In passing it computes low for itself (FUSED): A's ranks are few and every program finds them in
         L2, which costs less than a launch of their own and a wait for it. Strips are narrow enough for a program on
         every multiprocessor, so K need not be split. Many ranks, or dropout: low is computed before and read.
         A step never leaves a group of int8 weights: they are multiplied in x's type, which holds them exactly, and the
         step's sum is scaled. No weight is rounded, and scaling costs BLOCK_M / BLOCK_K of a multiplication a weight.
Traffic  N K weights once from memory, int8 ones with 2 bytes more for each GROUP; (M + ranks) K elements a program
         from L2.
The bits of a row depend on no other row: M only decides which rows of a tile are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import multiply, routed


@triton.jit(do_not_specialize=["one_task"])
def few_rows_kernel(
    x, weight, weight_scale, lora_A, lora_B, bias, task, low, y, M, N, K, ranks, rank, scale,
    x_m, x_k, weight_n, weight_k, scale_n, scale_group, A_task, A_rank, A_k, B_task, B_n, B_rank, bias_n,
    task_m, one_task,
    HAS_BIAS: tl.constexpr, HAS_LOW: tl.constexpr, FUSED: tl.constexpr, SAVE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    row_in, col_in = row[:, None] < M, col[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    for start in range(0, K, BLOCK_K):
        k = start + depth
        left = tl.load(x + row[:, None] * x_m + k[None, :] * x_k, mask=row_in & (k[None, :] < K), other=0.0)
        at = weight + k[:, None] * weight_k + col[None, :] * weight_n
        right = tl.load(at, mask=(k[:, None] < K) & col_in, other=0)
        if weight_scale is None:
            acc = multiply(left, right, acc, SPLIT, PRECISION)
        else:
            tl.static_assert(GROUP % BLOCK_K == 0)
            at = weight_scale + col * scale_n + start // GROUP * tl.cast(scale_group, tl.int64)
            each = tl.load(at, mask=col < N, other=0.0).to(tl.float32)
            group = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc += multiply(left, right.to(left.dtype), group, SPLIT, PRECISION) * each[None, :]
        if FUSED:
            at = lora_A + (r // rank * A_task + r % rank * A_rank)[None, :] + k[:, None] * A_k
            right = tl.load(at, mask=(k[:, None] < K) & (r[None, :] < ranks), other=0.0)
            down = multiply(left, right, down, False, PRECISION)

    if FUSED:
        down = routed(down, task, task_m, one_task, row, M, r, rank, scale)
        if SAVE:
            first = (tl.program_id(0) == 0) & row_in & (r[None, :] < ranks)
            tl.store(low + row[:, None] * ranks + r[None, :], down, mask=first)
    if HAS_LOW:
        for start in tl.range(0, ranks, BLOCK_R, num_stages=1):
            j = start + r
            if not FUSED:
                down = tl.load(low + row[:, None] * ranks + j[None, :], mask=row_in & (j[None, :] < ranks), other=0.0)
            at = lora_B + (j // rank * B_task + j % rank * B_rank)[:, None] + col[None, :] * B_n
            right = tl.load(at, mask=(j[:, None] < ranks) & col_in, other=0.0)
            acc = multiply(down, right, acc, SPLIT, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + col * bias_n, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * N + col[None, :], acc.to(y.dtype.element_ty), mask=row_in & col_in)
