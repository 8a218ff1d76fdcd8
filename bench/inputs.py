"""Inputs with the statistics of a trained layer's, by seed; and the backends to run them on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_model import MambaConfig

from .measure import Contender, worst_error

HEADDIM, STATE, CHUNK, WIDTH = 64, 128, 64, 4
"""p, n, the chunk length that FLOPs are counted at, and the convolution's width."""
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative error accepted, by the dtype of the output."""


def suffix(dtype: torch.dtype) -> str:
    """What the name of a case ends in: nothing for fp32."""
    return {torch.float32: "", torch.bfloat16: ", bf16", torch.float16: ", fp16"}[dtype]


@contextlib.contextmanager
def by_definition(model: torch.nn.Module) -> Iterator[None]:
    """The model on the reference backend, its scans in chunks of CHUNK, whose length changes a result by rounding alone
    and the time of a definition in proportion."""
    parts = [part for part in model.modules() if isinstance(getattr(part, "config", None), MambaConfig)]
    before = [part.config for part in parts]
    try:
        for part in parts:
            part.config = replace(part.config, chunk_size=CHUNK)
        with kernels.use_backend("reference"):
            yield
    finally:
        for part, config in zip(parts, before, strict=True):
            part.config = config


def own_backends() -> list[str]:
    """Our backends that can run on the CPU here, fastest first: a GPU's are bench.gpu_check's."""
    return [name for name, reason in kernels.backends().items() if reason is None and name in ("native", "reference")]


def scan(b: int, l: int, h: int, g: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The scan's x, dt, A, B, C, D, dt_bias; x, B and C are slices of one row, as in the mixer."""
    make = torch.Generator().manual_seed(l + h)
    row = torch.randn(b, l, h * HEADDIM + 2 * g * STATE, generator=make).to(dtype)
    x, B, C = row.split([h * HEADDIM, g * STATE, g * STATE], dim=-1)
    return {
        "x": x.unflatten(-1, (h, HEADDIM)),
        "dt": (0.5 * torch.randn(b, l, h, generator=make)).to(dtype),
        "A": -torch.empty(h).uniform_(1, 16, generator=make),
        "B": B.unflatten(-1, (g, STATE)),
        "C": C.unflatten(-1, (g, STATE)),
        "D": torch.ones(h),
        "dt_bias": torch.empty(h).uniform_(-6.0, -2.0, generator=make),
    }


def mixer(h: int, g: int = 1) -> dict[str, Any]:
    """The weights between the projections of a mixer with h heads, under the names of ``mamba_mixer_step``."""
    make = torch.Generator().manual_seed(h)
    channels = h * HEADDIM + 2 * g * STATE
    return {
        "conv1d_weight": 0.5 * torch.randn(channels, WIDTH, generator=make),
        "conv1d_bias": 0.1 * torch.randn(channels, generator=make),
        "dt_bias": torch.empty(h).uniform_(-6.0, -2.0, generator=make),
        "A": -torch.empty(h).uniform_(1, 16, generator=make),
        "D": torch.ones(h),
        "headdim": HEADDIM,
        "ngroups": g,
        "rmsnorm_weight": 1 + 0.1 * torch.randn(h * HEADDIM, generator=make),
        "norm_before_gate": False,
    }


def scan_flops(b: int, l: int, h: int, g: int = 1) -> float:
    """Forward FLOPs at chunk 64, C B^T once a group, nothing skipped: h (2 q p + 4 n p) + g 2 q n a token."""
    return b * l * (h * (2 * CHUNK * HEADDIM + 4 * STATE * HEADDIM) + g * 2 * CHUNK * STATE)


def double(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


def with_gradients(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def gradients(function: Callable[..., Tensor], values: dict[str, Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradient of every value, given the output's gradient."""
    y = function(**values)
    return y, *torch.autograd.grad(y, list(values.values()), upstream)


def backward_alone(
    name: str, make: Callable[[], Callable[..., Tensor]], values: dict[str, Tensor], upstream: Tensor,
    exact: tuple[Tensor, ...], bound: float,
) -> Contender:  # fmt: skip
    """A function's backward, on a graph that is kept; its output and gradients are checked against ``exact``."""
    leaves, graph = with_gradients(values), []

    def check() -> float:
        graph.append(make()(**leaves))
        return worst_error(gradients(make(), leaves, upstream), exact)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph[0], list(leaves.values()), upstream, retain_graph=True)

    return Contender(name, run, check, bound)
