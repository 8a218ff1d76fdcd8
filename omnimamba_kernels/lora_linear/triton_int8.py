"""int8 weights made dense, for the LoRA linear layer's products of many rows.

Maths    dense[n, k] = weight_scale[n, k / GROUP] weight[n, k]
Shapes   weight (N, K) int8, weight_scale (N, K / GROUP rounded up), any strides; dense (N, K) contiguous, of x's type.
Plan     a program takes one group of BLOCK_N rows, so that it reads each scale once.
Traffic  N K bytes read, 2 or 4 times as many written. A product of many rows is bound by arithmetic, beside which that
         is little; and its tiles come straight from memory to the matrix units, as those of dense weights do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    weight, weight_scale, dense, N, K, weight_n, weight_k, scale_n, scale_group,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(K, GROUP)
    group = (tl.program_id(0) % groups).to(tl.int64)
    row = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = group * GROUP + tl.arange(0, GROUP)
    inside = (row[:, None] < N) & (k[None, :] < K)
    each = tl.load(weight_scale + row * scale_n + group * scale_group, mask=row < N, other=0.0).to(tl.float32)
    values = tl.load(weight + row[:, None] * weight_n + k[None, :] * weight_k, mask=inside, other=0)
    values = values.to(tl.float32) * each[:, None]
    tl.store(dense + row[:, None] * K + k[None, :], values.to(dense.dtype.element_ty), mask=inside)
