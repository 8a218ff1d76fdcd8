"""The gated RMSNorm, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.gated_norm import cases

from .. import inputs, peers
from ..measure import worst_error
from ..plain import EPS, gated_norm
from .common import (
    Parts,
    Problem,
    Values,
    backends,
    backward,
    dtype_of,
    forward,
    leaves,
    made,
    nbytes,
    sizes,
    written_out,
)


def problems(device: torch.device) -> Parts:
    return Parts(
        partial(_case, device, number, case) for number, case in enumerate(sizes(device, cases.GPU, cases.CASES[5:6]))
    )


def _case(device: torch.device, number: int, case: cases.Case) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    values = made(device, lambda: case.tensors(dtype_of(device)))
    values = {k: values[k] for k in ("x", "weight", "z")}
    upstream, options = torch.randn_like(values["x"]), case.options
    group = options["group_size"]

    def ours(v: Values, name: str = "") -> Tensor:
        return kernels.rmsnorm_fn(v["x"], v["weight"], None, v["z"], **options, backend=name)

    def theirs(v: Values) -> Tensor:
        function = import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
        return function(v["x"], v["weight"], None, v["z"], **options)

    theirs_too = functools.cache(lambda width=values["x"].shape[-1]: peers.gated_norm(width, group, EPS))

    def plain(v: Values) -> Tensor:
        return theirs_too()(**v).to(v["x"].dtype)

    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}

    def eager(v: Values) -> Tensor:
        split = {k: t.unflatten(-1, (-1, group)) for k, t in v.items()}
        return gated_norm(**split).flatten(-2)

    functions |= {"mamba_ssm": theirs, peers.label(): plain} | written_out(device, eager, not number)

    def error(y: Tensor) -> float:
        return worst_error((y,), (ours(inputs.double(values), "reference"),))

    def gradient_error(found: tuple) -> float:
        exact = inputs.gradients(lambda **v: ours(v, "reference"), leaves(inputs.double(values)), upstream.double())
        return worst_error(found, exact[1:])

    rows = nbytes(values["x"])
    yield Problem("gated_norm forward", case.name, 3 * rows, 0.0, forward(functions, values), error, bound,
                  energy=not number)  # fmt: skip
    yield Problem("gated_norm backward", case.name, 5 * rows, 0.0, backward(functions, values, upstream),
                  gradient_error, bound)  # fmt: skip
