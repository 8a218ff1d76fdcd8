"""What a test compares its runs with is the same for each of them: it is computed once, and kept for the next.

An answer is found again by all that it follows from: the function's code and what that closes over, and the inputs to
the last bit, with their strides. Where something has no such name, nothing is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

MOST, LARGEST = 400, 1 << 20
"""Answers that are kept, and the bytes of one beyond which it is not."""

_kept: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()


class _Nameless(Exception):
    pass


def once(compute: Callable[..., dict[str, Tensor]], *given: Any) -> dict[str, Tensor]:
    """``compute(*given)``, from what was kept if it was computed before. The tensors are not to be changed."""
    try:
        key = (torch.get_num_threads(), _name(compute), *map(_name, given))
    except _Nameless:
        return compute(*given)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    found = compute(*given)
    if sum(t.nbytes for t in found.values()) <= LARGEST:
        _kept[key] = found
        if len(_kept) > MOST:
            _kept.popitem(last=False)
    return found


def _name(value: Any) -> Hashable:
    """Equal for values that no function can tell apart."""
    if isinstance(value, Tensor):
        packed = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        bits = packed.view(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), value.stride(), str(value.device), hashlib.sha256(bits).digest()
    if isinstance(value, FunctionType):
        cells = tuple(_name(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, id(value.__globals__), cells, _name(value.__defaults__), _name(value.__kwdefaults__)
    if isinstance(value, functools.partial):
        return "partial", _name(value.func), _name(value.args), _name(value.keywords)
    if isinstance(value, dict):
        return "dict", tuple((key, _name(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_name, value))
    if dataclasses.is_dataclass(value):
        return type(value), tuple(_name(getattr(value, field.name)) for field in dataclasses.fields(value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), repr(value)  # where 0.0 and -0.0 differ, and NaN is itself
    raise _Nameless(type(value))
