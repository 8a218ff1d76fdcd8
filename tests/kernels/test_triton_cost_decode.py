"""The cost models of the convolution and of the decode step say what their Triton kernels load and store."""

from __future__ import annotations

import pytest
import torch
from counting import counted, counted_arithmetic

from omnimamba_kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_state_update,
    use_backend,
)
from omnimamba_kernels.causal_conv1d import cases as conv_cases
from omnimamba_kernels.causal_conv1d import cost as conv_cost
from omnimamba_kernels.state_update import cases as update_cases
from omnimamba_kernels.state_update import cost as update_cost
from omnimamba_kernels.triton_launch import INTERPRETER, interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts what the interpreter does: set TRITON_INTERPRET=1")


@pytest.mark.parametrize("case", conv_cases.CASES, ids=lambda c: c.name)
def test_convolution(case):
    tensors, options = case.tensors(torch.float16), case.options
    with use_backend("triton"), counted() as forward, counted_arithmetic() as flops:
        causal_conv1d_fn(**tensors, **options)
    options = {"return_final_states": case.final_states}
    active = {"activation": case.options["activation"] is not None, "target": INTERPRETER}
    assert flops == conv_cost.forward_arithmetic(**tensors, **options, **active)
    assert forward == conv_cost.forward(**tensors, **options, target=INTERPRETER)
    floor, moved = conv_cost.forward_floor(**tensors, **options), forward["forward_kernel"]
    assert moved.loaded >= floor.loaded and moved.stored == floor.stored

    wanted = [t.requires_grad_() for t in tensors.values() if t is not None and t.is_floating_point()]
    with use_backend("triton"):
        found = causal_conv1d_fn(**tensors, **case.options)
        found = found if isinstance(found, tuple) else (found,)
        with counted() as backward, counted_arithmetic() as flops:
            torch.autograd.grad(found, wanted, [torch.ones_like(t) for t in found])
    assert flops == conv_cost.backward_arithmetic(**tensors, **options, **active)
    assert backward == conv_cost.backward(**tensors, **options, target=INTERPRETER)
    floor, moved = conv_cost.backward_floor(**tensors, **options), backward["backward_kernel"]
    assert moved.loaded >= floor.loaded and moved.stored + backward["sum_kernel"].stored >= floor.stored


@pytest.mark.parametrize("l", [1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_update(ring, l):
    x, state = torch.randn(3, 37, l).half(), torch.randn(5, 37, 4)
    tensors = {
        "x": x, "conv_state": state, "weight": torch.randn(37, 4), "bias": torch.randn(37),
        "cache_seqlens": torch.tensor([0, 3, 9]) if ring else None,
        "conv_state_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
    }  # fmt: skip
    with use_backend("triton"), counted() as found, counted_arithmetic() as flops:
        causal_conv1d_update(**tensors, activation="silu")
    assert flops == conv_cost.update_arithmetic(**tensors, target=INTERPRETER, activation=True)
    assert found == conv_cost.update(**tensors, target=INTERPRETER)
    assert found["update_kernel"].stored >= conv_cost.update_floor(**tensors).stored


def test_states_of_packed_sequences():
    tensors = {"x": torch.randn(40, 21).half(), "cu_seqlens": torch.tensor([0, 9, 30, 40], dtype=torch.int32)}
    with use_backend("triton"), counted() as found:
        causal_conv1d_varlen_states(**tensors, state_len=5)
    assert found == conv_cost.varlen_states(**tensors, state_len=5, target=INTERPRETER)


@pytest.mark.parametrize("case", [c for c in update_cases.CASES if c.h], ids=lambda c: c.name)
def test_decode_step(case):
    tensors = case.tensors(torch.float16)
    if case.slots:
        tensors["state_batch_indices"] = tensors["state_batch_indices"].new_tensor(range(case.b))
    with use_backend("triton"), counted() as found, counted_arithmetic() as flops:
        selective_state_update(**tensors, **case.options)
    assert flops == update_cost.forward_arithmetic(**tensors, **case.options, target=INTERPRETER)
    assert found == update_cost.forward(**tensors, target=INTERPRETER)
    floor = update_cost.forward_floor(**tensors)
    assert found["_update"].loaded >= floor.loaded and found["_update"].stored == floor.stored
