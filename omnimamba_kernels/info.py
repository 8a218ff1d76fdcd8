"""What runs here: the data behind ``omnimamba info``."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import native
from .backends import backends

_PACKAGES = ("omnimamba", "torch", "numpy", "safetensors", "triton", "cupy-cuda13x", "transformers", "scikit-learn")


def collect() -> dict[str, Any]:
    """Everything ``omnimamba info`` shows, as plain data fit for JSON.

    Keys: ``versions`` (package to version, None where not installed), ``processor`` (name, machine, threads in use),
    ``gpu`` (name or None), ``instruction_sets`` (``compiled``, ``chosen``, and ``reasons``: why each cannot run, None
    where it can), ``backends`` (name to the reason why it cannot run, None where it can) and ``build`` (compiler,
    flags, and the reason for each part that was not built).
    """
    build = native.build_info()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "processor": {
            "name": _processor_name(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_sets": {
            "compiled": sorted(build.get("flags", {})),
            "chosen": native.instruction_set(),
            "reasons": native.instruction_sets(),
        },
        "backends": backends(),
        "build": build,
    }


def as_text(info: dict[str, Any]) -> str:
    """``collect()``'s answer in lines for a person."""
    sets, processor, build = info["instruction_sets"], info["processor"], info["build"]
    lines = [f"{name:16} {version or 'not installed'}" for name, version in info["versions"].items()]
    lines += [
        "",
        f"{'processor':16} {processor['name']} ({processor['machine']}), {processor['threads']} threads",
        f"{'GPU':16} {info['gpu'] or 'none'}",
        f"{'compiler':16} {build.get('compiler') or 'none: ' + (build.get('reason') or 'unknown')}",
        f"{'compiled for':16} {', '.join(sets['compiled']) or 'nothing'}",
        f"{'chosen':16} {sets['chosen'] or 'none'}",
        "",
    ]
    lines += [f"{name:16} {'ready' if reason is None else reason}" for name, reason in info["backends"].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
