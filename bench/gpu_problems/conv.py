"""The causal convolution, forward and backward, and its decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.causal_conv1d import cases

from .. import inputs, peers
from ..measure import worst_error
from ..plain import conv as plain_conv
from .common import (
    Parts,
    Problem,
    Values,
    backends,
    backward,
    dtype_of,
    forward,
    in_place,
    leaves,
    made,
    nbytes,
    peer,
    sizes,
    written_out,
)


def problems(device: torch.device) -> Parts:
    parts = [partial(_case, device, *each) for each in enumerate(sizes(device, cases.GPU, cases.CASES[2:3]))]
    steps = sizes(device, ((1, 4352), (64, 4352), (256, 4352)), ((3, 160),))
    return Parts(parts + [partial(_update, device, b, d) for b, d in steps])


def _case(device: torch.device, number: int, case: cases.Case) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    values = made(device, lambda: case.tensors(dtype_of(device)))
    values = {k: values[k] for k in ("x", "weight", "bias")}
    upstream = torch.randn_like(values["x"])
    few = inputs.double({"x": values["x"][:1, :64], "weight": values["weight"][:64], "bias": values["bias"][:64]})

    def ours(v: Values, name: str = "") -> Tensor:
        return kernels.causal_conv1d_fn(**v, activation="silu", backend=name)

    def of(module: str, name: str) -> Callable[[Values], Tensor]:
        found = functools.cache(lambda: getattr(import_module(module), name))
        return lambda v: found()(**v, activation="silu")

    def plain(v: Values) -> Tensor:
        same = {k: t.to(v["x"].dtype) for k, t in v.items()}
        return peers.fallback("causal_conv1d_fn")(same["x"], same["weight"], same["bias"], activation="silu")

    def fla(v: Values) -> Tensor:
        function = import_module("fla.modules.convolution").causal_conv1d
        return function(v["x"].transpose(1, 2), v["weight"], v["bias"], activation="silu")[0].transpose(1, 2)

    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}

    def eager(v: Values) -> Tensor:
        return plain_conv(**{k: t.to(v["x"].dtype) for k, t in v.items()})

    functions |= {"causal_conv1d": of("causal_conv1d", "causal_conv1d_fn"), peers.label(): plain, "fla": fla}
    functions |= written_out(device, eager, not number)

    def error(y: Tensor) -> float:
        return worst_error((y[:1, :64],), (ours(few, "reference"),))

    def gradient_error(found: tuple) -> float:
        exact = inputs.gradients(lambda **v: ours(v, "reference"), leaves(few), upstream[:1, :64].double())
        return worst_error((found[0][:1, :64],), exact[1:2])

    moved = 2 * nbytes(values["x"])
    yield Problem("causal_conv1d forward", case.name, moved, 0.0, forward(functions, values), error, bound,
                  energy=not number)  # fmt: skip
    yield Problem("causal_conv1d backward", case.name, 1.5 * moved, 0.0, backward(functions, values, upstream),
                  gradient_error, bound)  # fmt: skip


def _update(device: torch.device, b: int, d: int) -> Problem:
    """One step of every row, the state shifted in place."""
    dtype = dtype_of(device)
    # the peers read a weight of x's type alone
    values = made(device, lambda: {
        "x": torch.randn(b, d).to(dtype), "weight": torch.randn(d, 4).to(dtype), "bias": torch.randn(d).to(dtype),
        "conv_state": torch.randn(b, d, 3).to(dtype)})  # fmt: skip
    state = values.pop("conv_state")
    exact = kernels.causal_conv1d_update(**inputs.double(values), conv_state=state.double(), activation="silu",
                                         backend="reference")  # fmt: skip
    calls = {
        name: lambda name=name: (
            lambda: kernels.causal_conv1d_update(**values, conv_state=state, activation="silu", backend=name)
        )
        for name in backends(device)
    }
    calls["causal_conv1d"] = peer("causal_conv1d", "causal_conv1d_update", conv_state=state, activation="silu",
                                  **values)  # fmt: skip
    calls[peers.label()] = lambda: lambda: _fallback(state, **values)
    moved = 2 * nbytes(state, values["x"]) + nbytes(values["weight"], values["bias"])
    return Problem("causal_conv1d update", f"{b} x {d}", moved, 0.0, in_place(calls, state),
                  lambda y: worst_error((y,), (exact,)), inputs.BOUND[dtype])  # fmt: skip


def _fallback(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return peers.fallback("causal_conv1d_update")(x.unsqueeze(2), state, weight, bias, activation="silu").squeeze(2)
