"""The gated RMSNorm as Mamba-2 uses it (gate first), forward and backward."""

from __future__ import annotations

import pytest
import torch

from omnimamba_kernels import rmsnorm_fn

from . import inputs, peers
from .measure import Contender, Work, worst_error

SHAPES = ((1, 4096, 1536), (1, 1024, 4096))
FORWARD, BACKWARD = "gated_norm forward", "gated_norm backward"
BOUND = inputs.BOUND[torch.float32]
full = pytest.mark.full


def case(b: int, l: int, d: int) -> str:
    return f"{b} x {l} x {d}"


def problem(b: int, l: int, d: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(d)
    row = torch.randn(b, l, 2 * d, generator=make)
    return {
        "x": torch.randn(b, l, d, generator=make),
        "z": row[..., :d],
        "weight": 1 + 0.1 * torch.randn(d, generator=make),
    }


def ours(backend: str):
    return lambda x, z, weight: rmsnorm_fn(x, weight, None, z, 1e-5, norm_before_gate=False, backend=backend)


def functions():
    def transformers():
        kind = peers.fallback("MambaRMSNormGated")

        def call(x, z, weight):
            norm = kind(x.shape[-1], group_size=x.shape[-1], eps=1e-5)
            return torch.func.functional_call(norm, {"weight": weight}, (x, z))

        return call

    return [*((name, lambda name=name: ours(name)) for name in inputs.own_backends()), (peers.label(), transformers)]


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=full)], ids=str)
def test_forward(bench, benchmark, shape):
    values = problem(*shape)
    exact = ours("reference")(**inputs.double(values))

    def contender(name, make):
        run = torch.no_grad()(lambda: make()(**values))
        return Contender(name, run, lambda: worst_error((make()(**values),), (exact,)), BOUND)

    work = Work("copy", bytes=3 * values["x"].nbytes)
    rows = bench.compare(benchmark, FORWARD, case(*shape), [contender(*f) for f in functions()], work)
    bench.against_dram(benchmark, rows, work)


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=full)], ids=str)
def test_backward(bench, benchmark, shape):
    """The backward alone, on a graph that is kept: reads x, z and the output's gradient, writes two gradients."""
    values = problem(*shape)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = inputs.gradients(ours("reference"), inputs.with_gradients(inputs.double(values)), upstream.double())

    def contender(name, make):
        leaves, graph = inputs.with_gradients(values), []

        def check():
            graph.append(make()(**leaves))
            return worst_error(inputs.gradients(make(), leaves, upstream), exact)

        def run():
            return torch.autograd.grad(graph[0], list(leaves.values()), upstream, retain_graph=True)

        return Contender(name, run, check, BOUND)

    work = Work("copy", bytes=5 * values["x"].nbytes)
    rows = bench.compare(benchmark, BACKWARD, case(*shape), [contender(*f) for f in functions()], work)
    bench.against_dram(benchmark, rows, work)
