"""One decode step of the mixer in Triton, host side.

Whole sequences (``mamba_split_conv1d_scan_combined``) are made of the public functions of the other operations, on
every back end alike, four launches forward. Nothing is copied: x, B, C, z and dt are read where they lie. Bytes from
and to memory a position, 64 heads of 64, n 128, one group, 16 bits, 8 x 2048 (cost.sequence, but B, C and weights
once, as L2 hands them out); cost.sequence_floor is 26 KB:

    convolution    8.7 + 8.7 KB    a view of zxbcdt in, channel-last out, as the scan reads it
    steps          0.1 + 1.0 KB
    walk           10 + 8.2 KB     without a norm weight also z, 8.2 KB: it gates, and is the end
    gated norm     16.4 + 8.2 KB   y and z, a view of zxbcdt: 61 KB in all, 45 KB without

Where more could go, and what it costs:

    gate and squares in the walk  nothing: z is read there instead of by the norm, y still goes out, in and out
    norm in the walk              16.4 KB less, but it needs a position's heads, which are other programs', and none may
                                  wait for another. One program for a group would hold 2 MiB of states; states from
                                  memory at every 256th position are 2 x 8.2 KB, as much as is saved
    norm in the projection        16.4 KB less where there is one: factors of rows from squares that the walk sums, the
                                  norm's weight on the projection's columns, a pass over that for each call
    convolution of x in the walk  16.4 KB less where no gradient is wanted (which needs the convolved x): w reads and a
                                  SiLU an element in a walk that has 254 of 255 registers on sm_90 already. To be tried
                                  beside a GPU, as is the line above it
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import triton_launch
from ..triton_launch import launch, settings, target_of
from .tickets import tickets
from .triton_step import step_kernel


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return triton_launch.cannot_store(*tensors)


def forward(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    rmsnorm_weight: Tensor | None,
    state_batch_indices: Tensor | None,
    *,
    headdim: int,
    ngroups: int,
    rmsnorm_eps: float,
    norm_before_gate: bool,
    activation: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    b, columns = zxbcdt.shape
    h, n = A.shape[0], ssm_state.shape[3]
    channels, w = conv1d_weight.shape
    dim, length = h * headdim, conv_state.shape[2]
    extra = (columns - dim - channels - h) // 2
    out = zxbcdt.new_empty(b, extra + dim)
    use = settings("mamba_mixer", "step", target_of(zxbcdt), channels=b * dim, n=n)
    members = triton.cdiv(dim // ngroups, use["BLOCK_C"])  # programs of a group
    has_norm = rmsnorm_weight is not None
    u, squares = (
        zxbcdt.new_empty(size, dtype=torch.float32) if has_norm else None for size in (b * dim, b * ngroups * members)
    )
    launch(
        step_kernel, (b * ngroups * members,),
        zxbcdt, conv_state, ssm_state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, state_batch_indices,
        out, u, squares, tickets(ssm_state), h, ngroups, headdim, n, extra, ssm_state.shape[0],
        rmsnorm_eps, *zxbcdt.stride(), *conv_state.stride(), *ssm_state.stride(), *conv1d_weight.stride(),
        _stride(conv1d_bias), _stride(dt_bias), _stride(A), _stride(D),
        D.stride(1) if D is not None and D.dim() == 2 else 0, _stride(rmsnorm_weight), _stride(state_batch_indices),
        HAS_SLOTS=state_batch_indices is not None, HAS_CONV_BIAS=conv1d_bias is not None,
        HAS_DT_BIAS=dt_bias is not None, HAS_D=D is not None, HAS_NORM=has_norm, NORM_BEFORE_GATE=norm_before_gate,
        ACTIVATION=activation, WIDTH=w, STATE_LEN=length, BLOCK_N=triton.next_power_of_2(max(n, 1)),
        BLOCK_L=min(triton.next_power_of_2(length), 16), BLOCK_S=triton.next_power_of_2(members), **use,
    )  # fmt: skip
    return (out,), ()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
