"""What the driver says of a GPU: its clocks, what holds them back, its energy; by nvidia-ml-py, where installed."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any

import torch

REASONS = {
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}
"""Bits of the driver's clocks event reasons that mean the chip could run faster; idle is none."""


def find(device: torch.device) -> Board | None:
    """The board of a CUDA device; None where nvidia-ml-py or the driver's library is missing."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return Board(nvml, handle)
    except Exception:  # each driver fails in its own way; the times do not need it
        return None


class Board:
    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def state(self) -> dict[str, Any]:
        """``clock_mhz`` of SMs and memory now, and what holds them back, in words: as far as they can be read."""
        asked = {"clock_mhz": self._sm_clock, "memory_clock_mhz": self._memory_clock, "throttled": self._held_back}
        found = {}
        for name, ask in asked.items():
            with contextlib.suppress(Exception):  # not every chip tells everything, nor every user may ask
                found[name] = ask()
        return found

    def _sm_clock(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)

    def _memory_clock(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_MEM)

    def _held_back(self) -> list[str]:
        bits = self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle)
        return [words for bit, words in REASONS.items() if bits & bit]

    def joules(self) -> float | None:
        """Since the driver was loaded; None where it cannot be read."""
        with contextlib.suppress(Exception):
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        return None
