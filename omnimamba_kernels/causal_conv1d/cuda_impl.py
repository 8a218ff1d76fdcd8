"""The CUDA kernels of the depthwise causal convolution (csrc/causal_conv1d/cuda*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .layout import add_final_states, empty_like, final_states, laid_out, like, sizes


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return cuda.cannot_take(*tensors)


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
    before = None if initial_states is None else like(initial_states.to(x.dtype), x)
    y = empty_like(x)
    cuda.call(
        "causal_conv1d_forward",
        x.device,
        x=x,
        weight=weight.float().t().contiguous(),
        bias=None if bias is None else bias.float().contiguous(),
        initial_states=before,
        seq_idx=seq_idx,
        y=y,
        **sizes(x, w, activation),
    )
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
    dx = empty_like(x)
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
            seq_idx=seq_idx,
            dy=like(dy, x),
            dx=dx,
            dinitial_states=dbefore,
            dweight=dweight,
            dbias=dbias,
            **sizes(x, w, activation),
        )
        floats = cuda.call("causal_conv1d_workspace", x.device, **arguments)
        workspace = x.new_empty(floats, dtype=torch.float32)
        cuda.call("causal_conv1d_backward", x.device, workspace=workspace, **arguments)
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
    cuda.call(
        "causal_conv1d_update",
        x.device,
        x=x,
        conv_state=conv_state,
        weight=weight.float(),
        bias=None if bias is None else bias.float(),
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
        y=y,
        batch=b,
        slots=conv_state.shape[0],
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
    cuda.call(
        "causal_conv1d_varlen_states", x.device, x=x, cu_seqlens=cu_seqlens, states=states, total=x.shape[0],
        sequences=sequences, channels=d, state_len=state_len,
    )  # fmt: skip
    return states
