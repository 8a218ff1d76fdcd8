"""Public functions of the depthwise causal convolution: the names and arguments of the causal-conv1d package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import autograd, checks
from ..backends import choose
from ..compile import traceable
from .layout import empty_like


def _check_filter(weight: Tensor, bias: Tensor | None, channels: int, activation: str | None) -> None:
    checks.rank("weight", weight, 2, letters="(d, w)")
    checks.shape("weight", weight, channels, None, letters="(d, w)")
    checks.one_of("weight's width w", weight.shape[1], 2, 3, 4)
    checks.shape("bias", bias, channels, letters="(d,)")
    checks.one_of("activation", activation, None, "silu", "swish")


@checks.once_a_kind
def _check(x, weight, bias, seq_idx, initial_states, final_states_out, activation) -> None:
    checks.rank("x", x, 3, letters="(b, d, l)")
    b, d, l = x.shape
    _check_filter(weight, bias, d, activation)
    w = weight.shape[1]
    checks.shape("seq_idx", seq_idx, b, l, letters="(b, l)")
    checks.shape("initial_states", initial_states, b, d, w - 1, letters="(b, d, w - 1)")
    checks.shape("final_states_out", final_states_out, b, d, w - 1, letters="(b, d, w - 1)")
    checks.floating(x=x, weight=weight, bias=bias, initial_states=initial_states, final_states_out=final_states_out)
    checks.integer(seq_idx=seq_idx)
    checks.same_device(
        x=x, weight=weight, bias=bias, seq_idx=seq_idx, initial_states=initial_states, final_states_out=final_states_out
    )


def _fake(x, weight, bias, initial_states, seq_idx, activation, return_final_states, backend) -> list[Tensor]:
    b, d, _ = x.shape
    final = torch.empty(b, d, weight.shape[1] - 1, dtype=x.dtype, device=x.device)
    return [empty_like(x), final] if return_final_states else [empty_like(x)]


@traceable(_fake)
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    activation: bool,
    return_final_states: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    tensors = (x, weight, bias, initial_states, seq_idx)
    options = {"activation": activation, "return_final_states": return_final_states}
    y, final = autograd.run(choose("causal_conv1d", backend, *tensors, **options), *tensors, **options)
    return (y, final) if return_final_states else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, with an optional SiLU.

    ``y[b, d, t] = act(bias[d] + sum_k weight[d, k] x[b, d, t - (w - 1) + k])``

    Args:
        x: (b, d, l), any strides; channel-last views are the fast case.
        weight: (d, w), w from 2 to 4.
        bias: (d,).
        seq_idx: (b, l) integers naming the sequence of each position; taps never cross from one into another and the
            output of a negative index (padding) is 0.
        initial_states: (b, d, w - 1), the inputs before the first; with ``seq_idx`` they belong to the sequence of the
            first position, whatever its index.
        return_final_states: also return the last w - 1 inputs (b, d, w - 1), to continue from.
        final_states_out: a tensor that receives the final states in place.
        activation: None, "silu" or "swish".
        backend: one of ``backends()``; None chooses.

    Returns:
        y like x, or (y, final_states). Gradients reach x, weight, bias and initial_states, through both outputs.

    Raises:
        ValueError: a shape or width does not fit. TypeError: a dtype does not. RuntimeError: the backend cannot run.

    Source: Mamba (arXiv 2312.00752), section 3.4; the function of the same name in causal-conv1d.
    """
    _check(x, weight, bias, seq_idx, initial_states, final_states_out, activation)
    if final_states_out is not None:
        checks.writable(final_states_out=final_states_out)
    asked = return_final_states or final_states_out is not None
    outputs = _causal_conv1d(x, weight, bias, initial_states, seq_idx, activation is not None, asked, backend)
    if not asked:
        return outputs
    y, final = outputs
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return (y, final) if return_final_states else y


def _fake_update(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@traceable(_fake_update, mutates=("conv_state",))
@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Continues the convolution from a state, which takes in the new inputs in place. Not differentiable.

    Args:
        x: (b, d) one step, or (b, d, l).
        conv_state: (b or slots, d, state_len), state_len >= w - 1; updated in place.
        weight: (d, w), w from 2 to 4.
        bias: (d,).
        activation: None, "silu" or "swish".
        cache_seqlens: (b,) inputs seen so far: the state is then a ring, x goes to slot cache_seqlens % state_len on.
        conv_state_indices: (b,) the slot of each row; a negative one is padding: output 0, no state touched.
        backend: one of ``backends()``; None chooses.

    Returns:
        y like x.

    Raises:
        ValueError: a shape, width or index does not fit. TypeError: a dtype does not. The state is then untouched.

    Source: the function of the same name in causal-conv1d.
    """
    _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    checks.writable(conv_state=conv_state)
    checks.slots("conv_state_indices", conv_state_indices, conv_state.shape[0])
    checks.in_range("cache_seqlens", cache_seqlens, 0, 2**62)
    module = choose("causal_conv1d", backend, x, weight, bias, conv_state)
    x3 = x if x.dim() == 3 else x.unsqueeze(-1)
    y = module.update(
        x3, conv_state, weight, bias, cache_seqlens, conv_state_indices, activation=activation is not None
    )
    increment_version(conv_state)
    return y if x.dim() == 3 else y.squeeze(-1)


@checks.once_a_kind
def _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices) -> None:
    checks.rank("x", x, 2, 3, letters="(b, d) or (b, d, l)")
    b, d = x.shape[:2]
    _check_filter(weight, bias, d, activation)
    checks.rank("conv_state", conv_state, 3, letters="(slots, d, state_len)")
    slots = b if conv_state_indices is None else conv_state.shape[0]
    checks.shape("conv_state", conv_state, slots, d, None, letters="(slots, d, state_len)")
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: got state_len {conv_state.shape[2]}, expected at least w - 1 = {weight.shape[1] - 1}"
        )
    checks.shape("cache_seqlens", cache_seqlens, b, letters="(b,)")
    checks.shape("conv_state_indices", conv_state_indices, b, letters="(b,)")
    checks.floating(x=x, conv_state=conv_state, weight=weight, bias=bias)
    checks.integer(cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    checks.same_device(
        x=x,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )


def _fake_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int, backend: str | None) -> list[Tensor]:
    return [torch.empty(cu_seqlens.shape[0] - 1, x.shape[1], state_len, dtype=x.dtype, device=x.device)]


@traceable(_fake_varlen_states)
@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int, *, backend: str | None = None) -> Tensor:
    """The convolution states after each of several packed sequences. Not differentiable.

    Args:
        x: (total, d), the sequences one after another.
        cu_seqlens: (sequences + 1,), rising offsets from 0; what comes after the last is padding.
        state_len: how many inputs a state keeps.
        backend: one of ``backends()``; None chooses.

    Returns:
        (sequences, d, state_len): the last inputs of each sequence, right-aligned, zeros before a shorter one.

    Raises:
        ValueError: a shape or the offsets do not fit. TypeError: a dtype does not.

    Source: the function of the same name in causal-conv1d.
    """
    checks.rank("x", x, 2, letters="(total, d)")
    checks.floating(x=x)
    checks.offsets("cu_seqlens", cu_seqlens, x.shape[0])
    checks.same_device(x=x, cu_seqlens=cu_seqlens)
    checks.whole("state_len", state_len, 1)
    module = choose("causal_conv1d", backend, x)
    return module.varlen_states(x, cu_seqlens, state_len=state_len)
