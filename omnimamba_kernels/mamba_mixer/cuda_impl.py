"""The CUDA kernel of the mixer's decode step (csrc/mamba_mixer/cuda.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .tickets import tickets


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return cuda.cannot_take(*tensors)


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
    dim = h * headdim
    extra = (columns - dim - channels - h) // 2
    out = zxbcdt.new_empty(b, extra + dim)
    arguments = dict(
        zxbcdt=zxbcdt,
        conv_state=conv_state,
        ssm_state=ssm_state,
        conv1d_weight=conv1d_weight,
        conv1d_bias=conv1d_bias,
        dt_bias=dt_bias,
        A=A,
        D=D,
        rmsnorm_weight=rmsnorm_weight,
        state_batch_indices=state_batch_indices,
        out=out,
        tickets=tickets(ssm_state),
        batch=b,
        slots=ssm_state.shape[0],
        heads=h,
        headdim=headdim,
        groups=ngroups,
        state=n,
        extra=extra,
        width=w,
        state_len=conv_state.shape[2],
        eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate,
        activation=activation,
        headwise_D=D is None or D.dim() == 1,
    )
    floats = cuda.call("mamba_mixer_step_workspace", zxbcdt.device, **arguments)
    workspace = zxbcdt.new_empty(floats, dtype=torch.float32)
    cuda.call("mamba_mixer_step", zxbcdt.device, workspace=workspace, **arguments)
    return (out,), ()
