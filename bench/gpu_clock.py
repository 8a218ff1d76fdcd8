"""Time on the device that a tensor lives on: a GPU's by its own events and with a cold cache, a CPU's by the clock."""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from omnimamba_kernels.capture import recover

from . import gpu_board

SHORT = 1e-3
"""Seconds below which launches can be what a call takes: such a one is also timed as a CUDA graph."""
ENERGY_FOR = 1.0
"""Seconds over which energy is counted: the driver's counter moves every 20 to 100 ms."""
LONG = 2.0
"""Seconds from which on a call is timed once: it has been checked and so was run before."""
LOOK = 0.02
"""Seconds between two looks at the clocks."""


class Clock:
    """Medians of calls on one device; on a GPU each call after everything was pushed out of its cache."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.budget = device, seconds
        self.cuda = device.type == "cuda"
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28) if self.cuda else 0
        self.board = gpu_board.find(device) if self.cuda else None
        self._other = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """In this block belongs all that is timed, from its inputs on: torch can capture a backward on the stream of
        its forward alone, and nothing on the default one."""
        return torch.cuda.stream(self.stream) if self.cuda else contextlib.nullcontext()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def median(self, call: Callable[[], object], most: int = 50) -> float:
        """Seconds of a call."""
        return statistics.median(self.times(call, most))

    def times(self, call: Callable[[], object], most: int = 50) -> list[float]:
        """Seconds of each of as many calls as the budget pays for, three at least after one that warms up; of what
        takes LONG that one alone."""
        first = self._once(call)
        if first >= LONG:
            return [first]
        taken, start = [self._once(call)], time.perf_counter()
        while len(taken) < 3 or (len(taken) < most and time.perf_counter() - start < self.budget):
            taken.append(self._once(call))
        return taken

    def replayed(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph; itself where there is no GPU."""
        return self._captured(call) if self.cuda else call

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

    def held(self) -> int:
        """Bytes of tensors on a GPU now; ``peak`` begins here."""
        if not self.cuda:
            return 0
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Bytes of tensors at their height since ``held``; 0 on a CPU, whose memory is not counted here."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else 0

    @contextlib.contextmanager
    def watched(self, row: dict[str, Any]) -> Iterator[None]:
        """Adds clocks, medians of what the driver tells every LOOK seconds while the block runs, and all that slowed
        them meanwhile; of what it does not tell, nothing."""
        if self.board is None:
            yield
            return
        seen, ended = [self.board.state()], threading.Event()

        def look() -> None:
            while not ended.wait(LOOK):
                seen.append(self.board.state())

        beside = threading.Thread(target=look, daemon=True)
        beside.start()
        try:
            yield
        finally:
            ended.set()
            beside.join()
        during = seen[1:] or seen  # the first look is at an idle chip
        for key in ("clock_mhz", "memory_clock_mhz"):
            told = [state[key] for state in during if key in state]
            row |= {key: statistics.median_low(told)} if told else {}
        told = [state["throttled"] for state in during if "throttled" in state]
        row |= {"throttled": list(dict.fromkeys(words for each in told for words in each))} if told else {}

    def more(
        self, call: Callable[[], object], taken: float, graph: bool = False, energy: bool = False
    ) -> dict[str, Any]:
        """Of a GPU: seconds as a CUDA graph of what is over in a millisecond, and of any call with ``graph``; with
        ``energy`` joules a call, of the graph where there is one, where they can be read."""
        found: dict[str, Any] = {}
        if self.cuda and (graph or taken < SHORT):
            try:
                replay = self._captured(call)
                found["graph_seconds"] = self.median(replay)
                call, taken = replay, found["graph_seconds"]
            except Exception as error:  # what a graph cannot hold is told
                found["graph_reason"] = (str(error).strip().splitlines() or ["no message"])[0]
        joules = self._joules(call, taken) if energy and self.board is not None and taken < LONG else None
        return found if joules is None else found | {"joules": joules}

    def _joules(self, call: Callable[[], object], taken: float) -> float | None:
        """Back to back for ENERGY_FOR seconds by the clock, looked at every LOOK seconds of calls; None where the
        driver does not tell."""
        together, count = max(1, round(LOOK / max(taken, 1e-6))), 0
        self.wait()
        before, start = self.board.joules(), time.perf_counter()
        if before is None:
            return None
        while time.perf_counter() - start < ENERGY_FOR:
            for _ in range(together):
                call()
            self.wait()
            count += together
        after = self.board.joules()
        return None if after is None else (after - before) / count

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call's kernels as a graph: its replay."""
        for _ in range(3):
            call()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except Exception:
            recover(here, self._other)
            raise
        return graph.replay

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
