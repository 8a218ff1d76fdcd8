"""Argument checks: each error names the argument, what came, what was expected and what to do."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64)
_FLOATS, _INTS = frozenset(FLOATS), frozenset(INTS)


def once_a_kind(check: Callable[..., None]) -> Callable[..., None]:
    """A check of shapes, dtypes and devices alone, not repeated for arguments of a kind that has passed it before.

    A decode loop calls the same functions on the same kinds of arguments thousands of times a second.
    """
    passed: set[tuple] = set()
    names = tuple(inspect.signature(check).parameters)

    def whole_check(*arguments: Any) -> None:
        dense(**dict(zip(names, arguments, strict=True)))
        check(*arguments)

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        try:
            kind = tuple([(a.shape, a.dtype, a.device, a.layout) if isinstance(a, Tensor) else (type(a), a)
                          for a in arguments])  # fmt: skip
            if kind in passed:
                return None
        except (TypeError, RuntimeError):  # no hash, or a nested tensor's shape: the check itself knows what to say
            return whole_check(*arguments)
        whole_check(*arguments)
        if len(passed) >= 4096:
            passed.clear()
        passed.add(kind)

    return checked


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    dense(**{name: value})


def dense(**values: object) -> None:
    """Those that are tensors have strides that lead to each element."""
    for name, tensor in values.items():
        if isinstance(tensor, Tensor) and (tensor.layout is not torch.strided or tensor.is_nested):
            kind = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name}: got a tensor of layout {kind}, expected a dense one; convert it with .to_dense()")


def tensors(**required: object) -> None:
    for name, value in required.items():
        is_tensor(name, value)


def shape(name: str, tensor: Tensor | None, *expected: int | None, letters: str = "") -> None:
    """Checks a tensor's shape; None in ``expected`` fits any size, a tensor that is None passes."""
    if tensor is None or (isinstance(tensor, Tensor) and tensor.shape == expected):
        return
    is_tensor(name, tensor)
    fits = tensor.dim() == len(expected) and all(
        want is None or got == want for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected ({want}){letters and f' = {letters}'}")


def rank(name: str, tensor: Tensor, *ranks: int, letters: str = "") -> None:
    is_tensor(name, tensor)
    if tensor.dim() not in ranks:
        want = " or ".join(str(r) for r in ranks)
        letters = letters and f": {letters}"
        raise ValueError(
            f"{name}: got {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; expected {want}{letters}"
        )


def floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None or (isinstance(tensor, Tensor) and tensor.dtype in _FLOATS):
            continue
        is_tensor(name, tensor)
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected float32, bfloat16, float16 or float64; convert it with .float()"
        )


def integer(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None or (isinstance(tensor, Tensor) and tensor.dtype in _INTS):
            continue
        is_tensor(name, tensor)
        raise TypeError(f"{name}: got {tensor.dtype}, expected int32 or int64; convert it with .int()")


def same_device(**tensors: Tensor | None) -> None:
    """All tensors on the device of the first."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {device} as {first}; move it with .to({first}.device)"
            )


def divisible(name: str, value: int, by_name: str, by: int) -> None:
    whole(by_name, by, 1)
    if value % by:
        raise ValueError(
            f"{name} = {value} is not a multiple of {by_name} = {by}; choose {by_name} so that it divides {name}"
        )


def one_of(name: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def whole(name: str, value: object, low: int) -> None:
    """An integer, and at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {low}")


def number(name: str, value: Any, low: float = -math.inf) -> float:
    """``value`` as a float of at least ``low``; NaN is none."""
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not found >= low:
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name}: got {value!r}, expected a number{least}")
    return found


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.is_contiguous():
        return False
    reach = 1  # elements that the dimensions of smaller steps span
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step < reach:  # no slice of a dense tensor, but the elements may still be apart
                places = torch.zeros(1, dtype=torch.int64, device="cpu")
                for step, size in zip(tensor.stride(), tensor.shape, strict=True):
                    places = (places[:, None] + step * torch.arange(size, device="cpu")).flatten()
                return places.unique().numel() < places.numel()
            reach += step * (size - 1)
    return False


def writable(**tensors: Tensor) -> None:
    """Tensors that change in place: no two elements may share memory."""
    for name, tensor in tensors.items():
        if _overlaps(tensor):
            raise ValueError(
                f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, whose elements share memory; "
                "it changes in place, so pass a tensor of its own (.clone())"
            )


def in_range(name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Every element in [low, high). On a GPU this would stop the stream, so there the kernels guard themselves."""
    if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    few = tensor.tolist() if tensor.dim() == 1 and tensor.numel() <= 64 else None  # a decode batch: no kernel launch
    smallest, largest = (min(few), max(few)) if few else (int(v) for v in torch.aminmax(tensor))
    if smallest < low or largest >= high:
        raise ValueError(f"{name}: got values from {smallest} to {largest}, expected {low} to {high - 1}")


def slots(name: str, tensor: Tensor | None, count: int) -> None:
    """Rows of a state to change in place: below ``count``, negative for padding, no row twice."""
    in_range(name, tensor, -(2**31), count)
    if tensor is None or tensor.device.type != "cpu":
        return
    live = [slot for slot in tensor.tolist() if slot >= 0]
    if len(set(live)) < len(live):
        raise ValueError(f"{name}: got {tensor.tolist()[:8]}, expected each row at most once; it changes in place")


def offsets(name: str, tensor: Tensor, total: int) -> None:
    """Cumulative lengths: one dimension, from 0, never falling, to ``total`` at most; what is left is padding."""
    rank(name, tensor, 1, letters="(sequences + 1,)")
    integer(**{name: tensor})
    if tensor.numel() < 1:
        raise ValueError(f"{name}: got no elements, expected at least the leading 0")
    if tensor.device.type != "cpu":
        return
    values = tensor.tolist()
    if values[0] != 0 or values[-1] > total or any(b < a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(
            f"{name}: got {values[:8]}..., expected rising offsets from 0 to at most the total length {total}"
        )
