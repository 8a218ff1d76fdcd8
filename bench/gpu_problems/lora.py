"""The LoRA linear layer beside the product without its adapters: forward, with int8 weights at few rows, and the
backward of training an adapter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.lora_linear import cases

from .. import inputs, peers
from ..measure import worst_error
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

TRAINED = ("x", "lora_A", "lora_B")
BASE = "torch, the base alone"
ROWS = 64
"""Rows of the forward that are checked."""
FEWEST = 1024
"""Rows from which on a call can be a step of training."""


def ours(v: Values, name: str) -> Tensor:
    return kernels.lora_linear(**v, scale=2.0, backend=name)


def base(v: Values) -> Tensor:
    return F.linear(v["x"], v["weight"])


def product_by_product(v: Values) -> Tensor:
    """The product, then two thin ones for each adapter, on the rows that are its own."""
    y = base(v)
    for i, (A, B) in enumerate(zip(v["lora_A"], v["lora_B"], strict=True)):
        own = (v["task"] == i)[:, None].to(y.dtype)
        y = y + 2.0 * own * F.linear(F.linear(v["x"], A), B)
    return y


def problems(device: torch.device) -> Parts:
    parts = [partial(_case, device, *each) for each in enumerate(sizes(device, cases.GPU, cases.SMALL[1:2]))]
    parts.append(partial(_one_adapter, device))
    return Parts(parts + [partial(_int8, device, case) for case in sizes(device, cases.GPU[:2], cases.SMALL[1:2])])


def _case(device: torch.device, number: int, case: cases.Case) -> Iterator[Problem]:
    dtype = dtype_of(device)
    values = made(device, lambda: cases.inputs(case, dtype, dtype))
    x = values["x"].reshape(-1, case.width)
    values |= {"x": x, "task": None if values["task"] is None else values["task"].reshape(-1)}
    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}
    if values["task"] is not None:
        functions |= _named(written_out(device, product_by_product, not number), "product by product")
    functions[BASE] = base
    yield dataclasses.replace(_forward(case, values, functions), energy=not number)
    if case.tasks and (device.type == "cpu" or x.shape[0] >= FEWEST):
        yield _backward(case, values, functions)


def _named(functions: dict, how: str) -> dict:
    return {f"{who}, {how}": function for who, function in functions.items()}


def _one_adapter(device: torch.device) -> Iterator[Problem]:
    """Every row through the same adapter, which is what PEFT's layer does."""
    case = dataclasses.replace(sizes(device, cases.GPU[3:4], cases.SMALL[1:2])[0], tasks=1)
    dtype = dtype_of(device)
    values = made(device, lambda: cases.inputs(case, dtype, dtype)) | {"task": 0}
    held = {"weight": values["weight"], "lora_A": values["lora_A"], "lora_B": values["lora_B"], "scale": 2.0}
    layer = functools.cache(lambda: peers.peft(**held))

    def eager(v: Values) -> Tensor:
        return base(v) + 2.0 * F.linear(F.linear(v["x"], v["lora_A"][0]), v["lora_B"][0])

    def trained(v: Values) -> Tensor:
        halves = {f"lora_{half}.default.weight": v[f"lora_{half}"][0] for half in "AB"}
        return torch.func.functional_call(layer(), halves, (v["x"],))

    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}
    functions |= written_out(device, eager, True)
    yield _forward(case, values, functions | {peers.peft_label(): lambda v: layer()(v["x"])})
    yield _backward(case, values, functions | {peers.peft_label(): trained})


def _int8(device: torch.device, case: cases.Case) -> Problem:
    """A decode step's product. The yardstick reads the weights in x's type, and has no adapter."""
    dtype = dtype_of(device)
    values = made(device, lambda: cases.int8_inputs(case, dtype))
    x, weight, scale = (values[name] for name in ("x", "weight", "weight_scale"))
    dense = kernels.dequantize_int8(weight, scale)
    exact, product = ours(inputs.double(values), "reference"), F.linear(x.double(), dense.double())
    functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}
    calls = forward(functions, values) | forward({BASE: base}, {"x": x, "weight": dense.to(dtype)})
    return Problem(
        "lora_linear int8", str(case), nbytes(x, weight, scale) + x.shape[0] * case.out * x.element_size(),
        2.0 * x.shape[0] * case.width * case.out, calls, lambda y: worst_error((y,), (exact,)), inputs.BOUND[dtype],
        {BASE: lambda y: worst_error((y,), (product,))},
    )  # fmt: skip


def _forward(case: cases.Case, values: Values, functions: dict) -> Problem:
    x, weight = values["x"], values["weight"]
    few = inputs.double({k: v[:ROWS] if k in ("x", "task") and torch.is_tensor(v) else v for k, v in values.items()})
    exact, product = ours(few, "reference"), base(few)
    rows = x.shape[0]
    return Problem(
        "lora_linear", str(case), nbytes(x, weight) + rows * case.out * x.element_size(),
        2.0 * rows * case.width * case.out, forward(functions, values),
        lambda y: worst_error((y[:ROWS],), (exact,)), inputs.BOUND[x.dtype],
        {BASE: lambda y: worst_error((y[:ROWS],), (product,))},
    )  # fmt: skip


def _backward(case: cases.Case, values: Values, functions: dict) -> Problem:
    """Gradients of x and of the adapters, the base frozen. The yardstick is dx of the base."""
    x, weight, rows = values["x"], values["weight"], values["x"].shape[0]
    upstream = torch.randn(rows, case.out, dtype=x.dtype, device=x.device)

    def exact(function, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        own = leaves(inputs.double(values), wanted)
        asked = [own[name] for name in own if name in wanted]
        return torch.autograd.grad(function(own), asked, upstream.double())

    calls = backward({who: f for who, f in functions.items() if who != BASE}, values, upstream, TRAINED)
    if BASE in functions:
        calls |= backward({BASE: functions[BASE]}, values, upstream, ("x",))
    return Problem(
        "lora_linear backward", str(case), nbytes(x, weight) + rows * case.out * x.element_size(),
        2.0 * rows * case.width * case.out, calls,
        lambda found: worst_error(found, exact(lambda v: ours(v, "reference"), TRAINED)), inputs.BOUND[x.dtype],
        {BASE: lambda found: worst_error(found, exact(base, ("x",)))},
    )  # fmt: skip
