"""The Triton kernels of the depthwise causal convolution, started: triton_forward, triton_backward, triton_decode."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import triton_launch
from ..triton_launch import launch, together
from .layout import alignment, channel_last, empty_like
from .triton_backward import backward_kernel, sum_kernel
from .triton_decode import update_kernel, varlen_states_kernel
from .triton_forward import forward_kernel
from .triton_steps import STEPS


def why_not(*tensors: Tensor | None, **_: object) -> str | None:
    return triton_launch.cannot_store(*tensors)


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
    y = empty_like(x)
    final = x.new_empty(b, d, w - 1) if return_final_states else None
    align = alignment(x, y)
    use, tiles_t, tiles_d = _tiles("forward", x, align, triton_launch.target_of(x), return_final_states)
    sizes, strides = _in_units(align, x, y)
    launch(
        forward_kernel, (b * tiles_t * tiles_d,),
        x, weight, bias, initial_states, seq_idx, y, final, *sizes, tiles_t, tiles_d,
        *strides[:3], *weight.stride(), *_strides(bias, 1), *_strides(initial_states, 3), *_strides(seq_idx, 2),
        *strides[3:], WIDTH=w, ACTIVATION=activation, TIME_LAST=not channel_last(x), ALIGN=align, **use,
    )  # fmt: skip
    return (y, final), (x, weight, bias, initial_states, seq_idx) if save else ()


@together()
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
    b, d, l = x.shape
    w = weight.shape[1]
    if dy is None:
        dy = x.new_zeros(1).expand(x.shape)
    dx = empty_like(x)
    dinitial = None if initial_states is None else initial_states.new_empty(b, d, w - 1)
    dweight = weight.new_empty(d, w)
    dbias = None if bias is None else bias.new_empty(d)
    align, target = alignment(x, dy, dx), triton_launch.target_of(x)
    states = initial_states is not None or dfinal is not None
    use, tiles_t, tiles_d = _tiles("backward", x, align, target, states)
    sums = x.new_empty(b * tiles_t, w + 1, d, dtype=torch.float32) if needs[1] or needs[2] else None
    sizes, strides = _in_units(align, x, dy, dx)
    launch(
        backward_kernel, (b * tiles_t * tiles_d,),
        x, weight, bias, initial_states, seq_idx, dy, dfinal, dx, dinitial, sums, *sizes, tiles_t, tiles_d,
        *strides[:3], *weight.stride(), *_strides(bias, 1), *_strides(initial_states, 3), *_strides(seq_idx, 2),
        *_strides(dfinal, 3), *strides[3:],
        WIDTH=w, ACTIVATION=activation, TIME_LAST=not channel_last(x), ALIGN=align, **use,
    )  # fmt: skip
    if sums is None:
        return dx, None, None, dinitial, None
    use = triton_launch.settings("causal_conv1d", "sum", target)
    launch(
        sum_kernel, (triton.cdiv(d, use["BLOCK_C"]), w + 1), sums, dweight, dbias, b * tiles_t, d, WIDTH=w, **use
    )  # fmt: skip
    return dx, dweight, dbias, dinitial, None


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
    state_len = conv_state.shape[2]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    use = triton_launch.settings("causal_conv1d", "update", triton_launch.target_of(x), elements=b * d, length=l)
    tiles_d = triton.cdiv(d, use["BLOCK_D"])
    use["BLOCK_S"] = min(triton.next_power_of_2(state_len), use["BLOCK_S"])
    launch(
        update_kernel, (b * tiles_d,),
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y,
        conv_state.shape[0], d, l, state_len, tiles_d, *x.stride(), *conv_state.stride(), *weight.stride(),
        *_strides(bias, 1), *_strides(cache_seqlens, 1), *_strides(conv_state_indices, 1), *y.stride(),
        WIDTH=weight.shape[1], ACTIVATION=activation, **use,
    )  # fmt: skip
    return y


def varlen_states(x: Tensor, cu_seqlens: Tensor, *, state_len: int) -> Tensor:
    sequences, d = cu_seqlens.shape[0] - 1, x.shape[1]
    states = x.new_empty(sequences, d, state_len)
    use = triton_launch.settings("causal_conv1d", "varlen_states", triton_launch.target_of(x))
    tiles_d, tiles_s = triton.cdiv(d, use["BLOCK_D"]), triton.cdiv(state_len, use["BLOCK_S"])
    launch(
        varlen_states_kernel, (sequences * tiles_d * tiles_s,),
        x, cu_seqlens, states, x.shape[0], d, state_len, tiles_d, tiles_s, *x.stride(), *cu_seqlens.stride(), **use,
    )  # fmt: skip
    return states


def _tiles(kernel: str, x: Tensor, align: int, target: triton_launch.Target, states: bool) -> tuple[dict, int, int]:
    """How to launch, and the number of tiles along the times and along the channels."""
    _, d, l = x.shape
    sizes = dict(time_last=int(not channel_last(x)), states=int(states), length=l, elements=x.numel())
    use = triton_launch.settings("causal_conv1d", kernel, target, **sizes, aligned=align * x.element_size())
    times = use["BLOCK_T"] * use["LOOPS"] * STEPS.value
    return use, max(1, triton.cdiv(l, times)), triton.cdiv(d, use["BLOCK_D"])


def _in_units(align: int, x: Tensor, *others: Tensor) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(channels, length) and the tensors' strides as the kernels take them (triton_steps)."""
    _, d, l = x.shape
    unit = 1 if channel_last(x) else 2
    strides = (step if i == unit else step // align for t in (x, *others) for i, step in enumerate(t.stride()))
    return (d // align, l) if unit == 1 else (d, l // align), tuple(strides)


def _strides(t: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if t is None else t.stride()
