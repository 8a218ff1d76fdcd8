"""A whole mixer over sequences, forward and backward, and its decode step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.mamba_mixer import cases

from .. import inputs, peers
from ..measure import worst_error
from .common import Parts, Problem, Values, backends, backward, dtype_of, forward, in_place, leaves, made, nbytes, sizes

PREFIX = 256
"""Positions of the first row that are checked, and that have an upstream gradient."""

LONGEST_FALLBACK = 4096
"""Tokens up to which transformers' plain torch is timed: beyond it what it holds grows out of bounds."""


def problems(device: torch.device) -> Parts:
    parts = [
        partial(_sequence, device, *each) for each in enumerate(sizes(device, cases.GPU_SEQUENCE, cases.SMALL[1:2]))
    ]
    return Parts(parts + [partial(_step, device, case) for case in sizes(device, cases.GPU_STEP, cases.SMALL[1:2])])


def _sequence(device: torch.device, number: int, case: cases.Case) -> Iterator[Problem]:
    dtype = dtype_of(device)
    values = made(device, lambda: {"zxbcdt": cases.rows(case, dtype), **cases.weights(case, torch.float32)})
    options = {"headdim": case.p, "ngroups": case.g, "chunk_size": 256, "norm_before_gate": False}
    row = values["zxbcdt"]
    few = inputs.double(values | {"zxbcdt": row[:1, :PREFIX]})

    def ours(v: Values, name: str) -> Tensor:
        return kernels.mamba_split_conv1d_scan_combined(**v, **options, backend=name)

    def theirs(v: Values) -> Tensor:
        return import_module("mamba_ssm.ops.triton.ssd_combined").mamba_split_conv1d_scan_combined(**v, **options)

    def error(y: Tensor) -> float:
        return worst_error((y[:1, :PREFIX],), (ours(few, "reference"),))

    def gradient_error(found: tuple[Tensor, ...]) -> float:
        own = leaves(few)
        exact = torch.autograd.grad(ours(own, "reference"), list(own.values()), upstream[:1, :PREFIX].double())
        return worst_error((found[0][:1, :PREFIX], *found[1:]), exact)

    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device, case.b * case.l)} | {
        "mamba_ssm": theirs
    }
    if case.b * case.l <= LONGEST_FALLBACK:
        fallback = functools.cache(lambda: peers.mixer(case.p, case.g))
        functions[peers.label()] = lambda v: fallback()(**v)
    upstream = torch.zeros(case.b, case.l, case.dim, dtype=dtype, device=device)
    upstream[:1, :PREFIX] = torch.randn_like(upstream[:1, :PREFIX])
    moved, flops = nbytes(row, upstream), inputs.scan_flops(case.b, case.l, case.h)
    bound = inputs.BOUND[dtype]
    yield Problem("mamba_mixer sequence", str(case), moved, flops, forward(functions, values), error, bound,
                  energy=not number)  # fmt: skip
    yield Problem("mamba_mixer sequence backward", str(case), moved + nbytes(row), 2 * flops,
                  backward(functions, values, upstream), gradient_error, 3 * bound)  # fmt: skip


def _step(device: torch.device, case: cases.Case) -> Problem:
    dtype = dtype_of(device)
    values = made(device, lambda: {"zxbcdt": cases.rows(case, dtype)[:, 0], **cases.weights(case, torch.float32)})
    states = made(device, lambda: cases.states(case, torch.float32))
    options = {"headdim": case.p, "ngroups": case.g, "norm_before_gate": False}

    def step(v: Values, states: Values, name: str) -> Tensor:
        return kernels.mamba_mixer_step(**v, **states, **options, backend=name)

    exact = step(inputs.double(values), inputs.double({k: v.clone() for k, v in states.items()}), "reference")
    calls = {name: lambda name=name: lambda: step(values, states, name) for name in backends(device)}
    calls[peers.label()] = lambda: functools.partial(peers.mixer_step(case.p, case.g), **values, **states)
    moved = 2 * nbytes(*states.values()) + nbytes(values["zxbcdt"])
    return Problem("mamba_mixer step", str(case), moved, 0.0, in_place(calls, *states.values()),
                   lambda y: worst_error((y,), (exact,)), inputs.BOUND[dtype])  # fmt: skip
