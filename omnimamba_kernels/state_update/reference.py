"""Definition of one decode step, for each row b and head h, channel d and state n.

    dt = softplus(dt + dt_bias)
    state = exp(dt A) state + dt x B        in place
    out = (sum_n state C + D x) * silu(z)

The state is rounded to its storage type only when it is written; out uses the unrounded one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    *,
    dt_softplus: bool,
    save: bool = False,
) -> tuple[tuple[Tensor], tuple]:
    b, h, _ = x.shape
    compute = torch.float64 if state.dtype == torch.float64 else torch.float32
    slots = torch.arange(b, device=x.device) if state_batch_indices is None else state_batch_indices.long()
    live = slots >= 0
    step = dt.to(compute)
    if dt_bias is not None:
        step = step + dt_bias.to(compute)
    if dt_softplus:
        step = F.softplus(step)
    xf = x.to(compute)
    Bh, Ch = (t.to(compute).repeat_interleave(h // t.shape[1], dim=1) for t in (B, C))
    old = state[slots.clamp(min=0)].to(compute)
    new = torch.exp(step[..., None] * A.to(compute)) * old + (step * xf)[..., None] * Bh[:, :, None]
    out = (new * Ch[:, :, None]).sum(-1)
    if D is not None:
        out = out + D.to(compute) * xf
    if z is not None:
        out = out * F.silu(z.to(compute))
    state[slots[live]] = new[live].to(state.dtype)
    return (out.masked_fill(~live[:, None, None], 0).to(x.dtype),), ()
