"""What the machine can do at best, measured beside every timing: matrix product, copy, read from DRAM.

Each sample is short, so that it can be taken just before and just after the thing it judges; a round in which the rate
itself was slow says that somebody else was using the machine.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor

from .machine import last_level_cache

_EDGE = 1536
_SMALLEST_COPY = 2**20
_FRESH, _PAGE = 2**28, 4096
"""Bytes that are mapped, with pages for all threads of torch; and of a page."""
PRODUCTS = ("sgemm", "bf16 gemm")
"""Rates that are a product's, of torch in fp32 and in bf16."""


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@cache
def torch_matmul_rate(dtype: torch.dtype, rows: int) -> float:
    """FLOP/s of torch's product of a few rows with a 1024 x 1024 matrix: some processors crawl at 16 bits."""
    x, weight = torch.randn(rows, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    taken = [seconds(lambda: x @ weight.T) for _ in range(2)]
    while len(taken) < 10 and sum(taken) < 0.5:  # a neighbour on the processor must not decide
        taken.append(seconds(lambda: x @ weight.T))
    return 2 * rows * 1024**2 / min(taken)


def product(dtype: torch.dtype) -> str:
    """The rate that products of this dtype are held against: torch's own, or fp32's where that is the faster one."""
    if dtype == torch.bfloat16 and torch_matmul_rate(dtype, 256) > torch_matmul_rate(torch.float32, 256):
        return "bf16 gemm"
    return "sgemm"


def _far_bytes() -> int:
    """Twice the last cache, at least 256 MiB."""
    return max(2 * last_level_cache(), 2**28)


class Rates:
    """Samples of the rates; every one taken is kept in ``history`` for the record."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = defaultdict(list)
        self._matrices: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        self._copied: tuple[Tensor, Tensor] | None = None

    def sample(self, kind: str, nbytes: float = 0) -> float:
        """One sample of ``sgemm`` or ``bf16 gemm`` (FLOP/s), ``read`` (byte/s from DRAM), ``copy`` or ``far copy``
        (byte/s, both ways), ``fresh`` (byte/s of memory that is mapped, written on every page, and given back).

        A copy moves ``nbytes`` in all, so that it finds its data where an operation of that size finds its own: in a
        cache or in DRAM. A far copy moves as much as the buffer that ``read`` goes through.
        """
        ways = {
            "sgemm": lambda: self._gemm(torch.float32),
            "bf16 gemm": lambda: self._gemm(torch.bfloat16),
            "read": self._read,
            "copy": lambda: self._copy(nbytes),
            "far copy": lambda: self._copy(_far_bytes()),
            "fresh": lambda: _FRESH / seconds(lambda: torch.empty(_FRESH // 4)[:: _PAGE // 4].fill_(1.0)),
        }
        rate = ways[kind]()
        self.history[kind].append(rate)
        return rate

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            kind: {"median": statistics.median(taken), "best": max(taken), "samples": len(taken)}
            for kind, taken in self.history.items()
        }

    def _gemm(self, dtype: torch.dtype) -> float:
        if dtype not in self._matrices:
            self._matrices[dtype] = tuple(torch.randn(_EDGE, _EDGE).to(dtype) for _ in range(3))
        a, b, out = self._matrices[dtype]
        torch.mm(a, b, out=out)
        return 2 * _EDGE**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(2))

    @cached_property
    def _far(self) -> Tensor:
        return torch.ones(_far_bytes() // 4)

    def _read(self) -> float:
        """The faster of two ways to read: a matrix times a vector that stays in cache, and a dot product."""
        rows = self._far[: self._far.numel() // 4096 * 4096].view(-1, 4096)
        ones = torch.ones(4096)
        ways = (lambda: torch.mv(rows, ones), lambda: torch.dot(self._far, self._far))
        return self._far.nbytes / min(seconds(way) for way in ways)

    def _copy(self, nbytes: float) -> float:
        half = int(max(nbytes, _SMALLEST_COPY)) // 8
        if self._copied is None or self._copied[0].numel() != half:
            self._copied = torch.ones(half), torch.zeros(half)
        source, target = self._copied
        target.copy_(source)
        times = max(1, int(2**26 / (8 * half)))
        taken = seconds(lambda: [target.copy_(source) for _ in range(times)])
        return 8 * half * times / taken
