"""Programs that write where they read: all threads have read before one writes, and have written before one reads.

Where a tile is smaller than the program's threads, several of them read one element and one writes it; and a sum kept
in memory is written by other threads than read it next. The interpreter has no threads: it tells what no barrier parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from common import running
from test_mamba_mixer_step import OPTIONS, arguments

from omnimamba_kernels import causal_conv1d_update, mamba_mixer_step, rmsnorm_fn, selective_state_update
from omnimamba_kernels.gated_norm.cases import CASES as NORMS
from omnimamba_kernels.mamba_mixer.cases import Case
from omnimamba_kernels.state_update.cases import CASES as UPDATES
from omnimamba_kernels.triton_launch import interpreting

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")


@contextmanager
def watched() -> Iterator[list[int]]:
    """Within the block no interpreted program may write what it read, or read what it wrote, without a barrier between;
    how many tiles each barrier parted from later ones."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store, add = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw
    place, read, written, asked, barriers = Builder.set_grid_idx, [], [], [], []

    def lanes(at: Any, mask: Any) -> np.ndarray:
        shape = np.broadcast_shapes(at.data.shape, mask.data.shape)
        return np.broadcast_to(at.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)]

    def apart(these: np.ndarray, others: list[np.ndarray], why: str) -> None:
        assert not others or not np.isin(these, np.concatenate(others)).any(), why

    def loading(self, at, mask, *rest):
        assert not asked, "of the ticket one thread alone knows"
        read.append(lanes(at, mask))
        apart(read[-1], written, "another thread may not have written it yet")
        return load(self, at, mask, *rest)

    def storing(self, at, value, mask, *rest):
        written.append(lanes(at, mask))
        apart(written[-1], read, "another thread may read it yet")
        return store(self, at, value, mask, *rest)

    def adding(self, of, at, value, mask, order, scope):
        if "ACQUIRE" in str(order):
            assert not written, "a ticket is taken before every thread has written"
            asked.append(at)
        return add(self, of, at, value, mask, order, scope)

    def clear():
        for known in (read, written, asked):
            known.clear()

    def waiting(self):
        barriers.append(len(read) + len(written))
        clear()

    def placing(self, *index):
        clear()
        place(self, *index)

    with (
        mock.patch.object(Builder, "create_masked_load", loading),
        mock.patch.object(Builder, "create_masked_store", storing),
        mock.patch.object(Builder, "create_atomic_rmw", adding),
        mock.patch.object(Builder, "create_barrier", waiting),
        mock.patch.object(Builder, "set_grid_idx", placing),
    ):
        yield barriers


def step(name: str) -> Callable[[], object]:
    tensors, plain = arguments(Case(2, 1, 4, 24, 5, g=2, extra=3), options=OPTIONS[name])
    return lambda: mamba_mixer_step(**tensors, **plain)


def moved_on(length: int, places: int, ring: bool = False) -> Callable[[], object]:
    """A state of several blocks of places, some of which stay."""
    seen = torch.tensor([0, 7]) if ring else None
    given = torch.randn(2, 21, length), torch.randn(2, 21, places), torch.randn(21, 4)
    return lambda: causal_conv1d_update(*given, activation="silu", cache_seqlens=seen)


def update(number: int) -> Callable[[], object]:
    case = UPDATES[number]
    return lambda: selective_state_update(**case.tensors(), **case.options)


def norm() -> Callable[[], object]:
    """Of groups so long that their sums are kept in memory, over several blocks of rows."""
    case = replace(next(case for case in NORMS if case.name == "gate before, bias, groups"), shape=(80, 130))
    leaves = {name: t.requires_grad_() for name, t in case.tensors().items()}
    return lambda: rmsnorm_fn(**leaves, **case.options).sum().backward()


CALLS = {
    "step, norm then gate": lambda: step("norm then gate"),
    "step, gate alone": lambda: step("gate alone"),
    "convolution, one input": lambda: moved_on(1, 11),
    "convolution, several inputs": lambda: moved_on(3, 11),
    "convolution, a ring": lambda: moved_on(3, 11, ring=True),
    "state of a tied head": lambda: update(1),
    "state in several blocks": lambda: update(9),
    "norm": norm,
}


@pytest.mark.parametrize("name", CALLS)
def test_barriers_part_what_is_read_from_what_is_written(name):
    call = CALLS[name]()
    with running("triton"), watched() as barriers:
        call()
    assert sum(barriers) > 0
