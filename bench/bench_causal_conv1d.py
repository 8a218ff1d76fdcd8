"""The depthwise causal convolution with SiLU: over channel-last slices of wider rows, and one decode step."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from omnimamba_kernels import causal_conv1d_fn, causal_conv1d_update

from . import inputs, peers, plain
from .measure import Contender, Work, worst_error

SHAPES = ((1, 4096, 1792), (1, 1024, 4352))
FORWARD, BACKWARD, UPDATE = "causal_conv1d forward", "causal_conv1d backward", "causal_conv1d update"
BOUND = inputs.BOUND
full = pytest.mark.full


CASES = [
    (SHAPES[0], torch.float32),
    pytest.param(SHAPES[1], torch.float32, marks=full),
    pytest.param((4, 1024, 1792), torch.float32, marks=full),
    *(pytest.param(SHAPES[0], dtype, marks=full) for dtype in (torch.bfloat16, torch.float16)),
]


def case(b: int, l: int, d: int, dtype: torch.dtype = torch.float32) -> str:
    return f"{b} x {l} x {d}{inputs.suffix(dtype)}"


def problem(b: int, l: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """x (b, d, l) as a channel-last slice of a row half as wide again, weight, bias."""
    make = torch.Generator().manual_seed(d)
    row = torch.randn(b, l, d + d // 2, generator=make).to(dtype)
    return {
        "x": row[..., d // 2 :].transpose(1, 2),
        "weight": 0.5 * torch.randn(d, inputs.WIDTH, generator=make).to(dtype),
        "bias": 0.1 * torch.randn(d, generator=make).to(dtype),
    }


def functions(compile_too: bool) -> list[tuple[str, object]]:
    own = [
        (name, lambda name=name: lambda **v: causal_conv1d_fn(**v, activation="silu", backend=name))
        for name in inputs.own_backends()
    ]

    @functools.cache
    def transformers():
        convolve = peers.fallback("causal_conv1d_fn")
        return lambda x, **v: convolve(x, **v, activation="silu")

    return [*own, (peers.label(), transformers), *plain.peers(plain.conv, compile_too)]


def reference(**values):
    return causal_conv1d_fn(**values, activation="silu", backend="reference")


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward(bench, benchmark, shape, dtype):
    values = problem(*shape, dtype)
    exact = reference(**inputs.double(values))

    def contender(name, make):
        return Contender(
            name,
            torch.no_grad()(lambda: make()(**values)),
            lambda: worst_error((make()(**values),), (exact,)),
            BOUND[dtype],
        )

    work = Work("copy", bytes=2 * values["x"].nbytes)
    rows = bench.compare(
        benchmark,
        FORWARD,
        case(*shape, dtype),
        [contender(*f) for f in functions((shape, dtype) == CASES[0] and not bench.quick)],
        work,
        peaks=True,
        judged=(shape, dtype) == CASES[0],
    )
    bench.against_dram(benchmark, rows, work)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_backward(bench, benchmark, shape, dtype):
    """The backward alone, on a graph that is kept; it reads x and the output's gradient and writes x's."""
    values = problem(*shape, dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    exact = inputs.gradients(reference, inputs.with_gradients(inputs.double(values)), upstream.double())

    work = Work("copy", bytes=3 * values["x"].nbytes)
    rows = bench.compare(
        benchmark,
        BACKWARD,
        case(*shape, dtype),
        [
            inputs.backward_alone(*f, values, upstream, exact, BOUND[dtype])
            for f in functions((shape, dtype) == CASES[0] and not bench.quick)
        ],
        work,
        peaks=True,
    )
    bench.against_dram(benchmark, rows, work)


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, torch.float32), *(pytest.param(64, dtype, marks=full) for dtype in (torch.float32, torch.bfloat16))],
)
def test_update(bench, benchmark, batch, dtype):
    """One step of 24 layers in turn, each with its own state, as a model decodes."""
    d, layers = 1792, 24
    values = problem(1, batch, d, dtype)
    x, weight, bias = values["x"][0].T.contiguous(), values["weight"], values["bias"]
    states = [
        torch.randn(batch, d, inputs.WIDTH - 1, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i in range(layers)
    ]
    exact = causal_conv1d_update(
        x.double(), states[0].double(), weight.double(), bias.double(), activation="silu", backend="reference"
    )

    def contender(name, make):
        mine = [state.clone() for state in states]
        turn = itertools.cycle(mine)
        return Contender(
            name,
            lambda: make()(x, next(turn), weight, bias),
            lambda: worst_error((make()(x, states[0].clone(), weight, bias),), (exact,)),
            BOUND[dtype],
        )

    own = [
        (name, lambda name=name: lambda *a: causal_conv1d_update(*a, activation="silu", backend=name))
        for name in inputs.own_backends()
    ]

    @functools.cache
    def transformers():
        update = peers.fallback("causal_conv1d_update")
        return lambda x, *a: update(x[..., None], *a, activation="silu")[..., 0]

    moved = x.element_size() * batch * d * (2 + 2 * (inputs.WIDTH - 1))
    work = Work("copy", bytes=moved, footprint=layers * moved)
    plainly = (plain.EAGER, lambda: torch.no_grad()(plain.conv_update))
    contenders = [contender(*f) for f in [*own, (peers.label(), transformers), plainly]]
    bench.compare(benchmark, UPDATE, f"{batch} x {d}{inputs.suffix(dtype)}", contenders, work, peaks=True)
