"""The scan's decode step: the state is read and written once, everything else is small."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from omnimamba_kernels import selective_state_update

from . import inputs, peers, plain
from .measure import Contender, Work, worst_error

LAYERS = 24
GROUP = "state_update"


def problem(b: int, h: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One position of a scan as the mixer passes it: dt, A, D and dt_bias expanded over the width of a head."""
    values = inputs.scan(b, 1, h, dtype=dtype)
    p, n = inputs.HEADDIM, inputs.STATE
    return {
        "x": values["x"][:, 0],
        "dt": values["dt"][:, 0, :, None].expand(b, h, p),
        "A": values["A"][:, None, None].expand(h, p, n),
        "B": values["B"][:, 0],
        "C": values["C"][:, 0],
        "D": values["D"][:, None].expand(h, p),
        "dt_bias": values["dt_bias"][:, None].expand(h, p),
    }


CASES = [
    (1, 24, torch.float32),
    *(pytest.param(16, 64, dtype, marks=pytest.mark.full) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("b", "h", "dtype"), CASES)
def test_update(bench, benchmark, b, h, dtype):
    """24 states in turn, as the layers of a model have them, in fp32 whatever the inputs are."""
    values = problem(b, h, dtype)
    state = torch.randn(b, h, inputs.HEADDIM, inputs.STATE, generator=torch.Generator().manual_seed(0))
    known = state.double()
    exact = selective_state_update(known, **inputs.double(values), dt_softplus=True, backend="reference")

    def contender(name, make):
        turn = itertools.cycle([state.clone() for _ in range(LAYERS)])

        def check():
            mine = state.clone()
            return worst_error((make()(mine, **values), mine), (exact, known))

        return Contender(name, lambda: make()(next(turn), **values), check, inputs.BOUND[dtype])

    own = [
        (name, lambda name=name: lambda s, **v: selective_state_update(s, **v, dt_softplus=True, backend=name))
        for name in inputs.own_backends()
    ]

    @functools.cache
    def transformers():
        update = peers.fallback("mamba2_selective_state_update")
        return torch.no_grad()(lambda s, x, **v: update(s, x, **v, dt_softplus=True))

    contenders = [
        contender(*f)
        for f in [
            *own,
            (peers.label(), transformers),
            *plain.peers(torch.no_grad()(plain.state_update), b == 1 and not bench.quick),
        ]
    ]
    work = Work("copy", bytes=2 * state.nbytes, footprint=2 * LAYERS * state.nbytes)
    bench.compare(benchmark, GROUP, f"{b} x {h} heads{inputs.suffix(dtype)}", contenders, work, peaks=True)
