"""The cost models say what the kernels load, store and multiply: counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from counting import counted, counted_arithmetic

from omnimamba_kernels import use_backend
from omnimamba_kernels.gated_norm import cases as norm_cases
from omnimamba_kernels.gated_norm import cost as norm_cost
from omnimamba_kernels.gated_norm.api import rmsnorm_fn
from omnimamba_kernels.triton_launch import INTERPRETER, interpreting

interpreted = pytest.mark.skipif(not interpreting(), reason="counts what the interpreter does: set TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", norm_cases.CASES, ids=lambda c: c.name)
def test_gated_norm(case, dtype):
    tensors, options = case.tensors(dtype), case.options
    with use_backend("triton"), counted() as forward, counted_arithmetic() as flops:
        rmsnorm_fn(**tensors, **options)
    assert flops == norm_cost.forward_arithmetic(**tensors, **options, target=INTERPRETER)
    assert forward == norm_cost.forward(**tensors, **options, target=INTERPRETER)
    floor = norm_cost.forward_floor(**tensors)
    assert forward["_forward"].loaded >= floor.loaded and forward["_forward"].stored == floor.stored

    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    with use_backend("triton"):
        y = rmsnorm_fn(**leaves, **options)
        with counted() as backward, counted_arithmetic() as flops:
            y.backward(torch.ones_like(y))
    assert flops == norm_cost.backward_arithmetic(**tensors, **options, target=INTERPRETER)
    assert backward == norm_cost.backward(**tensors, **options, target=INTERPRETER)
    floor = norm_cost.backward_floor(**tensors)
    moved = backward["_backward"] + backward["_total"]
    assert backward["_backward"].loaded >= floor.loaded and moved.stored >= floor.stored
