"""The CUDA kernels compiled for the CPU (csrc/host_gpu), built into build/ when a test first asks for them."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from omnimamba_kernels import cuda

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # the modules are then those with the address sanitizer
MODULES = ROOT / "build" / f"emulator{'-sanitized' * SANITIZED}" / sys.implementation.cache_tag / "modules"


@cache
def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if os.environ.get("OMNIMAMBA_WITHOUT_EMULATOR"):
        return "it was switched off, for what it takes to build and to run"
    if not (ROOT / "csrc").is_dir():
        return "the sources are not here"
    missing = [tool for tool in ("pybind11", "cmake", "ninja") if importlib.util.find_spec(tool) is None]
    if missing or shutil.which("c++") is None:
        return f"{', '.join(missing) or 'a C++ compiler'} is missing"
    return None


@cache
def build() -> Path:
    """The folder with the compiled modules, up to date. A failure is an error, never a skipped test."""
    command = [sys.executable, "setup.py", "-q", "build_emulator", *["--sanitize=address"] * SANITIZED]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return MODULES


@cache
def module() -> ModuleType:
    """The kernels of csrc/*/cuda*.cu."""
    (path,) = build().glob("_native_emulated*.so")
    loader = importlib.machinery.ExtensionFileLoader("_native_emulated", str(path))
    spec = importlib.util.spec_from_file_location("_native_emulated", str(path), loader=loader)
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@cache
def library() -> ctypes.CDLL:
    """The small kernels of tests/emulator."""
    return ctypes.CDLL(str(build() / "emulator_kernels.so"))


def configure(seed: int = 1, early_copies: bool = False) -> None:
    """In which order the threads of the kernels in module() run, and whether cp.async and bulk stores land at once."""
    change = ctypes.CDLL(module().__file__).omnimamba_emulator_settings
    change(ctypes.c_uint64(seed), ctypes.c_int(early_copies))


def latest() -> str:
    """The name of the last kernel in module() that was started."""
    name = ctypes.CDLL(module().__file__).omnimamba_emulator_latest
    name.restype = ctypes.c_char_p
    return name().decode()


def started() -> list[str]:
    """The names of the kernels in module() that were started since this was last asked."""
    names = ctypes.CDLL(module().__file__).omnimamba_emulator_started
    names.restype = ctypes.c_char_p
    return names().decode().splitlines()


def leave_out(place: str | None) -> None:
    """What stands at one of places() is not done; "": it is, and places are noted; None: neither."""
    change = ctypes.CDLL(module().__file__).omnimamba_emulator_leave_out
    change(None if place is None else place.encode())


def places() -> list[str]:
    """Where the kernels in module() have waited or fenced while that was noted: "name file:line"."""
    names = ctypes.CDLL(module().__file__).omnimamba_emulator_places
    names.restype = ctypes.c_char_p
    return names().decode().splitlines()


SHARED = {80: 99 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that kernels are cut for, by the compute capability that the emulator shows. 80 stands for all
but Hopper: they are cut for the least of those, and held to what 8.0 has, into which every backward fits.
"""


@contextmanager
def emulated(capability: int = 80) -> Iterator[None]:
    """Within the block back end "cuda" takes CPU tensors and runs on the emulator, as on such a chip."""
    change = ctypes.CDLL(module().__file__).omnimamba_emulator_chip
    change(capability)
    try:
        with cuda.emulated(module(), SHARED[capability]):
            yield
    finally:
        change(80)
