"""What the gated RMSNorm's Triton kernels load and store (triton_impl.py), against what nobody can do without."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target, settings


def forward_floor(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, **_: object) -> Cost:
    """Each input once, each output once."""
    return Cost(nbytes(x, weight, bias, z), nbytes(x))


def backward_floor(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, **_: object) -> Cost:
    return Cost(nbytes(x, x, weight, bias, z), nbytes(x, weight, bias, z))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *,
    target: Target, group_size: int, norm_before_gate: bool, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Rows once, and the columns beyond a group's first block twice; the weights once for each block of rows."""
    use = settings("gated_norm", "forward", target, group_size=group_size)
    row = nbytes(x) + nbytes(z)
    again = nbytes(x) + (0 if norm_before_gate else nbytes(z))
    beyond = max(0, group_size - use["longest"]) / group_size
    steps = blocks(x.numel() // x.shape[-1], use["BLOCK_M"])
    return {"_forward": Cost(row + round(again * beyond) + steps * nbytes(weight, bias), nbytes(x))}


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *,
    target: Target, group_size: int, norm_before_gate: bool, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Rows and weights twice, the bias once where the gate comes after it. The sums of a part stay in registers, or, of
    a long group, go to memory after each block of rows; then the parts are added."""
    use = settings("gated_norm", "backward", target, group_size=group_size)
    d = x.shape[-1]
    steps = blocks(x.numel() // d, use["BLOCK_M"])
    most = use["per_multiprocessor"] * target.multiprocessors // (d // group_size)
    parts = blocks(steps, blocks(steps, max(1, min(steps, most))))
    sums = 4 * d * (1 if bias is None else 2)
    offsets = nbytes(bias) if z is not None and norm_before_gate else 0
    loaded = 2 * nbytes(x, x, z) + steps * (2 * nbytes(weight) + offsets)
    stored = nbytes(x, z)
    total = Cost(parts * sums, nbytes(weight, bias))
    if group_size <= use["longest"]:
        return {"_backward": Cost(loaded, stored + parts * sums), "_total": total}
    return {"_backward": Cost(loaded + (steps - parts) * sums, stored + steps * sums), "_total": total}
