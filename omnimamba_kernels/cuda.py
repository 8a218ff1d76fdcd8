"""The compiled CUDA module, or the reason why it cannot run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native, nvrtc

_OLDEST = (8, 0)  # compute capability: the first with cp.async and bfloat16 matrix instructions
_emulator: ContextVar[ModuleType | None] = ContextVar("omnimamba_cuda_emulator", default=None)
_emulated_shared: ContextVar[int] = ContextVar("omnimamba_cuda_emulated_shared", default=99 << 10)
_NUMBERS = frozenset((int, float, bool, type(None)))
_DLPACK_CPU, _DLPACK_CUDA = 1, 2
_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8))


@cache
def _load() -> ModuleType | str:
    """The compiled module, or why it cannot run here."""
    path = f"{__package__}._native_cuda"
    if importlib.util.find_spec(path) is None:
        built = native.build_info()
        reason = built.get("cuda", {}).get("reason") or built.get("reason")
        return reason or "omnimamba was installed without its CUDA kernels"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU (torch.cuda.is_available() is False)"
    module = importlib.import_module(path)
    reason = module.why_no_device()
    if reason:
        return f"the CUDA runtime cannot start: {reason}"
    if hasattr(module, "compile_with"):  # built without nvcc
        if nvrtc.why_not() is not None:
            return nvrtc.why_not()
        module.compile_with(_compile, torch.cuda.current_device)
    return module


def _compile(source: str, expression: str) -> tuple[bytes, str]:
    """A kernel for the current device."""
    return nvrtc.kernel(source, expression, torch.cuda.get_device_capability())


def why_not() -> str | None:
    loaded = _emulator.get() or _load()
    return loaded if isinstance(loaded, str) else None


def runs_on(device: torch.device) -> bool:
    """Whether tensors of this device can be given to the kernels: those of a GPU, or of the CPU under an emulator."""
    return device.type == ("cpu" if _emulator.get() else "cuda")


def no_code_for(capability: tuple[int, int], architectures: Iterable[str]) -> str | None:
    """Why a module compiled for these architectures ("80", "90a") cannot run on a chip of that compute capability.

    Machine code serves the later chips of its own generation; of the first architecture without a letter there is PTX
    too, which serves all later chips.
    """
    major, minor = capability
    plain = [divmod(int(arch), 10) for arch in architectures if arch.isdigit()]
    served = f"{major}{minor}a" in architectures or any(m == major and n <= minor for m, n in plain)
    if served or (plain and plain[0] <= capability):
        return None
    if capability < _OLDEST:
        return f"it has compute capability {major}.{minor}; 8.0 is needed"
    return (
        f"omnimamba was compiled for compute capabilities {', '.join(architectures)}, this is {major}.{minor}: "
        f"reinstall, or name it in OMNIMAMBA_CUDA_ARCHS"
    )


@cache
def _cannot_run_on(index: int) -> str | None:
    built = native.build_info().get("cuda", {})
    compiled = ["80"] if built.get("on_demand") else built.get("architectures", [])  # NVRTC serves what is later, too
    reason = no_code_for(torch.cuda.get_device_capability(index), compiled)
    return reason and f"{torch.cuda.get_device_name(index)}: {reason}"


def cannot_take(*tensors: Tensor | None) -> str | None:
    """Why a CUDA kernel cannot read these tensors, or None."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in _STORAGE:
            return f"CUDA kernels compute in float32 and store float32, bfloat16 or float16, not {t.dtype}"
        if t.is_neg():
            return "CUDA kernels read memory as it is, and one tensor is a negated view; .resolve_neg() makes a copy"
    device = next(t.device for t in tensors if t is not None)
    return _cannot_run_on(device.index) if device.type == "cuda" else None


def limits(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors there are, and how many bytes of shared memory a block may ask for.

    The emulator counts few, so that small shapes are cut as large ones are on a chip.
    """
    return (16, _emulated_shared.get()) if device.type == "cpu" else _limits(device.index)


@cache
def _limits(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, found.shared_memory_per_block_optin


@contextmanager
def emulated(module: ModuleType, shared_bytes: int = 99 << 10) -> Iterator[None]:
    """For tests: within the block the CUDA kernels are those of ``module``, compiled for the CPU, on CPU tensors.

    A block may then ask for ``shared_bytes``: what the least chip has, or a certain one.
    """
    token, shared = _emulator.set(module), _emulated_shared.set(shared_bytes)
    try:
        yield
    finally:
        _emulator.reset(token)
        _emulated_shared.reset(shared)


def call(kernel: str, device: torch.device, **fields: Any) -> Any:
    """Runs a compiled kernel on a Params struct filled by field name: tensors become views, None an absent view.

    Arrays of CuPy, and all others that speak DLPack, are taken as well. It goes to the device's current stream of
    torch, and the call returns before the GPU has done it. Raises ValueError where an array lies elsewhere.
    """
    native.refuse_while_recording(f"the CUDA kernel {kernel}")
    _check_places(kernel, device, fields)
    emulator = _emulator.get()
    if emulator is not None:
        return emulator.kernels[kernel](**fields)
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(f"{kernel}: the CUDA kernels cannot run: {module}")
    function = module.kernels[kernel]
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return function(stream=stream, **fields)
    with torch.cuda.device(device):
        return function(stream=stream, **fields)


def _check_places(kernel: str, device: torch.device, fields: dict[str, Any]) -> None:
    """Every array on ``device``: to read another's memory fails later, and ends all work of the process on the GPU."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for name, value in fields.items():
        if type(value) in _NUMBERS:
            continue
        place = value.device if isinstance(value, Tensor) else _place_of(value)
        if place is not None and place != device:
            raise ValueError(f"{kernel}: {name}: got an array on {place}, expected one on {device}")


def _place_of(array: object) -> torch.device | None:
    """Where an array of another library lies; None where that is left to whoever reads it."""
    asked = getattr(array, "__dlpack_device__", None)
    kind, index = asked() if asked else (0, 0)
    return torch.device("cuda", index) if kind == _DLPACK_CUDA else torch.device("cpu") if kind == _DLPACK_CPU else None
