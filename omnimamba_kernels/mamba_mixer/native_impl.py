"""One decode step of the mixer on a CPU: convolution, state, gate and norm in one call of the native module."""

from __future__ import annotations

from torch import Tensor

from .. import native


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return native.cannot_store(*tensors)


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
    native.call(
        "mamba_mixer_step",
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
        workspace=native.floats(b * (2 * channels + dim + h) + channels * (w + 1) + 2 * (h + dim)),
        batch=b,
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
    return (out,), ()
