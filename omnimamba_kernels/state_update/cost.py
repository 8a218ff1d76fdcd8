"""What the decode step's Triton kernel loads and stores (triton_impl.py), against what nobody can do without."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target, settings


def forward_floor(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state_batch_indices: Tensor | None, **_: object,
) -> Cost:  # fmt: skip
    """Each value in memory once, however often a stride of 0 repeats it; every row has a slot."""
    small = sum(_stored(t) for t in (x, dt, A, B, C, D, z, dt_bias, state_batch_indices) if t is not None)
    moved = x.numel() * state.shape[3] * state.element_size()
    return Cost(moved + small, moved + nbytes(x))


def forward(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state_batch_indices: Tensor | None, *, target: Target, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Every row has a slot. The state once; B and C once a program, and of a tied head A, dt and dt_bias too."""
    b, h, d = x.shape
    n = state.shape[3]
    BLOCK_N, BLOCK_D = _block(state, x, target)
    programs = b * h * blocks(d, BLOCK_D)
    tied = all(step == 0 or size == 1 for step, size in _within_a_head(dt, A, dt_bias))
    loaded = nbytes(x, z) + programs * n * (B.element_size() + C.element_size())
    loaded += x.numel() * (n * state.element_size() + (0 if D is None else D.element_size()))
    for t in (dt, dt_bias):
        loaded += 0 if t is None else (programs if tied else x.numel()) * t.element_size()
    loaded += (programs * blocks(n, BLOCK_N) if tied else x.numel() * n) * A.element_size()
    loaded += 0 if state_batch_indices is None else programs * state_batch_indices.element_size()
    return {"_update": Cost(loaded, x.numel() * n * state.element_size() + nbytes(x))}


SOFTPLUS, SILU = 23, 4  # FLOPs


def forward_arithmetic(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state_batch_indices: Tensor | None, *, target: Target, dt_softplus: bool = False,
    **_: object,
) -> dict[str, int]:  # fmt: skip
    """Four a state and, unless a head's decay is tied, one more for its own exponent; the rest once a channel."""
    b, h, d = x.shape
    block_n, block_d = _block(state, x, target)
    programs, n_blocks = b * h * blocks(d, block_d), blocks(state.shape[3], block_n)
    tied = all(step == 0 or size == 1 for step, size in _within_a_head(dt, A, dt_bias))
    steps = programs * (1 if tied else block_d)  # of different sizes
    found = n_blocks * (programs * block_d * (block_n * (4 if tied else 5) + 2) + steps * SOFTPLUS * dt_softplus)
    found += programs * n_blocks * tied + steps * (dt_bias is not None)
    found += programs * block_d * (2 * (D is not None) + (SILU + 1) * (z is not None))
    return {"_update": found}


def _block(state: Tensor, x: Tensor, target: Target) -> tuple[int, int]:
    """BLOCK_N and BLOCK_D."""
    (_, _, d, n), values = state.shape, x.numel() * state.shape[3]
    use = settings("state_update", "update", target, values=values)
    block_n = min(_power_of_2(max(n, 1)), use["longest"])
    return block_n, min(_power_of_2(max(d, 1)), max(1, use["values"] // block_n))


def _within_a_head(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> list[tuple[int, int]]:
    """Strides and sizes of the dimensions over which a tied head repeats its values."""
    steps = [(dt.stride(2), dt.shape[2]), (A.stride(1), A.shape[1]), (A.stride(2), A.shape[2])]
    return steps if dt_bias is None else [*steps, (dt_bias.stride(1), dt_bias.shape[1])]


def _stored(t: Tensor) -> int:
    values = 1
    for step, size in zip(t.stride(), t.shape, strict=True):
        values *= 1 if step == 0 else size
    return values * t.element_size()


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
