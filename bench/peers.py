"""Others' implementations, where they are installed: the function, or the reason why there is none.

transformers keeps each step of its Mamba-2 mixer as a function of modeling_mamba2 with a fallback in plain torch.
That fallback is what its users run on a CPU, so it is timed by itself, with the library's own arguments: no
projection, and a norm in the mixer's rows alone, where ours has one.
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


def mixer(headdim: int, ngroups: int, eps: float = 1e-6) -> Callable[..., Tensor]:
    """What transformers' Mamba2Mixer does with a sequence between its projections, by its own functions; its arguments
    are named as those of ``mamba_split_conv1d_scan_combined``."""
    convolve, scan, normed = fallback("causal_conv1d_fn"), fallback("mamba2_chunk_scan"), _norms(eps)

    def call(zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
             rmsnorm_weight: Tensor) -> Tensor:  # fmt: skip
        z, row, dt = zxbcdt.split([len(rmsnorm_weight), len(conv1d_weight), len(A)], dim=-1)
        narrow = [w.to(row.dtype) for w in (conv1d_weight, conv1d_bias)]
        x, B, C = _parts(convolve(row.transpose(1, 2), *narrow, activation="silu").transpose(1, 2), headdim, ngroups, A)
        y = scan(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)
        return normed(y.flatten(2), z, rmsnorm_weight, ngroups).to(zxbcdt.dtype)

    return call


def mixer_step(headdim: int, ngroups: int, eps: float = 1e-6) -> Callable[..., Tensor]:
    """The same with one position, the states in place; named as ``mamba_mixer_step``."""
    convolve, update = fallback("causal_conv1d_update"), fallback("mamba2_selective_state_update")
    normed = _norms(eps)

    @torch.no_grad()
    def call(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor,
             dt_bias: Tensor, A: Tensor, D: Tensor, rmsnorm_weight: Tensor) -> Tensor:  # fmt: skip
        z, row, dt = zxbcdt.split([len(rmsnorm_weight), len(conv1d_weight), len(A)], dim=-1)
        narrow = [w.to(row.dtype) for w in (conv1d_weight, conv1d_bias)]
        row = convolve(row[..., None], conv_state, *narrow, activation="silu")[..., 0]
        x, B, C = _parts(row, headdim, ngroups, A)
        wide = [t[..., None].expand(*t.shape, headdim) for t in (dt, D, dt_bias)]
        A = A[:, None, None].expand(-1, headdim, B.shape[-1])
        y = update(ssm_state, x, wide[0], A, B, C, D=wide[1], dt_bias=wide[2], dt_softplus=True)
        return normed(y.flatten(1), z, rmsnorm_weight, ngroups).to(zxbcdt.dtype)

    return call


def _parts(row: Tensor, headdim: int, ngroups: int, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x by heads, B and C by groups."""
    dim = len(A) * headdim
    x, B, C = row.split([dim, *2 * [(row.shape[-1] - dim) // 2]], dim=-1)
    return x.unflatten(-1, (-1, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))


def _norms(eps: float) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """transformers' gated norm of y, z and weight in so many groups."""
    kept = cache(lambda width, groups: gated_norm(width, width // groups, eps))
    return lambda y, z, weight, groups: kept(len(weight), groups)(y, z, weight)


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
