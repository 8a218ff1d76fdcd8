"""The compiled CPU kernels of the depthwise causal convolution (csrc/causal_conv1d)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .layout import channel_last, empty_like


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return native.cannot_store(*tensors)


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
    w = weight.shape[1]
    x = _laid_out(x)
    taps = weight.float().t().contiguous()
    offset = None if bias is None else bias.float().contiguous()
    before = None if initial_states is None else _like(initial_states.to(x.dtype), x)
    live = None if seq_idx is None else _live_bits(seq_idx, w)
    y = empty_like(x)
    native.call(
        "causal_conv1d_forward", x=x, weight=taps, bias=offset, initial_states=before, live=live, y=y,
        **_sizes(x, w, activation),
    )  # fmt: skip
    final = _final_states(x, before, seq_idx, w) if return_final_states else None
    return (y, final), (x, weight, bias, initial_states, seq_idx) if save else ()


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, ...],
    *,
    activation: bool,
    return_final_states: bool,
) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_states, seq_idx = saved
    dy, dfinal = grads
    w = weight.shape[1]
    dx = empty_like(x)
    dbefore = None if initial_states is None else _like(x.new_empty(x.shape[0], x.shape[1], w - 1), x)
    dweight = x.new_empty(w, x.shape[1], dtype=torch.float32)
    dbias = x.new_empty(x.shape[1], dtype=torch.float32)
    if x.numel() == 0 or dy is None:
        for t in (dx, dbefore, dweight, dbias):
            if t is not None:
                t.zero_()
    else:
        arguments = dict(
            x=x,
            weight=weight.float().t().contiguous(),
            bias=None if bias is None else bias.float().contiguous(),
            initial_states=None if initial_states is None else _like(initial_states.to(x.dtype), x),
            live=None if seq_idx is None else _live_bits(seq_idx, w),
            dy=_like(dy, x),
            dx=dx,
            dinitial_states=dbefore,
            dweight=dweight,
            dbias=dbias,
            **_sizes(x, w, activation),
        )
        floats = native.call("causal_conv1d_workspace", **arguments)
        native.call("causal_conv1d_backward", workspace=x.new_empty(floats, dtype=torch.float32), **arguments)
    if dfinal is not None:
        _add_final_states(dx, dbefore, dfinal, seq_idx, w)
    return (
        dx,
        dweight.t().to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if dbefore is None else dbefore.to(initial_states.dtype),
        None,
    )


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
    b, d, l = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.call(
        "causal_conv1d_update",
        x=x,
        conv_state=conv_state,
        weight=weight if weight.dtype == torch.float32 else weight.float(),
        bias=bias if bias is None or bias.dtype == torch.float32 else bias.float(),
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
        y=y,
        batch=b,
        channels=d,
        length=l,
        width=weight.shape[1],
        state_len=conv_state.shape[2],
        activation=activation,
    )
    return y


def varlen_states(x: Tensor, cu_seqlens: Tensor, *, state_len: int) -> Tensor:
    sequences, d = cu_seqlens.numel() - 1, x.shape[1]
    states = x.new_empty(sequences, d, state_len)
    native.call(
        "causal_conv1d_varlen_states", x=x, cu_seqlens=cu_seqlens, states=states, sequences=sequences, channels=d,
        state_len=state_len,
    )  # fmt: skip
    return states


def _sizes(x: Tensor, w: int, activation: bool) -> dict[str, int | bool]:
    return dict(batch=x.shape[0], channels=x.shape[1], length=x.shape[2], width=w, activation=activation)


def _laid_out(x: Tensor) -> Tensor:
    """x (b, d, l) with its channels or its times one element apart: itself where it can be."""
    if channel_last(x) or x.stride(2) == 1:
        return x
    return x.contiguous()


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t (b, d, any) with the same dimension as x's at unit stride."""
    if t.stride(1 if channel_last(x) else 2) == 1:
        return t
    return empty_like(x, t.shape[2]).copy_(t)


def _padded_ids(seq_idx: Tensor, w: int) -> Tensor:
    """What comes before the first position belongs to sequence 0."""
    return F.pad(seq_idx, (w - 1, 0))


def _live_bits(seq_idx: Tensor, w: int) -> Tensor:
    """(b, l) int32: bit j says whether the input j steps back is of the same sequence; none is set in padding."""
    l = seq_idx.shape[1]
    ids = _padded_ids(seq_idx, w)
    bits = torch.zeros_like(seq_idx, dtype=torch.int32, memory_format=torch.contiguous_format)
    for j in range(w):
        bits += (ids[:, w - 1 - j : w - 1 - j + l] == seq_idx).int() << j
    return bits * (seq_idx >= 0)


def _final_mask(seq_idx: Tensor, w: int) -> Tensor:
    """(b, 1, w - 1): which of the last inputs belong to the last position's sequence."""
    ids = _padded_ids(seq_idx, w)
    return ((ids[:, seq_idx.shape[1] :] == ids[:, -1:]) & (ids[:, -1:] >= 0))[:, None]


def _final_states(x: Tensor, before: Tensor | None, seq_idx: Tensor | None, w: int) -> Tensor:
    b, d, l = x.shape
    final = x.new_zeros(b, d, w - 1)
    kept = min(l, w - 1)
    final[..., w - 1 - kept :] = x[..., l - kept :]
    if before is not None and kept < w - 1:
        final[..., : w - 1 - kept] = before[..., kept:]
    return final if seq_idx is None else final.masked_fill_(~_final_mask(seq_idx, w), 0)


def _add_final_states(dx: Tensor, dbefore: Tensor | None, dfinal: Tensor, seq_idx: Tensor | None, w: int) -> None:
    """Adds the gradient of the final states, which are the last inputs."""
    if seq_idx is not None:
        dfinal = dfinal.masked_fill(~_final_mask(seq_idx, w), 0)
    l = dx.shape[2]
    kept = min(l, w - 1)
    dx[..., l - kept :] += dfinal[..., w - 1 - kept :]
    if dbefore is not None and kept < w - 1:
        dbefore[..., kept:] += dfinal[..., : w - 1 - kept]
