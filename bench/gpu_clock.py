"""Time on the device that a tensor lives on: a GPU's by its own events and with a cold cache, a CPU's by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Clock:
    """Medians of calls on one device; on a GPU each call after everything was pushed out of its cache."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.budget = device, seconds
        self.cuda = device.type == "cuda"
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28) if self.cuda else 0
        self._other = torch.empty(size // 4, dtype=torch.int32, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def median(self, call: Callable[[], object], most: int = 50) -> float:
        """Seconds of a call: of as many as the budget pays for, three at least."""
        self._once(call)
        taken, start = [self._once(call)], time.perf_counter()
        while len(taken) < 3 or (len(taken) < most and time.perf_counter() - start < self.budget):
            taken.append(self._once(call))
        return statistics.median(taken)

    def _once(self, call: Callable[[], object]) -> float:
        """The flush keeps the GPU busy while the call's launches queue up behind it."""
        self._other.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3

    def rates(self) -> dict[str, float]:
        """What the device can do at best: bytes a second copied, read and written, and FLOPs a second of a product."""
        half = 2**30 if self.cuda else 2**24
        source = torch.ones(half // 4, device=self.device)
        target = torch.empty_like(source)
        edge, dtype = (8192, torch.bfloat16) if self.cuda else (512, torch.float32)
        a, b = (torch.randn(edge, edge, device=self.device, dtype=dtype) for _ in range(2))
        return {
            "copy": 2 * half / self.median(lambda: target.copy_(source)),
            "matmul": 2 * edge**3 / self.median(lambda: a @ b),
        }
