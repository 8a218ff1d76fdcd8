"""The LoRA linear layer on a CPU: one kernel for few rows, which reads the weights once, and one for matrix products.

    y_i = W x_i + bias + scale B_t A_t u_i,    u = dropout(x)

Many rows: the adapters are concatenated by rank, S = (u [A_1; A_2; ..]^T) masked by the row's task, then
S [B_1 | B_2 | ..]^T is added to x W^T. All arithmetic is float32, whatever the operands are stored in, and has the same
bits at every thread count; neither is true of torch's own products on a CPU. Matrix registers multiply bfloat16, and
numbers go in as pieces: what is below 2^-126 of a piece is lost. A row's last bits depend on no other row, but on which
way their number chooses: below TILED_ROWS, up to FEW_ROWS, or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .int8 import GROUP
from .routing import tasks_of_rows

# Up to so many rows, one pass over the weights beats unpacking them for a matrix product.
FEW_ROWS = 48
# With matrix registers: from so many rows on, and up to so many tiles of 16 columns, each a piece of a row of x.
TILED_ROWS, FEW_TILES = 3, 4
# Floats for 64 values of x in digits, as kDigitGroupFloats in lora_linear.h.
DIGITS = 80
# The matrix product's blocks, as in matmul.h; the last two are those of matrix registers.
DEPTH, COLUMNS = 256, 128
BLOCK_ROWS, CHUNK = 512, 256
# bf16 numbers that make up one, as kPieces in cpu_pieces.h.
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return native.cannot_store(*tensors)


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
    task = tasks_of_rows(x, lora_A, None if task is None else task.int(), one_task)
    saved = (x, weight, lora_A, lora_B, task, weight_scale) if save else ()
    if x.shape[0] <= _most_few_rows(x, weight) and not dropout_p and x.numel() and weight.numel():
        return (_few_rows(x, weight, weight_scale, lora_A, lora_B, bias, task, scale),), saved
    y = None if bias is None else bias.float().contiguous().expand(x.shape[0], -1)
    if task is not None:
        low = _low(_dropped(x, dropout_p, dropout_seed), lora_A, task, scale)
        y = _matmul(low, _by_rank(lora_B), y)
    return (_matmul(x, _dense(weight, weight_scale).T, y, dtype=x.dtype),), saved


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None],
    needs: tuple[bool, ...],
    *,
    one_task: int,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, task, weight_scale = saved
    dx = dweight = dA = dB = dbias = None
    if grads[0] is None:
        return None, None, None, None, None, None, None
    dy = grads[0]
    if needs[1]:
        dweight = _matmul(dy.T, x, dtype=weight.dtype)
    if needs[4]:
        dbias = _matmul(dy.new_ones(1, dy.shape[0]), dy)[0]
    if task is not None and (needs[0] or needs[2] or needs[3]):
        u = _dropped(x, dropout_p, dropout_seed) if needs[2] or needs[3] else None
        A = lora_A.flatten(0, 1)
        dlow = _matmul(dy, _by_rank(lora_B).T).mul_(_routed(task, lora_A, scale))
        if needs[0]:
            dx = _matmul(dlow, A)
            dx = _drop(dx, dropout_p, dropout_seed) if dropout_p else dx
        if needs[2]:
            dA = _matmul(dlow.T, u, dtype=lora_A.dtype).view(lora_A.shape)
        if needs[3]:
            dB = _matmul(_low(u, lora_A, task, scale).T, dy)
            dB = dB.unflatten(0, lora_A.shape[:2]).transpose(1, 2).to(lora_B.dtype)
    if needs[0]:
        dx = _matmul(dy, _dense(weight, weight_scale), dx, dtype=x.dtype)
    return dx, dweight, dA, dB, dbias, None, None


# ---- few rows ----


def _rows_apart(t: Tensor | None) -> Tensor | None:
    """The tensor with its innermost stride 1, as the kernel reads it."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _by_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether few rows meet these weights in matrix registers."""
    return weight.dtype == torch.bfloat16 and x.shape[0] >= TILED_ROWS and native.may_use_amx()


def _most_few_rows(x: Tensor, weight: Tensor) -> int:
    return max(FEW_ROWS, FEW_TILES * (16 // PIECES[x.dtype])) if _by_tiles(x, weight) else FEW_ROWS


def _few_rows(x, weight, weight_scale, lora_A, lora_B, bias, task, scale: float) -> Tensor:
    rows, width = x.shape
    out = weight.shape[0]
    y = native.empty((rows, out), x.dtype)
    rank = 0 if task is None else lora_A.shape[1]
    amx = _by_tiles(x, weight)
    if amx:
        kept = 8 * (width + 31) * -(-rows // (16 // PIECES[x.dtype]))
    else:
        kept = rows * (width + 31 if weight_scale is None else -(-width // GROUP) * DIGITS)
    native.call(
        "lora_linear_forward",
        x=_rows_apart(x),
        weight=_rows_apart(weight),
        weight_scale=weight_scale,
        lora_A=_rows_apart(lora_A),
        lora_B=_rows_apart(lora_B),
        bias=bias,
        task=task,
        y=y,
        workspace=native.floats(kept + rows * rank),
        rows=rows,
        out=out,
        rank=rank,
        scale=scale,
        vnni=native.may_use_vnni(),
        amx=amx,
        **{"in": width},
    )
    return y


# ---- many rows ----


def _dense(weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The weights as floats: themselves, or int8 ones times their scales in memory of their own."""
    if weight_scale is None or not weight.numel():
        return weight
    out, width = weight.shape
    dense = native.floats(out, width)
    weight = _rows_apart(weight)
    native.call(
        "int8_weight_dequantize", dense=dense, weight=weight, weight_scale=weight_scale, out=out, **{"in": width}
    )
    return dense


def _matmul(a: Tensor, b: Tensor, start: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """start + a (m, k) b (k, n): a and b of any strides, start in float32 with rows contiguous; 0 where it is None.

    A start that is a matrix of its own may become the result.
    """
    (m, k), n = a.shape, b.shape[1]
    if not (m and n and k):
        return a.new_zeros(m, n, dtype=dtype) if start is None else start.to(dtype, copy=True).contiguous()
    amx = torch.bfloat16 in (a.dtype, b.dtype) and native.may_use_amx()
    wanted = dtype if amx else torch.float32
    own = (
        start is not None and m > 1 and start.stride(0) == n and wanted == torch.float32
    )  # no bias, the same for all rows
    c = start if own else native.empty((m, n), wanted)
    native.call(
        "matmul", a=a, b=b, c=c, start=start, workspace=native.floats(_matmul_floats(a, b, amx)), m=m, n=n, k=k, amx=amx
    )
    return native.stored_as(dtype, c)


def _matmul_floats(a: Tensor, b: Tensor, amx: bool) -> int:
    """How large a workspace the product needs, as MatmulParams tells."""
    (m, k), threads = a.shape, torch.get_num_threads()
    if not amx:
        return (m + 12 + threads * COLUMNS) * DEPTH
    chains = 1 if a.dtype == b.dtype == torch.bfloat16 else 2
    rows = min(BLOCK_ROWS // chains, -(-m // 32) * 32)
    return rows * (k + 31) * PIECES[a.dtype] // 2 + threads * CHUNK * (chains * rows + 256 * PIECES[b.dtype])


def _by_rank(lora_B: Tensor) -> Tensor:
    """lora_B (tasks, out, r) as (tasks r, out)."""
    return lora_B.transpose(1, 2).flatten(0, 1)


def _routed(task: Tensor, lora_A: Tensor, scale: float) -> Tensor:
    """(rows, tasks r): ``scale`` in the columns of the row's own task, 0 in the others."""
    tasks, r, _ = lora_A.shape
    own = task[:, None] == torch.arange(tasks, device=task.device).repeat_interleave(r)
    return own.float().mul_(scale)


def _low(u: Tensor, lora_A: Tensor, task: Tensor, scale: float) -> Tensor:
    return _matmul(u, lora_A.flatten(0, 1).T).mul_(_routed(task, lora_A, scale))


def _dropped(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """u: x itself without dropout."""
    return _drop(x, dropout_p, seed) if dropout_p else x


def _drop(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """The kept elements of x (rows, width) over 1 - dropout_p, in float32."""
    x = _rows_apart(x)
    y = native.floats(*x.shape)
    native.call(
        "lora_dropout",
        x=x,
        y=y,
        rows=x.shape[0],
        width=x.shape[1],
        seed=seed & 0xFFFFFFFF,
        threshold=int(dropout_p * 2**32),
        keep=1 - dropout_p,
    )
    return y
