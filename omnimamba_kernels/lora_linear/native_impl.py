"""The LoRA linear layer on a CPU: a kernel of our own for few rows, torch's sgemm for many.

    y_i = W x_i + bias + scale B_t A_t u_i,    u = dropout(x)

Many rows: the adapters are concatenated by rank, S = (u [A_1; A_2; ..]^T) masked by the row's task, then
S [B_1 | B_2 | ..]^T. 16-bit weights pass through a panel of float32 scratch: each is read once, and all arithmetic is float32. (torch's own
16-bit product is fast only where the processor has instructions for it, and some 400 times slower elsewhere.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

# Up to so many rows one pass over the weights is faster than unpacking them for sgemm.
FEW_ROWS = 16
# Rows of 16-bit weights unpacked at a time: a panel of float32 that stays in cache.
PANEL = 512


def why_not(*tensors: Tensor | None, **options: object) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return "native kernels compute in float32; float64 runs on the reference"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    task: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    saved = (x, weight, lora_A, lora_B, task) if save else ()
    if x.shape[0] <= FEW_ROWS and not dropout_p and x.numel() and weight.numel():
        return (_few_rows(x, weight, lora_A, lora_B, bias, task, scale),), saved
    x32 = x.float()
    low = B = None
    if task is not None:
        low = _low(_dropped(x, dropout_p, dropout_seed), lora_A, task, scale)
        B = _by_rank(lora_B)
    y = x.new_empty(x.shape[0], weight.shape[0])
    whole = y.dtype == weight.dtype == torch.float32
    scratch = None if whole else torch.empty(x.shape[0], PANEL)
    for begin, panel in _panels(weight, whole):
        end = begin + panel.shape[0]
        part = y[:, begin:end]
        sums = part if y.dtype == torch.float32 else scratch[:, : end - begin]
        if bias is None:
            torch.mm(x32, panel.T, out=sums)
        else:
            torch.addmm(bias[begin:end].float(), x32, panel.T, out=sums)
        if low is not None:
            sums.addmm_(low, B[:, begin:end])
        if sums is not part:
            part.copy_(sums)
    return (y,), saved


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None],
    needs: tuple[bool, ...],
    *,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, task = saved
    dx = dweight = dA = dB = dbias = None
    if grads[0] is None:
        return None, None, None, None, None, None
    dy = grads[0].float()
    if needs[0]:
        dx = _times_weight(dy, weight)
    if needs[1]:
        dweight = torch.mm(dy.T, x.float()).to(weight.dtype)
    if needs[4]:
        dbias = dy.sum(0)
    if task is not None and (needs[0] or needs[2] or needs[3]):
        u = _dropped(x, dropout_p, dropout_seed) if needs[2] or needs[3] else None
        A, B = lora_A.flatten(0, 1).float(), _by_rank(lora_B)
        dlow = torch.mm(dy, B.T).mul_(_routed(task, lora_A, scale))
        if needs[0] and dropout_p:
            _drop(torch.mm(dlow, A), dropout_p, dropout_seed, onto=dx)
        elif needs[0]:
            dx.addmm_(dlow, A)
        if needs[2]:
            dA = torch.mm(dlow.T, u).view(lora_A.shape).to(lora_A.dtype)
        if needs[3]:
            dB = torch.mm(_low(u, lora_A, task, scale).T, dy)
            dB = dB.unflatten(0, lora_A.shape[:2]).transpose(1, 2).to(lora_B.dtype)
    return dx if dx is None else dx.to(x.dtype), dweight, dA, dB, dbias, None


# ---- few rows ----


def _rows_apart(t: Tensor | None) -> Tensor | None:
    """The tensor with its innermost stride 1, as the kernel reads it."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _few_rows(x, weight, lora_A, lora_B, bias, task, scale: float) -> Tensor:
    rows, width = x.shape
    out = weight.shape[0]
    y = x.new_empty(rows, out)
    rank = 0 if task is None else lora_A.shape[1]
    native.call(
        "lora_linear_forward",
        x=_rows_apart(x),
        weight=_rows_apart(weight),
        lora_A=_rows_apart(lora_A),
        lora_B=_rows_apart(lora_B),
        bias=bias,
        task=task,
        y=y,
        workspace=torch.empty(rows * (width + 31 + rank)),
        rows=rows,
        out=out,
        rank=rank,
        scale=scale,
        **{"in": width},
    )
    return y


# ---- many rows ----


def _panels(weight: Tensor, whole: bool):
    """(first row, float32 weights) of one panel after another; float32 weights are not copied."""
    if whole:
        yield 0, weight
        return
    scratch = None if weight.dtype == torch.float32 else torch.empty(PANEL, weight.shape[1])
    for begin in range(0, weight.shape[0], PANEL):
        panel = weight[begin : begin + PANEL]
        yield begin, panel if scratch is None else scratch[: panel.shape[0]].copy_(panel)


def _times_weight(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W in float32."""
    if weight.dtype == torch.float32:
        return torch.mm(dy, weight)
    dx = torch.zeros(dy.shape[0], weight.shape[1])
    for begin, panel in _panels(weight, whole=False):
        dx.addmm_(dy[:, begin : begin + panel.shape[0]], panel)
    return dx


def _by_rank(lora_B: Tensor) -> Tensor:
    """lora_B (tasks, out, r) as float32 (tasks r, out)."""
    return lora_B.transpose(1, 2).flatten(0, 1).float()


def _routed(task: Tensor, lora_A: Tensor, scale: float) -> Tensor:
    """(rows, tasks r): ``scale`` in the columns of the row's own task, 0 in the others."""
    tasks, r, _ = lora_A.shape
    own = task[:, None] == torch.arange(tasks).repeat_interleave(r)
    return own * torch.tensor(scale, dtype=torch.float32)


def _low(u: Tensor, lora_A: Tensor, task: Tensor, scale: float) -> Tensor:
    return torch.mm(u, lora_A.flatten(0, 1).float().T).mul_(_routed(task, lora_A, scale))


def _dropped(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """u in float32: x itself without dropout."""
    return _drop(x, dropout_p, seed) if dropout_p else x.float()


def _drop(x: Tensor, dropout_p: float, seed: int, onto: Tensor | None = None) -> Tensor:
    """The kept elements of x (rows, width) over 1 - dropout_p, in float32, added to ``onto`` where it is given."""
    x = _rows_apart(x)
    y = torch.empty(x.shape) if onto is None else onto
    native.call(
        "lora_dropout",
        x=x,
        y=y,
        rows=x.shape[0],
        width=x.shape[1],
        seed=seed & 0xFFFFFFFF,
        threshold=int(dropout_p * 2**32),
        keep=1 - dropout_p,
        accumulate=onto is not None,
    )
    return y
