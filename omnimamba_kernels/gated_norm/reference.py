"""Definition of the gated RMSNorm, over groups of the last dimension.

    norm(u) = u / sqrt(mean(u^2 over the group) + eps) * weight + bias
    y = norm(x) * silu(z)        norm_before_gate
    y = norm(x * silu(z))        otherwise

Source: RMSNorm (arXiv 1910.07467); Mamba-2 (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(compute)
    gate = None if z is None else F.silu(z.to(compute))
    if gate is not None and not norm_before_gate:
        u = u * gate
    grouped = u.unflatten(-1, (-1, group_size))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if gate is not None and norm_before_gate:
        y = y * gate
    return (y.to(x.dtype).contiguous(),), ()


def add_forward(residual: Tensor, update: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """residual += update in place, then its norm."""
    residual += update
    return forward(residual, weight, None, None, eps=eps, group_size=residual.shape[-1], norm_before_gate=True)[0][0]
