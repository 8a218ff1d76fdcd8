"""Which machine, which software, which commit: what a number means nothing without."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from omnimamba_kernels import info

ROOT = Path(__file__).resolve().parents[1]
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB where the system does not tell."""
    sizes = [_bytes((index / "size").read_text()) for index in _CACHES.glob("index*") if (index / "size").exists()]
    return max(sizes, default=32 * 2**20)


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]?)\s*", text).groups()
    return int(number) * _UNITS.get(unit, 1)


def slug(name: str) -> str:
    """A folder name for a device: letters and digits joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str:
    """The short commit hash, with ``-dirty`` where the packages, csrc or bench differ from it."""
    short = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "omnimamba_kernels", "omnimamba_model", "csrc", "bench/*.py")
    return (short + ("-dirty" if changed else "")) if short else "unknown"


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def describe(gpu: bool = True) -> dict[str, Any]:
    """The machine as plain data: device (a GPU where there is one and it counts), threads, instruction set, caches,
    memory, versions, commit."""
    known = info.collect()
    processor = known["processor"]
    return {
        "device": (gpu and known["gpu"]) or processor["name"],
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": known["instruction_sets"]["chosen"],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "memory": memory(),
        "versions": {name: version for name, version in known["versions"].items() if version},
        "backends": known["backends"],
        "commit": commit(),
    }


def memory() -> int | None:
    """Bytes of memory; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return int(re.search(r"MemTotal:\s+(\d+) kB", meminfo.read_text()).group(1)) * 1024
