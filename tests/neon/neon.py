"""The native kernels compiled for NEON, in a process of qemu's: `make test-neon`.

As a plugin of pytest it adds the instruction set ``neon`` to those of this processor, so that every kernel test runs on
it. A call sends the memory of its tensors to that process, and copies what comes back over it.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimamba_kernels import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "neon"
FLAGS = (
    "-O2 -DNDEBUG -std=gnu++17 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi "
    "-Wno-maybe-uninitialized -fopenmp -static -DOMNIMAMBA_MODULE=neon"
).split()
COMPILERS = ("aarch64-linux-gnu-g++", *(f"aarch64-linux-gnu-g++-{version}" for version in range(15, 9, -1)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8)  # the order of DType


def why_not() -> str | None:
    """Why NEON cannot run here, or None."""
    if not any(map(shutil.which, COMPILERS)):
        return "g++ for aarch64 is not installed (Debian: g++-aarch64-linux-gnu)"
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed (Debian: qemu-user)"
    return None


def build() -> Path:
    """The driver with all native kernels, up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "csrc" / "bindings.cpp", BUILD)  # beside another bindings.h than its own
    shutil.copy(ROOT / "tests" / "neon" / "bindings.h", BUILD)
    headers = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    compiler = next(filter(shutil.which, COMPILERS))
    objects = []
    for source in (*sorted((ROOT / "csrc").glob("*/cpu*.cpp")), ROOT / "tests/neon/driver.cpp", BUILD / "bindings.cpp"):
        made = BUILD / f"{source.parent.name}-{source.stem}.o"
        if not made.exists() or made.stat().st_mtime < max(headers, source.stat().st_mtime):
            include = [f"-I{BUILD}", f"-I{ROOT / 'csrc'}"]
            subprocess.run([compiler, *FLAGS, *include, "-c", str(source), "-o", str(made)], check=True)
        objects.append(str(made))
    subprocess.run([compiler, *FLAGS, *objects, "-o", str(BUILD / "driver")], check=True)
    return BUILD / "driver"


class Program:
    """Kernels in a row, as the native module's."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.steps = kernels, []

    def add(self, name: str, **fields: Any) -> bool:
        if self.kernels.has_result[name]:
            return False
        self.steps.append(partial(self.kernels.call, name, **fields))
        return True

    def run(self) -> None:
        for step in self.steps:
            step()


class Kernels:
    """What stands in for the module ``_native_neon``."""

    vector_width = 4

    def __init__(self) -> None:
        command = ["qemu-aarch64", str(build())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.has_result = {}
        while line := self.process.stdout.readline().split():
            self.has_result[line[0].decode()] = line[1] == b"1"
        self.kernels = {name: partial(self.call, name) for name in self.has_result}
        self.Program = partial(Program, self)

    def call(self, kernel: str, **fields: Any) -> int | None:
        memory: dict[int, Tensor] = {}
        packed = [packed_field(name, value, memory) for name, value in fields.items()]
        send = [text(kernel), number(torch.get_num_threads()), number(len(memory))]
        for bytes_ in memory.values():
            send += [number(bytes_.numel()), bytes_.numpy().tobytes()]
        self.process.stdin.write(b"".join([*send, number(len(packed)), *packed]))
        self.process.stdin.flush()
        error = self.read(self.number()).decode()
        result = self.number()
        for bytes_ in memory.values():
            back = bytearray(self.read(bytes_.numel()))
            if back:
                bytes_.copy_(torch.frombuffer(back, dtype=torch.uint8))
        if error:
            raise ValueError(error)
        return result if self.has_result[kernel] else None

    def read(self, count: int) -> bytes:
        got = self.process.stdout.read(count)
        assert len(got) == count, f"the kernels' process has ended: {self.process.wait()}"
        return got

    def number(self) -> int:
        return struct.unpack("<q", self.read(8))[0]


def number(value: int) -> bytes:
    return struct.pack("<Q", int(value) & (2**64 - 1))


def text(value: str) -> bytes:
    return number(len(value)) + value.encode()


def packed_field(name: str, value: Any, memory: dict[int, Tensor]) -> bytes:
    """A member of a Params struct; the memory of a tensor is added to ``memory``, in bytes, under its address."""
    if isinstance(value, int | float):
        return text(name) + number(value if isinstance(value, int) else 0) + struct.pack("<d", value)
    if value is None:
        return text(name) + number(-1) + number(0) * 6
    if not isinstance(value, Tensor):
        if not hasattr(value, "__dlpack__"):
            raise TypeError(f"kernels take torch tensors and arrays with __dlpack__, not {type(value).__name__}")
        value = torch.from_dlpack(value)
    value = value.detach()
    storage = value.untyped_storage()
    address = storage.data_ptr()
    if address not in memory:
        memory[address] = torch.empty(0, dtype=torch.uint8).set_(storage)
    strides = [*value.stride(), 0, 0, 0, 0][:4]
    where = list(memory).index(address), value.data_ptr() - address if value.numel() else 0
    return text(name) + b"".join(map(number, (*where, DTYPES.index(value.dtype), *strides)))


@cache
def kernels() -> Kernels:
    return Kernels()


def install() -> None:
    """Adds ``neon`` to the instruction sets that the tests find."""
    load = native._load
    native._load = lambda name: kernels() if name == "neon" else load(name)
    native.instruction_sets.cache_clear()


reason = why_not()
if reason is not None:
    raise RuntimeError(reason)
install()
