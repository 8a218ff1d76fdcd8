"""Definition of the depthwise causal convolution.

    y[b, d, t] = act(bias[d] + sum_k weight[d, k] x[b, d, t - (w - 1) + k])

x before t = 0 is ``initial_states`` (b, d, w - 1), or zero. With ``seq_idx`` (b, l) a tap reaches only elements of
its own sequence, the initial states belong to that of the first position, and a negative index is padding, whose
output is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import empty_like, padded_ids


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    *,
    activation: bool,
    return_final_states: bool,
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], tuple]:
    b, d, l = x.shape
    w = weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    before = x.new_zeros(b, d, w - 1) if initial_states is None else initial_states.to(x.dtype)
    padded = torch.cat([before, x], dim=-1)
    y = torch.zeros(b, d, l, dtype=compute, device=x.device)
    if bias is not None:
        y = y + bias.to(compute)[:, None]
    ids = None if seq_idx is None else padded_ids(seq_idx, w)
    for k in range(w):
        tap = padded[..., k : k + l].to(compute)
        if ids is not None:
            # Not a product with the mask: whatever lies in the padding, NaN even, must not come through.
            live = (ids[:, k : k + l] == seq_idx) & (seq_idx >= 0)
            tap = tap.masked_fill(~live[:, None], 0)
        y = y + tap * weight[:, k, None].to(compute)
    if activation:
        y = F.silu(y)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0)
    final = None
    if return_final_states:
        final = padded[..., l:]
        if ids is not None:
            live = (ids[:, l:] == ids[:, -1:]) & (ids[:, -1:] >= 0)
            final = final.masked_fill(~live[:, None], 0)
        final = final.contiguous()
    return (empty_like(x).copy_(y), final), ()


def update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    *,
    activation: bool,
) -> Tensor:
    """The same convolution continued from ``conv_state``, which takes in the new x (b, d, l) in place.

    The state holds the last inputs in order, or, with ``cache_seqlens``, is a ring in which x goes to slot
    ``cache_seqlens % state_len`` and on. A negative index in ``conv_state_indices`` gives output 0.
    """
    b, _, l = x.shape
    w, length = weight.shape[1], conv_state.shape[-1]
    slots = torch.arange(b, device=x.device) if conv_state_indices is None else conv_state_indices.long()
    live = slots >= 0
    state = conv_state[slots.clamp(min=0)]
    if cache_seqlens is None:
        order = torch.arange(length, device=x.device).expand(b, length)
    else:
        order = (cache_seqlens[:, None].long() + torch.arange(length, device=x.device)) % length
    order = order[:, None].expand_as(state)
    both = torch.cat([state.gather(2, order), x.to(state.dtype)], dim=-1)
    (y, _), _ = forward(
        x,
        weight,
        bias,
        both[..., length - (w - 1) : length].to(x.dtype),
        None,
        activation=activation,
        return_final_states=False,
    )
    if cache_seqlens is None:
        state = both[..., both.shape[-1] - length :]
    else:
        # A write longer than the ring leaves its last elements.
        kept = min(l, length)
        at = (cache_seqlens[:, None].long() + torch.arange(l - kept, l, device=x.device)) % length
        state = state.scatter(2, at[:, None].expand(-1, x.shape[1], -1), x[..., l - kept :].to(state.dtype))
    conv_state[slots[live]] = state[live]
    return y.masked_fill(~live[:, None, None], 0)


def varlen_states(x: Tensor, cu_seqlens: Tensor, *, state_len: int) -> Tensor:
    """(sequences, d, state_len): the last inputs of each packed sequence, right-aligned and zero-filled."""
    ends = cu_seqlens[1:].long()
    at = ends[:, None] + torch.arange(-state_len, 0, device=x.device)
    inside = at >= cu_seqlens[:-1, None]
    if not x.shape[0]:
        return x.new_zeros(ends.numel(), x.shape[1], state_len)
    return x[at.clamp(min=0)].masked_fill(~inside[..., None], 0).transpose(1, 2).contiguous()
