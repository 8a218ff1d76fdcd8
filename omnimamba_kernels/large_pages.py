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
KEPT = 80 * PAGE
"""Bytes kept at most while no tensor lies in them: two results of a layer of the 1.3B shape at 4,096 positions."""
_idle: deque[mmap.mmap] = deque()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised contiguous memory on the CPU, whatever the default dtype and device; from LARGE bytes on as above.

    It is no view of another tensor, so that autograd lets a caller change an output in place. Its storage cannot grow.
    """
    count = prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < LARGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _taken(nbytes) or _mapped(nbytes)
    # The view lives as long as the last tensor on it; nothing else refers to it.
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count, offset=_first(view)).resize_(tuple(shape))


def release() -> None:
    """Gives memory that no tensor lies in back to the system."""
    _idle.clear()


def _taken(nbytes: int) -> mmap.mmap | None:
    """The smallest idle memory that fits and is not twice too large."""
    for memory in sorted(_idle, key=len):
        if nbytes + PAGE <= len(memory) <= 2 * nbytes + PAGE:
            try:
                _idle.remove(memory)
            except ValueError:  # another thread's by now
                continue
            return memory
    return None


def _mapped(nbytes: int) -> mmap.mmap:
    """New memory; what does not fill a large page stays in small ones."""
    memory = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, _first(memory), nbytes // PAGE * PAGE)
    except OSError:
        pass  # a system without large pages
    return memory


def _first(memory: mmap.mmap | memoryview) -> int:
    """Where its first large page begins."""
    return -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE


def _give_back(memory: mmap.mmap) -> None:
    _idle.append(memory)
    while sum(map(len, tuple(_idle))) > KEPT:
        try:
            _idle.popleft()
        except IndexError:  # other threads' by now
            return
