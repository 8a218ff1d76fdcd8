"""What the mixer in Triton loads and stores, against what nobody can do without: its decode step (triton_step.py), and
whole sequences, which are made of the other operations (triton_impl.py)."""

from __future__ import annotations

from torch import Tensor

from ..causal_conv1d import cost as conv
from ..cost import Cost, blocks, nbytes
from ..gated_norm import cost as norm
from ..ssd_scan import cost as scan
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


EXP, SOFTPLUS, SILU = 9, 34, 4  # FLOPs


def forward_arithmetic(
    zxbcdt: Tensor, ssm_state: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor | None,
    A: Tensor, D: Tensor | None, rmsnorm_weight: Tensor | None, *, target: Target, headdim: int, ngroups: int = 1,
    norm_before_gate: bool = True, activation: str | None = "silu", **_: object,
) -> dict[str, int]:  # fmt: skip
    """Four a state; the convolution of a program's channels and of its group's B and C; steps, gate and norm."""
    (b, columns), (h, n), (channels, w) = zxbcdt.shape, (A.shape[0], ssm_state.shape[3]), conv1d_weight.shape
    dim = h * headdim
    extra = (columns - dim - channels - h) // 2
    use = settings("mamba_mixer", "step", target, channels=b * dim, n=n)
    lanes, states, block = use["BLOCK_C"], 1 << (max(n, 1) - 1).bit_length(), use["BLOCK"]
    has_norm = rmsnorm_weight is not None
    late = has_norm and norm_before_gate  # the gate comes after the norm
    convolved = 2 * w + (conv1d_bias is not None) + SILU * (activation is not None)
    channel = SOFTPLUS + EXP + 2 + (dt_bias is not None) + 2 * (D is not None) + (SILU + 1) * (not late) + has_norm
    found = b * ngroups * blocks(dim // ngroups, lanes) * (
        (lanes + 2 * states) * convolved + lanes * channel + 4 * lanes * states
    )  # fmt: skip
    found += b * blocks(extra, block) * block * (SILU + 1)
    if has_norm:
        found += b * ngroups * (2 + blocks(dim // ngroups, block) * block * (2 + (SILU + 1) * late))
    return {"step_kernel": found}


def sequence_floor(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor,
    D: Tensor | None, rmsnorm_weight: Tensor | None, *, headdim: int, ngroups: int = 1, **_: object,
) -> Cost:  # fmt: skip
    """Each input once, the output and the last states once, from zxbcdt without leading columns to the normed y."""
    b, l, _ = zxbcdt.shape
    dim = A.shape[0] * headdim
    n = (conv1d_weight.shape[0] - dim) // (2 * ngroups)
    small = nbytes(conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight)
    return Cost(nbytes(zxbcdt) + small, b * l * dim * zxbcdt.element_size() + 4 * b * dim * n, 4 * b * l * dim * n)


def sequence(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor,
    D: Tensor | None, rmsnorm_weight: Tensor | None, *,
    target: Target, headdim: int, ngroups: int = 1, norm_before_gate: bool = True, save: bool = False, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """The launches from zxbcdt without leading columns to the normed y."""
    dim = A.shape[0] * headdim
    channels = conv1d_weight.shape[0]
    n = (channels - dim) // 2
    z, xBC, dt = zxbcdt.split([dim, channels, A.shape[0]], -1)
    mixed = xBC.new_empty(xBC.shape, device="meta")
    x, B, C = (
        t.unflatten(-1, (k, -1))
        for t, k in zip(mixed.split([dim, n, n], -1), (A.shape[0], ngroups, ngroups), strict=True)
    )
    gate = None if rmsnorm_weight is not None else z.unflatten(-1, x.shape[2:])
    found = conv.forward(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, None, None, target=target,
                         return_final_states=False)  # fmt: skip
    found |= scan.forward(x, dt, A, B, C, D, gate, dt_bias, None, None, target=target, save=save)
    if rmsnorm_weight is not None:
        found |= norm.forward(mixed[..., :dim], rmsnorm_weight, None, z, target=target, group_size=dim // ngroups,
                              norm_before_gate=norm_before_gate)  # fmt: skip
    return found
