"""Mamba-2's scan, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.ssd_scan import cases

from .. import inputs, peers
from ..measure import worst_error
from ..plain import COMPILED, compiled
from .common import (
    MOST_TOKENS,
    Call,
    Parts,
    Problem,
    Values,
    backends,
    backward,
    compiles,
    dtype_of,
    forward,
    lazily,
    leaves,
    made,
    nbytes,
    sizes,
)

PREFIX = 4096
"""Positions of a sequence that are checked: later ones change nothing before them."""


def problems(device: torch.device) -> Parts:
    return Parts(
        partial(_case, device, number, case) for number, case in enumerate(sizes(device, cases.GPU, cases.CASES[2:3]))
    )


def _case(device: torch.device, number: int, case: cases.Case) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    values, tokens = made(device, lambda: case.tensors(dtype_of(device))), case.b * case.l
    values = {k: v for k, v in values.items() if v is not None}
    options = {"chunk_size": case.chunk, "dt_softplus": True}
    heads = torch.tensor(sorted({0, case.h // 2, case.h - 1}), device=device)
    upstream = torch.zeros_like(values["x"])
    upstream[:1, :PREFIX, heads] = torch.randn_like(upstream[:1, :PREFIX, heads])
    few = _some_heads(values, heads)

    def ours(v: Values, name: str = "") -> Tensor:
        return kernels.mamba_chunk_scan_combined(**v, **options, backend=name)

    def theirs(v: Values) -> Tensor:
        return import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined(**v, **options)

    def plain(v: Values) -> Tensor:
        return peers.fallback("mamba2_chunk_scan")(*(v[k] for k in ("x", "dt", "A", "B", "C")), **options,
                                                   **{k: v.get(k) for k in ("D", "dt_bias")})  # fmt: skip

    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device, tokens)}
    functions |= {"mamba_ssm": theirs} | ({peers.label(): plain} if tokens <= MOST_TOKENS else {})
    if tokens <= MOST_TOKENS and not number and compiles(device):
        functions[COMPILED] = lazily(lambda: compiled(plain))

    def error(y: Tensor) -> float:
        with torch.no_grad():
            return worst_error((y[:1, :PREFIX, heads],), (ours(few, "reference"),))

    def gradient_error(found: tuple) -> float:
        picked = _some_heads(dict(zip(values, found, strict=True)), heads)
        own = upstream[:1, :PREFIX, heads].double()
        exact = inputs.gradients(lambda **w: ours(w, "reference"), leaves(few), own)
        return worst_error(tuple(picked.values()), exact[1:])

    moved, flops = nbytes(values["x"], *values.values()), inputs.scan_flops(case.b, case.l, case.h)
    calls = forward(functions, values) | {"fla, without D": _simple_gla(values)}
    exact_gla = {"fla, without D": lambda y: worst_error(
        (y[0][:1, :PREFIX, heads],), (ours({k: v for k, v in few.items() if k != "D"}, "reference"),))}  # fmt: skip
    yield Problem("ssd_scan forward", case.name, moved, flops, calls, error, bound, exact_gla,
                  energy=not number)  # fmt: skip
    if tokens < 10**6:
        yield Problem("ssd_scan backward", case.name, 2 * moved - nbytes(values["x"]), 2 * flops,
                      backward(functions, values, upstream), gradient_error, 3 * bound)  # fmt: skip


def _some_heads(values: Values, heads: Tensor) -> Values:
    """Three heads of the first row's first positions, in float64; of A, D and dt_bias three heads."""
    short = {k: v[:1, :PREFIX] if v.dim() > 2 else v for k, v in values.items()}
    chosen = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0}
    return inputs.double({k: v.index_select(chosen[k], heads) if k in chosen else v for k, v in short.items()})


def _simple_gla(values: Values) -> Callable[[], Call]:
    """The scan as fla has it: q, k, v and the logarithm of the decay for every head."""

    def make() -> Call:
        function = import_module("fla.ops.simple_gla").chunk_simple_gla
        h, step = values["x"].shape[2], F.softplus(values["dt"].float() + values["dt_bias"])
        q, k = (values[name].repeat_interleave(h // values[name].shape[2], 2).contiguous() for name in "CB")
        v, g = (values["x"] * step[..., None]).to(values["x"].dtype), step * values["A"]
        return torch.no_grad()(lambda: function(q, k, v, g, scale=1.0))

    return make
