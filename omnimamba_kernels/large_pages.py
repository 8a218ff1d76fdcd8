"""Memory for large results on the CPU: in large pages where Linux has them, and used again once it is free.

Beyond 32 MiB the C library maps memory anew each time, and the system clears every page of it, which takes longer than
a convolution or a norm takes to fill them; and each small page costs a look-up of its own whoever lends it. So memory
that the last tensor has left is kept for the next, up to KEPT bytes in all; what is more goes back at once.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

PAGE = 2**21
LARGE = 2 * PAGE
"""Bytes from which a tensor lies in such memory."""
SPARE = 8
"""The part of a tensor's size, one in so many, by which memory lent again may be too large."""
KEPT = 80 * PAGE
"""Bytes kept at most while no tensor lies in them: two results of a layer of the 1.3B shape at 4,096 positions."""


class _Memory(mmap.mmap):
    """A mapping, and where its first large page begins."""

    first: int


_idle: deque[_Memory] = deque()
_lent: dict[int, tuple[weakref.ref[memoryview], _Memory]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int]) -> Tensor:
    """Uninitialised memory without gaps on the CPU, whatever the default dtype and device; from LARGE bytes as above.

    It is no view of another tensor, so that autograd lets a caller change an output in place. Its storage cannot grow.
    Where torch fills its own new memory (``torch.utils.deterministic.fill_uninitialized_memory``), so is this.
    """
    count = prod(shape)
    nbytes = count * dtype.itemsize
    memory = None if nbytes < LARGE or sys.platform != "linux" else _taken(nbytes) or _mapped(nbytes)
    if memory is None:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    # The view lives as long as the last tensor on it; nothing else refers to it.
    view = memoryview(memory)
    loan = weakref.ref(view, _give_back)
    _lent[id(loan)] = loan, memory
    tensor = torch.frombuffer(view, dtype=dtype, count=count, offset=memory.first).as_strided_(shape, strides)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        tensor.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return tensor


def release() -> None:
    """Gives memory that no tensor lies in back to the system."""
    _idle.clear()


def _taken(nbytes: int) -> _Memory | None:
    """The smallest idle memory that fits and is hardly too large: what is lent stays in use as a whole."""
    for memory in sorted(_idle, key=len):
        if nbytes + PAGE <= len(memory) <= nbytes + nbytes // SPARE + 2 * PAGE:
            try:
                _idle.remove(memory)
            except ValueError:  # another thread's by now
                continue
            return memory
    return None


def _mapped(nbytes: int) -> _Memory | None:
    """New memory, or None where the system has none left; what does not fill a large page stays in small ones."""
    size = -(-nbytes // PAGE) * PAGE + PAGE
    try:
        memory = _Memory(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        release()
        return None
    memory.first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, memory.first, nbytes // PAGE * PAGE)
    except OSError:
        pass  # a system without large pages
    return memory


def _give_back(loan: weakref.ref[memoryview]) -> None:
    _, memory = _lent.pop(id(loan))
    if len(memory) > KEPT:
        return
    _idle.append(memory)
    while sum(map(len, tuple(_idle))) > KEPT:
        try:
            _idle.popleft()
        except IndexError:  # other threads' by now
            return
