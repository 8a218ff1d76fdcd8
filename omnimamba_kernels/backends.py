"""The one place that chooses which implementation of an operation runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import cuda, native, triton_launch

NAMES = ("cuda", "triton", "native", "reference")
OPS = ("causal_conv1d", "ssd_scan", "state_update", "gated_norm", "lora_linear", "mamba_mixer")
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("native", "reference"), "meta": ("reference",)}

_forced: ContextVar[str | None] = ContextVar("omnimamba_backend", default=None)


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")


@cache
def _module(op: str, name: str) -> ModuleType | None:
    path = f"{__package__}.{op}." + (name if name == "reference" else f"{name}_impl")
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


@cache
def _absent(name: str) -> str | None:
    """Why a back end cannot run any operation, or None."""
    if name == "triton":  # asked first: without triton its kernels cannot even be imported
        return triton_launch.why_not()
    if not any(_module(op, name) for op in OPS):
        return f"this version of omnimamba has no {name} kernels"
    return native.why_not() if name == "native" else None


def _cannot_run(name: str) -> str | None:
    return _absent(name) or (cuda.why_not() if name == "cuda" else None)


def backends() -> dict[str, str | None]:
    """Each back end and the reason why it cannot run here; None where it can."""
    return {name: _cannot_run(name) for name in NAMES}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every operation runs on back end ``name`` or raises RuntimeError with the reason it cannot.

    None gives the choice back to the library.
    """
    if name is not None:
        _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def type_of(device: torch.device) -> str:
    """``device.type``, which torch makes anew each time."""
    return device.type


def _runs_on(name: str, device: torch.device) -> bool:
    if name == "triton":
        return triton_launch.runs_on(device)
    return cuda.runs_on(device) if name == "cuda" else name in _ORDER.get(type_of(device), ())


def _why_not(op: str, name: str, device: torch.device, tensors: tuple, options: dict) -> str | None:
    if name == "reference":
        return None
    recorded = name == "triton" and triton_launch.is_recording()
    reason = None if recorded else _cannot_run(name)
    if reason:
        return reason
    module = _module(op, name)
    if module is None:
        return f"this version of omnimamba has no {name} kernel of {op}"
    if not _runs_on(name, device):
        return f"it does not run on device {device}"
    return module.why_not(*tensors, **options)


def choose(op: str, backend: str | None, *tensors: torch.Tensor | None, **options: Any) -> ModuleType:
    """The implementation of ``op`` for these arguments: the one named by the caller or by use_backend, else the first
    of the device's order that can run them. On a GPU the reference is never chosen silently."""
    device = tensors[0].device
    wanted = backend or _forced.get()
    if wanted is not None:
        _check_name(wanted)
        reason = _why_not(op, wanted, device, tensors, options)
        if reason:
            raise RuntimeError(f"{op}: backend {wanted!r} cannot run: {reason}")
        return _module(op, wanted)
    reasons = []
    for name in _ORDER.get(type_of(device), ()):
        reason = _why_not(op, name, device, tensors, options)
        if reason is None:
            return _module(op, name)
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or f"none is written for {device.type} devices"
    raise RuntimeError(f"{op}: no kernel can run on {device} ({why}); pass backend='reference' for plain PyTorch")
