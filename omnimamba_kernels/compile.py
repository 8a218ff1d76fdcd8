"""Public functions as torch.library operators, so that torch.compile keeps them whole in its graph.

``@traceable(...)`` leaves an eager call as it is. While torch.compile traces, the call becomes the operator
``omnimamba::<name>``, whose fake (shapes without data) is given beside the function. Its gradient is a second operator,
``omnimamba::<name>_backward``, which runs the forward again from the inputs and differentiates that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")

_library = torch.library.Library("omnimamba", "DEF")  # noqa: TOR901 (lives as long as the process)

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "bool": "bool",
    "str | None": "str?",
    "tuple[float, float]": "float[]",
    "torch.dtype | None": "ScalarType?",
}


def traceable(
    fake: Callable[..., Tensor | list[Tensor]], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function that returns a tensor or a tuple of tensors, none of them an input.

    Args:
        fake: called with the function's arguments; returns a list of empty tensors like its outputs.
        mutates: names of the arguments that change in place; such a function returns one tensor and has no gradient.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        operator = _define(function, fake, mutates)
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}

        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            outputs = operator(*(given[name] for name in names))
            if mutates:
                return outputs
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return public

    return decorate


def _define(function: Callable, fake: Callable, mutates: tuple[str, ...]) -> Callable:
    name = function.__name__.lstrip("_")
    types = {n: _SCHEMA_TYPES[p.annotation] for n, p in inspect.signature(function).parameters.items()}
    marked = {n: t.replace("Tensor", "Tensor(a!)" if n in mutates else "Tensor", 1) for n, t in types.items()}
    for letter, mutated in zip("abcdef", mutates, strict=False):
        marked[mutated] = marked[mutated].replace("(a!)", f"({letter}!)")
    arguments = ", ".join(f"{t} {n}" for n, t in marked.items())
    _library.define(f"{name}({arguments}) -> {'Tensor' if mutates else 'Tensor[]'}")
    keywords = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]

    def call(*values: Any) -> Tensor | list[Tensor]:
        given = dict(zip(types, values, strict=True))
        extra = {n: given.pop(n) for n in keywords}
        outputs = function(*given.values(), **extra)
        if mutates:
            return outputs
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"omnimamba::{name}", lambda *values: fake(*values), lib=_library)
    if not mutates:
        _define_backward(name, types, call)
    return getattr(torch.ops.omnimamba, name).default


def _define_backward(name: str, types: dict[str, str], call: Callable) -> None:
    tensors = [i for i, t in enumerate(types.values()) if t.startswith("Tensor")]
    arguments = ", ".join(f"{t} {n}" for n, t in types.items())
    _library.define(f"{name}_backward({arguments}, Tensor[] grads) -> Tensor[]")

    def floating(values: tuple) -> list[int]:
        return [i for i in tensors if values[i] is not None and values[i].is_floating_point()]

    def differentiate(*values: Any) -> list[Tensor]:
        *inputs, grads = values
        wanted = floating(inputs)
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            outputs = call(*inputs)
            found = torch.autograd.grad(
                outputs, [inputs[i] for i in wanted], grads, allow_unused=True, materialize_grads=True
            )
        return [g.contiguous() for g in found]

    def fake(*values: Any) -> list[Tensor]:
        return [torch.empty_like(values[i], memory_format=torch.contiguous_format) for i in floating(values[:-1])]

    _library.impl(f"{name}_backward", differentiate, "CompositeExplicitAutograd")
    torch.library.register_fake(f"omnimamba::{name}_backward", fake, lib=_library)
    operator = getattr(torch.ops.omnimamba, f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.plain = [None if i in tensors else value for i, value in enumerate(inputs)]
        ctx.present = [i for i in tensors if inputs[i] is not None]
        ctx.save_for_backward(*(inputs[i] for i in ctx.present))

    def backward(ctx: Any, grads: list[Tensor]) -> tuple:
        values = list(ctx.plain)
        for i, tensor in zip(ctx.present, ctx.saved_tensors, strict=True):
            values[i] = tensor
        found = operator(*values, grads)
        result: list[Tensor | None] = [None] * len(values)
        for i, grad in zip(floating(values), found, strict=True):
            result[i] = grad
        return tuple(result)

    torch.library.register_autograd(f"omnimamba::{name}", backward, setup_context=setup_context, lib=_library)
