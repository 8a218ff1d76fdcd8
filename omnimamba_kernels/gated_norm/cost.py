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


GATE = 8  # FLOPs of silu(z) and its slope


def forward_arithmetic(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *,
    target: Target, group_size: int, norm_before_gate: bool, **_: object,
) -> dict[str, int]:  # fmt: skip
    """A square and two or three products an element, and the gate where it is read: before the norm, also for each of
    the columns beyond a group's first block twice."""
    use = settings("gated_norm", "forward", target, group_size=group_size)
    groups, column_blocks, lanes = _tiles(x, group_size, use)
    before, after = ((GATE + 1) * (z is not None and norm_before_gate is last) for last in (False, True))
    beyond = column_blocks - 1
    each = column_blocks * (1 + before + 2 + (bias is not None) + after) + beyond * before
    return {"_forward": groups * (lanes * each + use["BLOCK_M"] * (2 + beyond))}


def backward_arithmetic(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *,
    target: Target, group_size: int, norm_before_gate: bool, **_: object,
) -> dict[str, int]:  # fmt: skip
    """Seven an element, three for dweight and one for dbias, and the gate twice; the parts once more."""
    use = settings("gated_norm", "backward", target, group_size=group_size)
    groups, column_blocks, lanes = _tiles(x, group_size, use)
    long, has_bias = group_size > use["longest"], bias is not None
    each = 7 + (2 if long else 3 + has_bias)
    if z is not None:
        each += 2 * GATE + 2 + (4 + has_bias if norm_before_gate else 3)
    columns = lanes // use["BLOCK_M"] * (1 + has_bias) if long else 0
    found = groups * (column_blocks * (lanes * each + columns) + use["BLOCK_M"] * (2 * column_blocks + 5))
    steps = blocks(x.numel() // x.shape[-1], use["BLOCK_M"])
    parts = blocks(steps, blocks(steps, max(1, min(steps, _most(x, target, group_size, use)))))
    use = settings("gated_norm", "total", target)
    total = blocks(parts, use["ROWS"]) * use["ROWS"] * blocks(x.shape[-1], use["COLUMNS"]) * use["COLUMNS"]
    return {"_backward": found, "_total": (1 + has_bias) * total}


def _tiles(x: Tensor, group_size: int, use: dict[str, int]) -> tuple[int, int, int]:
    """Programs' steps over rows of a group, blocks of columns of each, and the lanes of a block."""
    d = x.shape[-1]
    block_d = min(1 << (group_size - 1).bit_length(), use["longest"])
    steps = blocks(x.numel() // d, use["BLOCK_M"])
    return steps * (d // group_size), blocks(group_size, block_d), use["BLOCK_M"] * block_d


def _most(x: Tensor, target: Target, group_size: int, use: dict[str, int]) -> int:
    """The most parts that the rows are walked in."""
    return use["per_multiprocessor"] * target.multiprocessors // (x.shape[-1] // group_size)


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *,
    target: Target, group_size: int, norm_before_gate: bool, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Rows and weights twice, the bias once where the gate comes after it. The sums of a part stay in registers, or, of
    a long group, go to memory after each block of rows; then the parts are added."""
    use = settings("gated_norm", "backward", target, group_size=group_size)
    d = x.shape[-1]
    steps = blocks(x.numel() // d, use["BLOCK_M"])
    parts = blocks(steps, blocks(steps, max(1, min(steps, _most(x, target, group_size, use)))))
    sums = 4 * d * (1 if bias is None else 2)
    offsets = nbytes(bias) if z is not None and norm_before_gate else 0
    loaded = 2 * nbytes(x, x, z) + steps * (2 * nbytes(weight) + offsets)
    stored = nbytes(x, z)
    total = Cost(parts * sums, nbytes(weight, bias))
    if group_size <= use["longest"]:
        return {"_backward": Cost(loaded, stored + parts * sums), "_total": total}
    return {"_backward": Cost(loaded + (steps - parts) * sums, stored + steps * sums), "_total": total}
