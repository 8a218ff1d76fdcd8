"""Counts what Triton's interpreter loads, stores and multiplies, by kernel; sees what torch does beside kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from omnimamba_kernels.cost import Cost


@contextmanager
def _names(running: list[str]) -> Iterator[None]:
    """Within the block ``running`` ends with the name of the kernel that is interpreted."""
    from triton.runtime import interpreter

    start = interpreter.GridExecutor.__call__

    def named(self, *args, **options):
        running.append(self.fn.__name__)
        try:
            return start(self, *args, **options)
        finally:
            running.pop()

    with mock.patch.object(interpreter.GridExecutor, "__call__", named):
        yield


@contextmanager
def counted() -> Iterator[dict[str, Cost]]:
    """Within the block every interpreted kernel adds to its entry: bytes of the lanes that a mask lets through, and two
    FLOPs for each multiplication of a matrix product."""
    from triton.runtime import interpreter

    found: dict[str, Cost] = defaultdict(Cost)
    running: list[str] = []
    builder = interpreter.InterpreterBuilder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def lanes(pointers: Any, mask: Any) -> int:
        active = np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
        return active * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *rest, **named):
        found[running[-1]] += Cost(loaded=lanes(pointers, mask))
        return load(self, pointers, mask, *rest, **named)

    def counting_store(self, pointers, value, mask, *rest, **named):
        found[running[-1]] += Cost(stored=lanes(pointers, mask))
        return store(self, pointers, value, mask, *rest, **named)

    def counting_dot(self, a, b, *rest):
        found[running[-1]] += Cost(flops=2 * a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    with (
        _names(running),
        mock.patch.object(builder, "create_masked_load", counting_load),
        mock.patch.object(builder, "create_masked_store", counting_store),
        mock.patch.object(builder, "create_dot", counting_dot),
    ):
        yield found


@contextmanager
def counted_arithmetic() -> Iterator[dict[str, int]]:
    """Within the block every interpreted kernel adds the FLOPs of its lanes to its entry, masked ones among them: sums,
    products and quotients of tiles of numbers, two of a fused product; what adds up a tile is not counted."""
    from triton.runtime import interpreter

    found: dict[str, int] = defaultdict(int)
    running: list[str] = []
    builder = interpreter.InterpreterBuilder

    def counting(one, flops):
        def call(self, *operands):
            result = one(self, *operands)
            found[running[-1]] += flops * result.data.size
            return result

        return call

    with ExitStack() as stack:
        for name, flops in (("fadd", 1), ("fsub", 1), ("fmul", 1), ("fdiv", 1), ("fma", 2)):
            of_one = getattr(builder, f"create_{name}")
            stack.enter_context(mock.patch.object(builder, f"create_{name}", counting(of_one, flops)))
        stack.enter_context(_names(running))
        yield found


@contextmanager
def counted_exponentials(kernel: str) -> Iterator[list[int]]:
    """Within the block the exponentials of each launch of ``kernel`` are counted, masked lanes among them."""
    from triton.runtime import interpreter

    found: list[int] = []
    running: list[str] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    start = executor.__call__

    def counting(one):
        def call(self, v):
            if running[-1] == kernel:
                found[-1] += v.data.size
            return one(self, v)

        return call

    def counting_start(self, *args, **named):
        running.append(self.fn.__name__)
        found.extend([0] * (running[-1] == kernel))
        try:
            return start(self, *args, **named)
        finally:
            running.pop()

    with (
        mock.patch.object(builder, "create_exp", counting(builder.create_exp)),
        mock.patch.object(builder, "create_exp2", counting(builder.create_exp2)),
        mock.patch.object(executor, "__call__", counting_start),
    ):
        yield found


class Seen(TorchDispatchMode):
    """The names of torch's own operations within the block, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))
