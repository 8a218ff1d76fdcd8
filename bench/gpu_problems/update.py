"""The decode step of the scan: the state in float32 and in x's type, rows in their own places and found by index."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.state_update import cases

from .. import inputs, peers, plain
from ..measure import worst_error
from .common import Parts, Problem, backends, dtype_of, in_place, made, nbytes, peer, sizes, written_out

OPTIONS = {"dt_softplus": True}


def problems(device: torch.device) -> Parts:
    every = [(case, torch.float32) for case in sizes(device, cases.GPU, cases.CASES[1:2])]
    case = sizes(device, cases.GPU[2:3], cases.CASES[1:2])[0]
    every += [
        (case, torch.bfloat16 if dtype_of(device) is torch.bfloat16 else torch.float16),
        (dataclasses.replace(case, name=f"{case.name}, by index", slots=2 * case.b), torch.float32),
        (dataclasses.replace(case, name=f"{case.name}, nothing tied", tied=False), torch.float32),
    ]
    return Parts(functools.partial(_problem, device, *each) for each in every)


def _eager(state: Tensor, x: Tensor, z: Tensor, **values: Tensor) -> Tensor:
    return plain.state_update(state, x, **values) * F.silu(z)


def _problem(device: torch.device, case: cases.Case, state_dtype: torch.dtype) -> Problem:
    values = made(device, lambda: case.tensors(dtype_of(device), state_dtype))
    values = {k: v for k, v in values.items() if v is not None}
    state, x = values.pop("state"), values["x"]
    if "state_batch_indices" in values:  # no padding, which the peers do not all know
        values["state_batch_indices"] = torch.randperm(case.slots, device=device)[: case.b].to(torch.int32)
    exact = kernels.selective_state_update(state.double(), **inputs.double(values), **OPTIONS, backend="reference")
    others = {k: v for k, v in values.items() if k != "x"}

    calls = {
        name: lambda name=name: lambda: kernels.selective_state_update(state, **values, **OPTIONS, backend=name)
        for name in backends(device)
    }
    calls["mamba_ssm"] = peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update", state,
                              **values, **OPTIONS)  # fmt: skip
    calls["flashinfer"] = peer("flashinfer.mamba", "selective_state_update", state, **values, **OPTIONS)
    if not case.slots:
        calls[peers.label()] = lambda: functools.partial(
            peers.fallback("mamba2_selective_state_update"), state, x, **others, **OPTIONS
        )
        for who, function in written_out(device, _eager, state_dtype is torch.float32 and case.tied).items():
            calls[who] = lambda function=function: lambda: function(state, **values)
    moved = 2 * nbytes(x) + (2 * nbytes(state) * case.b / state.shape[0])
    moved += 0 if case.tied else nbytes(*(values[k] for k in ("dt", "A", "D", "dt_bias")))
    name = f"{case.name}, state {str(state_dtype).removeprefix('torch.')}"
    return Problem("state_update", name, moved, 0.0, in_place(calls, state),
                   lambda y: worst_error((y,), (exact,)), inputs.BOUND[dtype_of(device)],
                  energy=state_dtype is not torch.float32)  # fmt: skip
