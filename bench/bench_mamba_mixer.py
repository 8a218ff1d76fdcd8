"""A whole mixer between its projections: a sequence at once, its backward, and one decode step. The peer is what
transformers' mixer does there, by its own functions."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

from omnimamba_kernels import mamba_mixer_step, mamba_split_conv1d_scan_combined

from . import inputs, peers
from .measure import Contender, Work, worst_error
from .rates import product

SPLIT, TRAINING, STEP = "mamba_mixer sequence", "mamba_mixer sequence + backward", "mamba_mixer step"
LAYERS = 24
SLICE, LAST = 256, 16
"""Positions at the beginning of every row that a check compares, and at the end of the last one."""
full = pytest.mark.full


def width(h: int) -> int:
    return 2 * h * inputs.HEADDIM + 2 * inputs.STATE + h


SEQUENCES = [
    (1, 1024, 24, torch.float32),
    *(
        pytest.param(*case, marks=full)
        for case in (
            (1, 4096, 24, torch.float32),
            (4, 1024, 24, torch.float32),
            (1, 1024, 24, torch.bfloat16),
            (1, 1024, 24, torch.float16),
        )
    ),
]
NOTE = "FLOPs of the scan alone"


def case(b: int, l: int, h: int, dtype: torch.dtype) -> str:
    return f"{b} x {l}, {h} heads{inputs.suffix(dtype)}"


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return y[:, :SLICE], y[-1:, -LAST:]


def tensors(values: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def functions(weights: dict, own: list[str]) -> dict[str, Callable[[], Callable[..., torch.Tensor]]]:
    """What makes each contender's function of the row and the weights."""
    options = {name: value for name, value in weights.items() if name not in tensors(weights)}
    ours = partial(mamba_split_conv1d_scan_combined, chunk_size=inputs.CHUNK, **options)
    found = {name: lambda name=name: partial(ours, backend=name) for name in own}
    return found | {peers.label(): functools.cache(lambda: peers.mixer(inputs.HEADDIM, options["ngroups"]))}


@pytest.mark.parametrize(("b", "l", "h", "dtype"), SEQUENCES)
def test_sequence(bench, benchmark, b, l, h, dtype):
    """Checked at both ends. The reference is timed in the first case only."""
    row, weights = drawn(b, l, width(h), dtype=dtype, seed=l), inputs.mixer(h)
    run = torch.no_grad()(lambda make, row, weights: make()(row, **tensors(weights)))
    own = inputs.own_backends() if (b, l, h, dtype) == SEQUENCES[0] else inputs.own_backends()[:1]
    made = functions(weights, own)
    exact = run(functions(weights, ["reference"])["reference"], row.double(), inputs.double(weights))
    contenders = [
        Contender(
            name,
            lambda make=make: run(make, row, weights),
            lambda make=make: worst_error(ends(run(make, row, weights)), ends(exact)),
            inputs.BOUND[dtype],
        )
        for name, make in made.items()
    ]
    moved = row.element_size() * b * l * (width(h) + h * inputs.HEADDIM)
    work = Work(product(dtype), bytes=float(moved), flops=inputs.scan_flops(b, l, h))
    bench.compare(benchmark, SPLIT, case(b, l, h, dtype), contenders, work, note=NOTE, peaks=True)


@full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(bench, benchmark, dtype, b=1, l=1024, h=24):
    """Gradients of the row, checked at both ends, and of every weight."""
    weights, upstream = inputs.mixer(h), drawn(b, l, h * inputs.HEADDIM, dtype=dtype)
    values = {"zxbcdt": drawn(b, l, width(h), dtype=dtype, seed=l), **tensors(weights)}

    def run(make, values, upstream):
        return inputs.gradients(make(), inputs.with_gradients(values), upstream)

    exact = run(functions(weights, ["reference"])["reference"], inputs.double(values), upstream.double())

    def parts(found):
        y, gradient, *others = found
        return *ends(y), *ends(gradient), *others

    def error(make):
        return worst_error(parts(run(make, values, upstream)), parts(exact))

    own = inputs.own_backends() if dtype == torch.float32 else inputs.own_backends()[:1]
    contenders = [
        Contender(
            name, lambda make=make: run(make, values, upstream), lambda make=make: error(make), inputs.BOUND[dtype]
        )
        for name, make in functions(weights, own).items()
    ]
    work = Work(product(dtype), flops=3 * inputs.scan_flops(b, l, h))
    bench.compare(benchmark, TRAINING, case(b, l, h, dtype), contenders, work, note=NOTE, peaks=True)


@pytest.mark.parametrize(
    ("b", "h", "dtype"),
    [(1, 24, torch.float32), *(pytest.param(16, 64, dtype, marks=full) for dtype in (torch.float32, torch.bfloat16))],
)
def test_step(bench, benchmark, b, h, dtype):
    """24 pairs of states in turn, as the layers of a model have them; the scan's in fp32 whatever the row is."""
    weights, row = inputs.mixer(h), drawn(b, width(h), dtype=dtype, seed=b)
    states = (
        drawn(b, h * inputs.HEADDIM + 2 * inputs.STATE, inputs.WIDTH - 1, dtype=dtype, seed=1),
        drawn(b, h, inputs.HEADDIM, inputs.STATE, seed=2),
    )
    known = tuple(state.double() for state in states)
    exact = mamba_mixer_step(row.double(), *known, **inputs.double(weights), backend="reference")

    @functools.cache
    def transformers():
        step = peers.mixer_step(inputs.HEADDIM, weights["ngroups"])
        return lambda *arguments: step(*arguments, **tensors(weights))

    def contender(name, make):
        turn = itertools.cycle([copy.deepcopy(states) for _ in range(LAYERS)])

        def check():
            mine = copy.deepcopy(states)
            return worst_error((make()(row, *mine), *mine), (exact, *known))

        return Contender(name, lambda: make()(row, *next(turn)), check, inputs.BOUND[dtype])

    ours = {
        name: lambda name=name: partial(mamba_mixer_step, **weights, backend=name) for name in inputs.own_backends()
    }
    contenders = [contender(name, make) for name, make in {**ours, peers.label(): transformers}.items()]
    moved = 2 * sum(state.nbytes for state in states)
    work = Work("copy", bytes=moved, footprint=LAYERS * moved)
    bench.compare(benchmark, STEP, f"{b} x {h} heads{inputs.suffix(dtype)}", contenders, work, peaks=True)
