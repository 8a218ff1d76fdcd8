"""The compiled CPU kernels of the depthwise causal convolution (csrc/causal_conv1d)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .layout import add_final_states, dense_strides, final_states, laid_out, like, padded_ids, sizes


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
    x = laid_out(x)
    taps = native.stored_as(torch.float32, weight).t().contiguous()
    offset = None if bias is None else native.stored_as(torch.float32, bias).contiguous()
    before = None if initial_states is None else like(initial_states.to(x.dtype), x)
    live = None if seq_idx is None else _live_bits(seq_idx, w)
    y = _new(x)
    native.call(
        "causal_conv1d_forward", x=x, weight=taps, bias=offset, initial_states=before, live=live, y=y,
        **sizes(x, w, activation),
    )  # fmt: skip
    final = final_states(x, before, seq_idx, w) if return_final_states else None
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
    dx = _new(x)
    dbefore = None if initial_states is None else like(x.new_empty(x.shape[0], x.shape[1], w - 1), x)
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
            initial_states=None if initial_states is None else like(initial_states.to(x.dtype), x),
            live=None if seq_idx is None else _live_bits(seq_idx, w),
            dy=like(dy, x),
            dx=dx,
            dinitial_states=dbefore,
            dweight=dweight,
            dbias=dbias,
            **sizes(x, w, activation),
        )
        floats = native.call("causal_conv1d_workspace", **arguments)
        native.call("causal_conv1d_backward", workspace=x.new_empty(floats, dtype=torch.float32), **arguments)
    if dfinal is not None:
        add_final_states(dx, dbefore, dfinal, seq_idx, w)
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
        weight=native.stored_as(torch.float32, weight),
        bias=native.stored_as(torch.float32, bias),
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


def _new(x: Tensor) -> Tensor:
    return native.empty(x.shape, x.dtype, dense_strides(x, x.shape[2]))


def _live_bits(seq_idx: Tensor, w: int) -> Tensor:
    """(b, l) int32: bit j says whether the input j steps back is of the same sequence; none is set in padding."""
    l = seq_idx.shape[1]
    ids = padded_ids(seq_idx, w)
    bits = torch.zeros_like(seq_idx, dtype=torch.int32, memory_format=torch.contiguous_format)
    for j in range(w):
        bits += (ids[:, w - 1 - j : w - 1 - j + l] == seq_idx).int() << j
    return bits * (seq_idx >= 0)
