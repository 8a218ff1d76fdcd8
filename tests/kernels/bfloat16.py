"""Teaches Triton's interpreter bfloat16, which it multiplies as integers and rounds toward zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from omnimamba_kernels import triton_launch


@contextmanager
def interpreted_bfloat16() -> Iterator[None]:
    """Within the block kernels take bfloat16 while interpreting: products are exact, roundings are to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self, source, wanted):
        if wanted.scalar == tl.bfloat16:
            single = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
            return TensorHandle(single.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, widened(source), wanted)

    def exact_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cannot_store(*tensors):
        return None

    with (
        mock.patch.object(builder, "cast_impl", rounding_cast),
        mock.patch.object(builder, "create_dot", exact_dot),
        mock.patch.object(triton_launch, "cannot_store", cannot_store),
    ):
        yield
