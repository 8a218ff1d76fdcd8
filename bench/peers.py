"""Others' implementations, where they are installed: the function, or the reason why there is none.

transformers keeps each step of its Mamba-2 mixer as a function of modeling_mamba2 with a fallback in plain torch.
That fallback is what its users run on a CPU, so it is timed by itself, with the library's own arguments: no
projection, no norm.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .rates import torch_matmul_rate

TRANSFORMERS = "transformers"


@cache
def mamba2() -> ModuleType | str:
    """transformers' modeling_mamba2, or why it is not there."""
    try:
        module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    except ImportError as missing:
        return f"transformers 5.23 or later is not installed ({missing})"
    if not hasattr(module, "mamba2_chunk_scan"):
        return f"transformers {metadata.version(TRANSFORMERS)} has no mamba2_chunk_scan: 5.23 or later is needed"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return module


def fallback(name: str) -> Callable[..., Any]:
    """The plain torch function called ``name`` in modeling_mamba2; RuntimeError with the reason where there is none."""
    module = mamba2()
    if isinstance(module, str):
        raise RuntimeError(f"cannot run: {module}")
    return inspect.unwrap(getattr(module, name))


def gated_norm(width: int, group: int, eps: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' gated norm of x, z and weight, on one layer that is made once."""
    layer = fallback("MambaRMSNormGated")(width, group_size=group, eps=eps)

    def call(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        if weight.requires_grad:
            return torch.func.functional_call(layer, {"weight": weight}, (x, z))
        if layer.weight.data_ptr() != weight.data_ptr():
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer(x, z)

    return call


def label() -> str:
    """transformers with its version."""
    return TRANSFORMERS if isinstance(mamba2(), str) else f"{TRANSFORMERS} {metadata.version(TRANSFORMERS)}"


def too_slow(dtype: torch.dtype, rows: int, flops: float, limit: float = 2.0) -> str | None:
    """Why torch is not timed on a product, or None: it would take longer than ``limit`` seconds."""
    predicted = flops / torch_matmul_rate(dtype, min(rows, 64))
    if predicted <= limit:
        return None
    return f"torch's {dtype} product would take {predicted:.0f} s here"


def peft(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float = 1.0) -> torch.nn.Module:
    """PEFT's own layer on weight (out, in) and one adapter (1, r, in) and (1, out, r), as its users call it.

    RuntimeError with the reason where it is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError as missing:
        raise RuntimeError(f"cannot run: PEFT is not installed ({missing})") from missing
    (out, width), rank = weight.shape, lora_A.shape[1]
    base = torch.nn.Linear(width, out, bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    options = dict(r=rank, lora_alpha=scale * rank)
    layer = Linear(base, "default", LoraConfig(**options), **options)
    layer.lora_A["default"].weight = torch.nn.Parameter(lora_A[0])
    layer.lora_B["default"].weight = torch.nn.Parameter(lora_B[0])
    return layer


def peft_label() -> str:
    """PEFT with its version."""
    try:
        return f"PEFT {metadata.version('peft')}"
    except metadata.PackageNotFoundError:
        return "PEFT"
