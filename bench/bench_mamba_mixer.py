"""A whole mixer between its projections: a sequence at once, and one decode step."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch

from omnimamba_kernels import mamba_mixer_step, mamba_split_conv1d_scan_combined

from . import inputs
from .measure import Contender, Work, worst_error

SPLIT, TRAINING, STEP = "mamba_mixer sequence", "mamba_mixer sequence + backward", "mamba_mixer step"
LAYERS = 24
SLICE = 256
BOUND = inputs.BOUND[torch.float32]


def width(h: int) -> int:
    return 2 * h * inputs.HEADDIM + 2 * inputs.STATE + h


@pytest.mark.parametrize(("l", "h"), [(1024, 24), pytest.param(4096, 24, marks=pytest.mark.full)])
def test_sequence(bench, benchmark, l, h):
    """Checked on its first positions, which the rest cannot change."""
    row = torch.randn(1, l, width(h), generator=torch.Generator().manual_seed(l))
    weights = inputs.mixer(h)

    def call(row, weights, backend):
        with torch.no_grad():
            return mamba_split_conv1d_scan_combined(row, **weights, chunk_size=inputs.CHUNK, backend=backend)

    exact = call(row[:, :SLICE].double(), inputs.double(weights), "reference")
    contenders = [
        Contender(
            name,
            lambda name=name: call(row, weights, name),
            lambda name=name: worst_error((call(row, weights, name)[:, :SLICE],), (exact,)),
            BOUND,
        )
        for name in inputs.own_backends()
    ]
    work = Work("sgemm", bytes=4.0 * l * (width(h) + h * inputs.HEADDIM), flops=inputs.scan_flops(1, l, h))
    bench.compare(benchmark, SPLIT, f"1 x {l}, {h} heads", contenders, work, note="FLOPs of the scan alone", peaks=True)


@pytest.mark.parametrize(("l", "h"), [pytest.param(1024, 24, marks=pytest.mark.full)])
def test_training(bench, benchmark, l, h):
    """Gradients of the row and of every weight. Checked with an output gradient that is zero after the first positions,
    so that they alone, in fp64, have the same gradients."""
    row = torch.randn(1, l, width(h), generator=torch.Generator().manual_seed(l))
    weights = inputs.mixer(h)
    options = {k: v for k, v in weights.items() if not isinstance(v, torch.Tensor)}
    values = {"zxbcdt": row, **{k: v for k, v in weights.items() if k not in options}}
    upstream = torch.randn(1, l, h * inputs.HEADDIM, generator=torch.Generator().manual_seed(0))

    def run(values, upstream, backend):
        call = partial(mamba_split_conv1d_scan_combined, chunk_size=inputs.CHUNK, backend=backend, **options)
        return inputs.gradients(call, inputs.with_gradients(values), upstream)

    few = upstream.clone()
    few[:, SLICE:] = 0
    exact = run(inputs.double({**values, "zxbcdt": row[:, :SLICE]}), upstream[:, :SLICE].double(), "reference")

    def error(name):
        y, gradient, *rest = run(values, few, name)
        return worst_error((y[:, :SLICE], gradient[:, :SLICE], *rest), exact)

    contenders = [
        Contender(name, lambda name=name: run(values, upstream, name), lambda name=name: error(name), BOUND)
        for name in inputs.own_backends()
    ]
    work = Work("sgemm", flops=3 * inputs.scan_flops(1, l, h))
    bench.compare(
        benchmark, TRAINING, f"1 x {l}, {h} heads", contenders, work, note="FLOPs of the scan alone", peaks=True
    )


@pytest.mark.parametrize(("b", "h"), [(1, 24), pytest.param(16, 64, marks=pytest.mark.full)])
def test_step(bench, benchmark, b, h):
    """24 pairs of states in turn, as the layers of a model have them."""
    make = torch.Generator().manual_seed(b)
    weights = inputs.mixer(h)
    row = torch.randn(b, width(h), generator=make)
    states = (
        torch.randn(b, h * inputs.HEADDIM + 2 * inputs.STATE, inputs.WIDTH - 1, generator=make),
        torch.randn(b, h, inputs.HEADDIM, inputs.STATE, generator=make),
    )
    known = tuple(state.double() for state in states)
    exact = mamba_mixer_step(row.double(), *known, **inputs.double(weights), backend="reference")

    def contender(name):
        turn = itertools.cycle([copy.deepcopy(states) for _ in range(LAYERS)])

        def check():
            mine = copy.deepcopy(states)
            return worst_error((mamba_mixer_step(row, *mine, **weights, backend=name), *mine), (exact, *known))

        return Contender(name, lambda: mamba_mixer_step(row, *next(turn), **weights, backend=name), check, BOUND)

    moved = 2 * sum(state.nbytes for state in states)
    work = Work("copy", bytes=moved, footprint=LAYERS * moved)
    bench.compare(benchmark, STEP, f"{b} x {h} heads", [contender(n) for n in inputs.own_backends()], work, peaks=True)
