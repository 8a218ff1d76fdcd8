"""What the mixer's decode step in Triton loads and stores (triton_step.py), against what nobody can do without.

Whole sequences are made of the other operations; so is their cost.
"""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target, settings


def forward_floor(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
    dt_bias: Tensor | None, A: Tensor, D: Tensor | None, rmsnorm_weight: Tensor | None,
    state_batch_indices: Tensor | None, *, headdim: int, **_: object,
) -> Cost:  # fmt: skip
    """Each input once, both states of every row once in and once out, the output once."""
    b, columns = zxbcdt.shape
    states = b * (nbytes(conv_state[0]) + nbytes(ssm_state[0]))
    small = nbytes(conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, state_batch_indices)
    dim = A.shape[0] * headdim
    extra = (columns - dim - conv1d_weight.shape[0] - A.shape[0]) // 2
    return Cost(nbytes(zxbcdt) + states + small, states + b * (extra + dim) * zxbcdt.element_size())


def forward(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
    dt_bias: Tensor | None, A: Tensor, D: Tensor | None, rmsnorm_weight: Tensor | None,
    state_batch_indices: Tensor | None, *,
    target: Target, headdim: int, ngroups: int = 1, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Every row has a slot. The atomic additions to the tickets are not in it."""
    b, columns = zxbcdt.shape
    h, n = A.shape[0], ssm_state.shape[3]
    channels, w = conv1d_weight.shape
    dim, length = h * headdim, conv_state.shape[2]
    extra = (columns - dim - channels - h) // 2
    use = settings("mamba_mixer", "step", target, channels=b * dim, n=n)
    programs = b * ngroups * blocks(dim // ngroups, use["BLOCK_C"])
    element = zxbcdt.element_size()

    convolved = b * dim + programs * 2 * n  # every program convolves its group's B and C
    window = element + (w - 1) * conv_state.element_size() + nbytes(conv1d_weight[0])
    window += 0 if conv1d_bias is None else conv1d_bias.element_size()
    moved_on = b * channels
    heads = sum(t.element_size() for t in (zxbcdt, dt_bias, A, D) if t is not None)
    state = b * dim * n * ssm_state.element_size()
    loaded = state + convolved * window + b * dim * (heads + element)  # and z, once before or after the norm
    loaded += moved_on * (element + (length - 1) * conv_state.element_size()) + 2 * b * extra * element
    loaded += 0 if state_batch_indices is None else programs * state_batch_indices.element_size()
    stored = state + moved_on * length * conv_state.element_size() + b * (dim + extra) * element
    if rmsnorm_weight is not None:
        loaded += 4 * programs + b * dim * (4 + rmsnorm_weight.element_size())
        stored += 4 * programs + 4 * b * dim
    return {"step_kernel": Cost(loaded, stored)}
