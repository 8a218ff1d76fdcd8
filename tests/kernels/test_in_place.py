"""The functions that change states in place: autograd hears of it, and no two rows of a state may share memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import same_bits
from torch import Tensor

from omnimamba_kernels import add_rmsnorm, causal_conv1d_update, mamba_mixer_step, selective_state_update

B, H, P, N, W = 2, 3, 4, 5, 4
DIM = H * P


def conv(state: Tensor) -> Tensor:
    return causal_conv1d_update(torch.ones(B, DIM), state, torch.ones(DIM, W), activation="silu")


def scan(state: Tensor) -> Tensor:
    x, bc = torch.ones(B, H, P), torch.ones(B, 1, N)
    return selective_state_update(state, x, x, -torch.ones(H, P, N), bc, bc)


def scan_without_heads(state: Tensor) -> Tensor:
    x, bc = torch.ones(B, DIM), torch.ones(B, N)
    return selective_state_update(state, x, x, -torch.ones(DIM, N), bc, bc)


def step(conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    channels, head = DIM + 2 * N, torch.ones(H)
    row = torch.ones(B, DIM + channels + H)
    return mamba_mixer_step(row, conv_state, ssm_state, torch.ones(channels, W), None, head, -head, head, headdim=P)


def step_conv(state: Tensor) -> Tensor:
    return step(state, torch.zeros(B, H, P, N))


def step_scan(state: Tensor) -> Tensor:
    return step(torch.zeros(B, DIM + 2 * N, W), state)


def add(state: Tensor) -> Tensor:
    return add_rmsnorm(state, torch.ones(B, DIM), torch.ones(DIM))


CASES = {
    add: (DIM,),
    conv: (DIM, W),
    scan: (H, P, N),
    scan_without_heads: (DIM, N),
    step_conv: (DIM + 2 * N, W),
    step_scan: (H, P, N),
}
over_cases = pytest.mark.parametrize("function, shape", CASES.items(), ids=[f.__name__ for f in CASES])


@over_cases
def test_a_gradient_through_an_overwritten_state_is_refused(run, function: Callable[[Tensor], Tensor], shape):
    state = torch.randn(B, *shape)
    weight = torch.randn(B, *shape, requires_grad=True)
    loss = (weight * state).sum()
    function(state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over_cases
def test_a_state_whose_rows_share_memory_is_refused_untouched(run, function: Callable[[Tensor], Tensor], shape):
    row = torch.randn(1, *shape)
    before = row.clone()
    with pytest.raises(ValueError, match="(state|residual): got strides .* share memory"):
        function(row.expand(B, *shape))
    assert same_bits(row, before)


@over_cases
def test_elements_that_share_memory_at_other_strides_are_refused_untouched(run, function, shape):
    memory = torch.randn(999)
    before = memory.clone()
    with pytest.raises(ValueError, match="(state|residual): got strides .* share memory"):
        function(memory.as_strided((B, *shape), (1, *torch.empty(shape).stride())))
    assert same_bits(memory, before)


def test_elements_apart_in_no_order_of_slices_are_welcome(run):
    """Strides 2 and 3 of a 2 x 2: places 0, 2, 3 and 5."""
    state = torch.zeros(6).as_strided((2, 1, 2), (2, 1, 3))
    x, row = torch.ones(2, 1), torch.ones(2, 2)
    selective_state_update(state, x, x, -row[:1], row, row)
    assert same_bits(state, torch.ones(2, 1, 2))


@over_cases
def test_inference_tensors_are_welcome(run, function: Callable[[Tensor], Tensor], shape):
    with torch.inference_mode():
        state = torch.zeros(B, *shape)
        function(state)
        assert state.any()
