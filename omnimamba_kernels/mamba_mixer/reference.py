"""Definition of one decode step between a Mamba-2 mixer's two projections.

[z0, x0, z, xBC, dt] = zxbcdt
xBC = act(convolution continued from conv_state)            conv_state in place
y = one step of the scan from ssm_state, plus D x            ssm_state in place
y = gated RMSNorm of y with z, or y silu(z) without a norm weight; silu(z0) x0 before it where there is any
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d import reference as conv
from ..gated_norm import reference as norm
from ..state_update import reference as scan_step


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
    h, n = A.shape[0], ssm_state.shape[-1]
    dim = h * headdim
    extra = (zxbcdt.shape[1] - 2 * dim - 2 * ngroups * n - h) // 2
    gate0, x0, z, xBC, dt = zxbcdt.split([extra, extra, dim, dim + 2 * ngroups * n, h], dim=-1)
    xBC = conv.update(
        xBC[..., None], conv_state, conv1d_weight, conv1d_bias, None, state_batch_indices, activation=activation
    )[..., 0]
    x, B, C = xBC.split([dim, ngroups * n, ngroups * n], dim=-1)

    def heads(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[..., None].expand(*t.shape, headdim)

    ((y,), _) = scan_step.forward(
        ssm_state,
        x.unflatten(1, (h, headdim)),
        heads(dt),
        heads(A)[..., None].expand(h, headdim, n),
        B.unflatten(1, (ngroups, n)),
        C.unflatten(1, (ngroups, n)),
        D if D is None or D.dim() == 2 else heads(D),
        None if rmsnorm_weight is not None else z.unflatten(1, (h, headdim)),
        heads(dt_bias),
        state_batch_indices,
        dt_softplus=True,
    )
    y = y.flatten(1)
    if rmsnorm_weight is not None:
        ((y,), _) = norm.forward(
            y, rmsnorm_weight, None, z, eps=rmsnorm_eps, group_size=dim // ngroups, norm_before_gate=norm_before_gate
        )
    if extra:
        y = torch.cat([F.silu(gate0) * x0, y], dim=-1)
    if state_batch_indices is not None:
        y = y.masked_fill((state_batch_indices < 0)[:, None], 0)
    return (y,), ()
