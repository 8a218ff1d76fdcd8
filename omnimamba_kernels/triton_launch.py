"""What every Triton kernel stands on: whether it can run, for which chip, with which settings, and its start.

Host code (``<op>/triton_impl.py``) never asks torch.cuda and never writes ``kernel[grid]``: it takes a ``Target``,
reads its launch table through ``settings`` and starts kernels through ``launch``. So the same host code also runs on
meta tensors inside ``recording``, where launches are noted for a chip that is not here and nothing is computed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native

NO_BFLOAT16 = "Triton's interpreter computes bfloat16 wrongly: interpret in float16 or float32"
_KINDS = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip
_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8))

LONGEST = 2**29
"""Positions of a dimension that kernels count, in 32 bits."""


@dataclass(frozen=True)
class Target:
    """A chip as launch tables see it; ``shared_bytes`` is the most that one program may have."""

    arch: str  # "sm_90", "gfx942" or "interpreter"
    multiprocessors: int
    shared_bytes: int
    warp: int = 32


INTERPRETER = Target("interpreter", 4, 232_448)
# What kernels are compiled for ahead of time: A100, H100 and H200, B200, RTX 5090 and PRO 6000, MI300X.
TARGETS = {
    t.arch: t
    for t in (
        Target("sm_80", 108, 166_912),
        Target("sm_90", 132, 232_448),
        Target("sm_100", 148, 232_448),
        Target("sm_120", 170, 101_376),
        Target("gfx942", 304, 65_536, warp=64),
    )
}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel as it was noted: what Triton's own specialisation sees of the arguments, not their values.

    ``kinds`` has the type of each argument that is not constant, e.g. ("x", "*fp16 16") for a pointer and ("M", "i32")
    for a number; a second word 16 says that address or value is divisible by 16. ``constants`` has the constexprs and
    the arguments that are None or 1; ``options`` has num_warps, num_stages and the like. What a kernel says not to
    specialise is of its type alone, 1 or a multiple of 16 or not.
    """

    kernel: Any
    grid: tuple[int, ...]
    kinds: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


_HERE = nullcontext()
_compiled: set[tuple] = set()  # what ``together`` has seen: kernels with their constants and options
_waiting: ContextVar[list[tuple] | None] = ContextVar("omnimamba_waiting_launches", default=None)
_recorded: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("omnimamba_recorded_launches", default=None)


@cache
def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them, as it was asked when it was imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def why_not() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'omnimamba[gpu]'"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return (
            "Triton kernels need a GPU, and torch finds none (with TRITON_INTERPRET=1 Triton interprets them instead)"
        )
    reasons = [_too_old(_target(index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def is_recording() -> bool:
    return _recorded.get() is not None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can take tensors of this device: a GPU's; a CPU's while interpreting; meta while recording."""
    if device.type == "meta":
        return is_recording()
    return device.type == "cuda" or (device.type == "cpu" and interpreting())


def cannot_store(*tensors: Tensor | None) -> str | None:
    """Why a Triton kernel cannot read these tensors, or None."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in _STORAGE:
            return f"Triton kernels compute in float32 and store float32, bfloat16 or float16, not {t.dtype}"
        if t.dtype is torch.bfloat16 and interpreting() and not is_recording():
            return NO_BFLOAT16
        if t.is_neg():
            return "Triton kernels read memory as it is, and one tensor is a negated view; .resolve_neg() makes a copy"
        if not runs_on(t.device):
            return f"Triton kernels do not run on device {t.device}"
        if max(t.shape, default=0) > LONGEST:
            return f"Triton kernels count at most {LONGEST} positions of a dimension, one tensor is {tuple(t.shape)}"
    return _too_old(target_of(tensors[0])) if tensors else None


def _too_old(target: Target) -> str | None:
    if target.arch.startswith("sm_") and int(target.arch[3:]) < 80:
        return f"Triton kernels need an NVIDIA GPU from sm_80 (Ampere) on, and this one is {target.arch}"
    return None


def target_of(t: Tensor) -> Target:
    """The chip that ``t`` lives on; inside ``recording`` the one that was asked for."""
    noted = _recorded.get()
    if noted is not None:
        return noted[0]
    return INTERPRETER if interpreting() else _target(t.device.index)


@cache
def _target(index: int) -> Target:
    chip = torch.cuda.get_device_properties(index)
    arch = chip.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{chip.major}{chip.minor}"
    known = TARGETS[arch].shared_bytes if arch in TARGETS else chip.shared_memory_per_block
    shared = getattr(chip, "shared_memory_per_block_optin", known)  # absent before torch 2.7
    return Target(arch, chip.multi_processor_count, shared, chip.warp_size)


def settings(op: str, kernel: str, target: Target, **sizes: int) -> dict[str, int]:
    """How to launch a kernel: ``use`` of the first rule of ``<op>/launch.json`` whose chip and size ranges fit.

    A rule's ``arch`` lists prefixes of ``target.arch``, its ``when`` gives inclusive ranges of ``sizes``; a rule
    without either always fits, and the last rule of a kernel has neither.
    """
    return dict(_settings(op, kernel, target.arch, tuple(sizes.items())))


@lru_cache(maxsize=4096)
def _settings(op: str, kernel: str, arch: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    given = dict(sizes)
    for rule in table(op)[kernel]:
        fits_chip = any(arch.startswith(prefix) for prefix in rule.get("arch", [""]))
        if fits_chip and all(low <= given[name] <= high for name, (low, high) in rule.get("when", {}).items()):
            return rule["use"]
    raise RuntimeError(
        f"{op}/launch.json: no rule of {kernel!r} fits {arch} and {given}; its last rule must always fit"
    )


@cache
def table(op: str) -> dict[str, list[dict[str, Any]]]:
    """The launch table of an operation: kernel name to rules."""
    return json.loads((Path(__file__).parent / op / "launch.json").read_text())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constexprs_and_options: Any) -> None:
    """Starts a kernel on the device of its first tensor and that device's current stream; an empty grid starts nothing.

    Positional arguments are the kernel's own in their order; constexprs and options (num_warps, num_stages) have names.
    """
    native.refuse_while_recording(f"the Triton kernel {kernel.__name__}")
    if 0 in grid:
        return
    if any(size > 65_535 for size in grid[1:]):
        raise RuntimeError(f"{kernel.__name__}: grid {grid} is larger than 65535 beyond its first axis")
    noted = _recorded.get()
    if noted is not None:
        noted[1].append(_note(kernel, grid, args, constexprs_and_options))
        return
    if interpreting():
        _mend_interpreter()
    waiting = _waiting.get()
    if waiting is not None:
        kind = (kernel.fn, *constexprs_and_options.values())
        if waiting or kind not in _compiled:
            waiting.append((kind, kernel, grid, args, constexprs_and_options))
            return
    _start(kernel, grid, args, constexprs_and_options)


@contextmanager
def together() -> Iterator[None]:
    """Kernels of the block that are new are compiled side by side, in threads; from the first of them on all start at
    the block's end, in their order. The block's host code must not read what its kernels write."""
    if _waiting.get() is not None or interpreting():
        yield
        return
    waiting: list[tuple] = []
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
    new = {kind: call for kind, *call in waiting if kind not in _compiled}
    if len(new) > 1:
        _compile(list(new.values()))
    for _, *call in waiting:
        _start(*call)
    _compiled.update(new)


def _compile(calls: list[list]) -> None:
    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(len(calls)) as pool, AsyncCompileMode(pool):
        for kernel, grid, args, named in calls:
            with _device_of(args):
                kernel.warmup(*args, grid=grid, **named)


def _start(kernel: Any, grid: tuple[int, ...], args: tuple, named: dict[str, Any]) -> None:
    with _device_of(args):
        kernel[grid](*args, **named)


def _device_of(args: tuple) -> AbstractContextManager:
    device = next(a for a in args if isinstance(a, Tensor)).device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


@cache
def _mend_interpreter() -> None:
    """The interpreter of Triton 3.6 takes int() of arrays of one element, which numpy has refused since 2.4; 3.9's
    refuses masks in which it holds the comparison of two numbers as integers."""
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    load, store = builder.create_masked_load, builder.create_masked_store

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def booleans(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    interpreter._patch_lang_tensor = patch_with_index
    builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, booleans(mask), *rest)
    builder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, booleans(mask), *rest)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Within the block Triton kernels accept meta tensors, and their launches are noted for ``target``, not run."""
    launches: list[Launch] = []
    token = _recorded.set((target, launches))
    try:
        yield launches
    finally:
        _recorded.reset(token)


def _note(kernel: Any, grid: tuple[int, ...], args: tuple, named: dict[str, Any]) -> Launch:
    kinds, constants = [], [(name, value) for name, value in named.items() if name in kernel.arg_names]
    general = {each.name for each in getattr(kernel, "params", ()) if each.do_not_specialize}
    for name, value in zip(kernel.arg_names, args, strict=False):
        if value is None or (type(value) is int and value == 1 and name not in general):
            constants.append((name, value))
        else:
            kind = _kind(value)
            kinds.append((name, kind.split()[0] if name in general else kind))
    options = tuple((name, value) for name, value in named.items() if name not in kernel.arg_names)
    return Launch(kernel, tuple(grid), tuple(kinds), tuple(constants), options)


def _kind(value: Any) -> str:
    """The type under which Triton compiles for this argument, and whether it may rely on a multiple of 16."""
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return f"*{_KINDS[value.dtype]}" + " 16" * aligned
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + " 16" * (value % 16 == 0)
