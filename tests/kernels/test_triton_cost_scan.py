"""The cost model of the scan says what its Triton kernels load, store and multiply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from counting import counted, counted_exponentials

from omnimamba_kernels import mamba_chunk_scan_combined, use_backend
from omnimamba_kernels.cost import Cost
from omnimamba_kernels.report.calls import Made
from omnimamba_kernels.ssd_scan import cost
from omnimamba_kernels.ssd_scan.cases import CASES, GPU, Case
from omnimamba_kernels.triton_launch import INTERPRETER, TARGETS, interpreting

interpreted = pytest.mark.skipif(not interpreting(), reason="counts what the interpreter does: set TRITON_INTERPRET=1")
COUNTED = (
    *CASES[:3],
    Case("segments", 1, 200, 2, 37, n=70, skip=1, gate=True, initial_states=True, sequences="seq_idx"),
    Case("whole chunks", 1, 128, 4, 16, g=2, n=16),
    Case("four segments", 1, 460, 1, 16, initial_states=True),
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", COUNTED, ids=lambda c: c.name)
def test_scan(case, dtype):
    tensors = case.tensors(dtype) | {"cu_seqlens": None}
    tensors["A"] = tensors["A"] * 1e-3  # states fade slowly
    if case.sequences:
        tensors["seq_idx"] = torch.zeros(case.b, case.l, dtype=torch.int64)
    options = case.options | {"return_varlen_states": False}
    read = {k: t for k, t in tensors.items() if k != "cu_seqlens"}
    with use_backend("triton"), counted() as inference:
        mamba_chunk_scan_combined(**tensors, **options)
    assert inference == cost.forward(**read, target=INTERPRETER)

    leaves = {k: t.requires_grad_() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
    with use_backend("triton"), counted() as forward:
        outputs = mamba_chunk_scan_combined(**leaves, **options)
    assert forward == cost.forward(**read, target=INTERPRETER, save=True)
    with use_backend("triton"), counted() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    assert backward == cost.backward(**read, target=INTERPRETER)
    for found, floor in ((inference, cost.forward_floor(**read)), (backward, cost.backward_floor(**read))):
        total = sum(found.values(), Cost())
        assert all(getattr(total, f.name) >= getattr(floor, f.name) for f in dataclasses.fields(Cost))


@interpreted
@pytest.mark.parametrize("ends", [[0, 70, 75, 75, 200], [0, 0, 64, 130], [0]], ids=str)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
def test_packed_scan(ends, states):
    case = Case("packed", 1, 200, 2, 37, n=35, skip=1, gate=True, initial_states=True, sequences="cu_seqlens")
    tensors = case.tensors(torch.float16) | {"cu_seqlens": torch.tensor(ends)}
    tensors["A"] = tensors["A"] * 1e-3
    options = case.options | {"return_varlen_states": states}
    with use_backend("triton"), counted() as found:
        mamba_chunk_scan_combined(**tensors, **options)
    assert found == cost.forward(**tensors, target=INTERPRETER, varlen_states=states)
    leaves = {k: t.requires_grad_() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
    with use_backend("triton"):
        outputs = mamba_chunk_scan_combined(**leaves, **options)
        with counted() as backward:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    assert backward == cost.backward(**tensors, target=INTERPRETER, varlen_states=states)


@interpreted
@pytest.mark.parametrize("case", COUNTED[3:], ids=lambda c: c.name)
def test_exponentials_of_the_scan(case):
    tensors = case.tensors() | {"cu_seqlens": None}
    tensors["A"] = tensors["A"] * 1e-3
    if case.sequences:
        tensors["seq_idx"] = torch.zeros(case.b, case.l, dtype=torch.int64)
    with use_backend("triton"), counted_exponentials("ssd_walk") as found:
        mamba_chunk_scan_combined(**tensors, **case.options | {"return_varlen_states": False})
    assert found == [cost.walk_exponentials(**tensors, target=INTERPRETER)]


@pytest.mark.parametrize("case", GPU, ids=lambda c: c.name)
def test_exponentials_do_not_bound_the_scan(case):
    """On Hopper: 16 exponentials and 4096 FLOPs a clock and multiprocessor."""
    with Made("meta"):
        tensors = case.tensors(torch.bfloat16)
    tensors.pop("cu_seqlens")
    flops = cost.forward(**tensors, target=TARGETS["sm_90"])["ssd_walk"].flops
    assert cost.walk_exponentials(**tensors, target=TARGETS["sm_90"]) / 16 < flops / 4096 / 4
