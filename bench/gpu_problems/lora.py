"""The LoRA linear layer beside the product without its adapters: forward, and the backward of training an adapter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.lora_linear import cases

from .. import inputs
from ..measure import worst_error
from .common import Problem, Values, backends, backward, dtype_of, forward, leaves, made, nbytes, sizes

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


def problems(device: torch.device) -> Iterator[Problem]:
    dtype = dtype_of(device)
    for case in sizes(device, cases.GPU, cases.SMALL[1:2]):
        values = made(device, lambda case=case: cases.inputs(case, dtype, dtype))
        x = values["x"].reshape(-1, case.width)
        values |= {"x": x, "task": None if values["task"] is None else values["task"].reshape(-1)}
        rows = x.shape[0]
        functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}
        if values["task"] is not None:
            functions["torch, product by product"] = product_by_product
        functions[BASE] = base
        yield _forward(case, values, functions)
        if case.tasks and (device.type == "cpu" or rows >= FEWEST):
            yield _backward(case, values, functions)


def _forward(case: cases.Case, values: Values, functions: dict) -> Problem:
    x, weight = values["x"], values["weight"]
    few = inputs.double({k: v[:ROWS] if k in ("x", "task") and v is not None else v for k, v in values.items()})
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
    calls |= backward({BASE: functions[BASE]}, values, upstream, ("x",))
    return Problem(
        "lora_linear backward", str(case), nbytes(x, weight) + rows * case.out * x.element_size(),
        2.0 * rows * case.width * case.out, calls,
        lambda found: worst_error(found, exact(lambda v: ours(v, "reference"), TRAINED)), inputs.BOUND[x.dtype],
        {BASE: lambda found: worst_error(found, exact(base, ("x",)))},
    )  # fmt: skip
