"""The compiled CPU modules, one an instruction set, or the reason why there is none."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import large_pages

_PREFERENCE = ("avx512", "avx2", "neon", "generic")
_chosen: ContextVar[str | None] = ContextVar("omnimamba_instruction_set", default=None)
_vnni: ContextVar[bool] = ContextVar("omnimamba_vnni", default=True)
_amx: ContextVar[bool] = ContextVar("omnimamba_amx", default=True)
_recording: ContextVar[Recording | None] = ContextVar("omnimamba_recording", default=None)
_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8))


@cache
def _load(name: str) -> ModuleType | str:
    """The module of one instruction set, or why it cannot run."""
    path = f"{__package__}._native_{name}"
    if importlib.util.find_spec(path) is None:
        return f"{name} was not compiled"
    if name not in ("generic", "neon"):
        if not getattr(_load("generic").cpu_features(), name):
            return f"this processor has no {name}"
    return importlib.import_module(path)


def build_info() -> dict[str, Any]:
    """What the build recorded: compiler, flags, instruction sets, and the reason where nothing was compiled."""
    try:
        return dict(importlib.import_module(f"{__package__}._build_info").INFO)
    except ImportError:
        return {
            "reason": "omnimamba runs from a source tree that was never built: run 'make native' or 'pip install .'"
        }


@cache
def instruction_sets() -> dict[str, str | None]:
    """Each instruction set and why it cannot run; None where it can. The best comes first."""
    return {n: m if isinstance(m := _load(n), str) else None for n in _PREFERENCE}


@cache
def _best() -> str | None:
    return next((n for n, reason in instruction_sets().items() if reason is None), None)


def instruction_set() -> str | None:
    """The instruction set in use, or None."""
    return _chosen.get() or _best()


def why_not() -> str | None:
    if instruction_set() is not None:
        return None
    return build_info().get("reason") or f"no compiled instruction set fits this {platform.machine()} processor"


def cannot_store(*tensors: Tensor | None) -> str | None:
    """Why a native kernel cannot read these tensors, or None."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in _STORAGE:
            return f"native kernels compute in float32 and store float32, bfloat16 or float16, not {t.dtype}"
        if t.is_neg():
            return "native kernels read memory as it is, and one tensor is a negated view; .resolve_neg() makes a copy"
    return None


def empty(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
    """Uninitialised memory without gaps for a kernel's result, contiguous unless strides say otherwise.

    Large results lie in large pages, lent again when they are free; not what a recording keeps.
    """
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= size
    if _recording.get() is not None:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    return large_pages.empty(shape, dtype, strides)


def floats(*shape: int) -> Tensor:
    """Uninitialised float32 memory for a kernel, whatever the default dtype and device."""
    return empty(shape, torch.float32)


def stored_as(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    """``t`` in ``dtype``, most often ``t`` itself: to ask torch for that takes longer than some kernels."""
    return t if t is None or t.dtype is dtype else t.to(dtype)


@contextmanager
def _within(variable: ContextVar[Any], value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def use_instruction_set(name: str) -> AbstractContextManager[None]:
    """Within the block, and in this thread, the native kernels are those compiled for ``name``."""
    reason = instruction_sets().get(name, f"unknown instruction set {name!r}")
    if reason:
        raise RuntimeError(f"native: {reason}")
    return _within(_chosen, name)


def has_vnni() -> bool:
    """Whether kernels of this processor's ``avx512`` have AVX-512 VNNI, which sums products of bytes."""
    return instruction_sets()["avx512"] is None and _load("generic").cpu_features().avx512_vnni


def may_use_vnni() -> bool:
    return _vnni.get()


def without_vnni() -> AbstractContextManager[None]:
    """Within the block, and in this thread, the native kernels run as on a processor without AVX-512 VNNI."""
    return _within(_vnni, False)


@cache
def has_amx() -> bool:
    """Whether kernels of this processor's ``avx512`` have matrix registers that multiply bfloat16, and may use them."""
    return instruction_sets()["avx512"] is None and _load("avx512").may_use_tiles()


def may_use_amx() -> bool:
    return _amx.get() and has_amx() and instruction_set() == "avx512"


def without_amx() -> AbstractContextManager[None]:
    """Within the block, and in this thread, the native kernels run as on a processor without matrix registers."""
    return _within(_amx, False)


class CannotCapture(RuntimeError):
    """Something in a function to be recorded is not a native kernel; the message names it."""


def refuse_while_recording(what: str) -> None:
    """CannotCapture where kernels are being recorded: what starts beside them would run now and be lost."""
    if _recording.get() is not None:
        raise CannotCapture(f"capture: {what} is not a native kernel of omnimamba; only those can be replayed")


class Recording:
    """The kernels called while it was on, as one program of the native module, and the tensors they work on."""

    def __init__(self) -> None:
        self._module = _load(_chosen.get() or _best())
        self._program = self._module.Program()
        self._alive: list[Any] = []

    def on(self) -> AbstractContextManager[None]:
        """Within the block, and in this thread, kernels are recorded instead of run."""
        return _within(_recording, self)

    def take(self, kernel: str, fields: dict[str, Any]) -> Any:
        if not self._program.add(kernel, **fields):
            return self._module.kernels[kernel](**fields)
        self._alive += [value for value in fields.values() if hasattr(value, "__dlpack__")]

    def run(self) -> None:
        self._program.run()


def call(kernel: str, **fields: Any) -> Any:
    """Runs a compiled kernel on a Params struct filled by field name: tensors become views, None an absent view.

    Arrays of NumPy, and all others that speak DLPack, are taken as well. Threads follow ``torch.get_num_threads()``.
    """
    recording = _recording.get()
    if recording is not None:
        return recording.take(kernel, fields)
    return _load(_chosen.get() or _best()).kernels[kernel](**fields)
