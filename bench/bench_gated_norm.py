"""The gated RMSNorm as Mamba-2 uses it (gate first), forward and backward."""

from __future__ import annotations

import functools

import pytest
import torch

from omnimamba_kernels import rmsnorm_fn

from . import inputs, peers, plain
from .measure import Contender, Work, worst_error

SHAPES = ((1, 4096, 1536), (1, 1024, 4096))
FORWARD, BACKWARD = "gated_norm forward", "gated_norm backward"
BOUND = inputs.BOUND
full = pytest.mark.full
CASES = [
    (SHAPES[0], torch.float32),
    pytest.param(SHAPES[1], torch.float32, marks=full),
    pytest.param((4, 1024, 1536), torch.float32, marks=full),
    *(pytest.param(SHAPES[0], dtype, marks=full) for dtype in (torch.bfloat16, torch.float16)),
]


def case(b: int, l: int, d: int, dtype: torch.dtype = torch.float32) -> str:
    return f"{b} x {l} x {d}{inputs.suffix(dtype)}"


def problem(b: int, l: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """x and z in ``dtype``, the weight in fp32."""
    make = torch.Generator().manual_seed(d)
    row = torch.randn(b, l, 2 * d, generator=make).to(dtype)
    return {
        "x": torch.randn(b, l, d, generator=make).to(dtype),
        "z": row[..., :d],
        "weight": 1 + 0.1 * torch.randn(d, generator=make),
    }


def ours(backend: str):
    return lambda x, z, weight: rmsnorm_fn(x, weight, None, z, plain.EPS, norm_before_gate=False, backend=backend)


def functions(width: int, compile_too: bool):
    transformers = functools.cache(lambda: peers.gated_norm(width, width, plain.EPS))
    own = [(name, lambda name=name: ours(name)) for name in inputs.own_backends()]
    return [*own, (peers.label(), transformers), *plain.peers(plain.gated_norm, compile_too)]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward(bench, benchmark, shape, dtype):
    values = problem(*shape, dtype)
    exact = ours("reference")(**inputs.double(values))

    def contender(name, make):
        run = torch.no_grad()(lambda: make()(**values))
        return Contender(name, run, lambda: worst_error((make()(**values),), (exact,)), BOUND[dtype])

    work = Work("copy", bytes=3 * values["x"].nbytes)
    rows = bench.compare(
        benchmark,
        FORWARD,
        case(*shape, dtype),
        [contender(*f) for f in functions(shape[-1], (shape, dtype) == CASES[0] and not bench.quick)],
        work,
        peaks=True,
    )
    bench.against_dram(benchmark, rows, work)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_backward(bench, benchmark, shape, dtype):
    """The backward alone, on a graph that is kept: reads x, z and the output's gradient, writes two gradients."""
    values = problem(*shape, dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = inputs.gradients(ours("reference"), inputs.with_gradients(inputs.double(values)), upstream.double())

    work = Work("copy", bytes=5 * values["x"].nbytes)
    rows = bench.compare(
        benchmark,
        BACKWARD,
        case(*shape, dtype),
        [
            inputs.backward_alone(*f, values, upstream, exact, BOUND[dtype])
            for f in functions(shape[-1], (shape, dtype) == CASES[0] and not bench.quick)
        ],
        work,
        peaks=True,
    )
    bench.against_dram(benchmark, rows, work)
