"""The operations as one writes them in plain torch without a library: a peer by itself, and under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EAGER, COMPILED = "torch", "torch.compile"
EPS = 1e-5


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (b, d, l): depthwise causal convolution, then SiLU."""
    wide = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(wide[..., : x.shape[-1]])


def conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (b, d) after the state (b, d, w - 1), which changes in place."""
    window = torch.cat([state, x[..., None]], dim=-1)
    state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1) + bias)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    y = x.float() * F.silu(z.float())
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """state (b, h, p, n) in place; x, dt (b, h, p), A (h, p, n), B and C (b, g, n), D and dt_bias (h, p)."""
    dt = F.softplus(dt + dt_bias)
    if 1 < B.shape[1] < x.shape[1]:
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    new = state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B[:, :, None]
    state.copy_(new)
    return ((new * C[:, :, None]).sum(-1) + D * x).to(x.dtype)


def lora(x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> Tensor:
    """In the weights' own dtype, one adapter or none."""
    x = x.to(weight.dtype)
    y = F.linear(x, weight)
    return y if lora_A is None else y + F.linear(F.linear(x, lora_A[0]), lora_B[0])


def lora_of_tasks(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, task: Tensor) -> Tensor:
    """Each row of x with the adapter of its task (rows,)."""
    x = x.to(weight.dtype)
    y = F.linear(x, weight)
    for i in range(len(lora_A)):
        mine = (task == i).nonzero()[:, 0]
        y[mine] += F.linear(F.linear(x[mine], lora_A[i]), lora_B[i])
    return y


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile for fixed shapes; RuntimeError that says why where no code can be generated."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of compiler processes that stays beside the measurements
    functorch.donated_buffer = False  # a backward that is repeated keeps its graph
    torch.compiler.reset()  # a case is one shape: no others are kept, so that none counts as a recompilation
    fast = torch.compile(function, dynamic=False)

    def call(*args: Any, **named: Any) -> Any:
        try:
            return fast(*args, **named)
        except Exception as error:  # of the compiler: what it is made of depends on torch's version
            said = (str(error).strip().splitlines() or ["no message"])[0]
            raise RuntimeError(f"cannot run: torch.compile: {type(error).__name__}: {said}") from error

    return call


def peers(function: Callable[..., Any], compile_too: bool) -> list[tuple[str, Callable[[], Callable[..., Any]]]]:
    """Both, each by its name as something that makes the function, compiled once. A compilation takes ten seconds,
    longer than all that is timed of a case, so not every case has one."""
    eager = (EAGER, lambda: function)
    return [eager, (COMPILED, functools.cache(lambda: compiled(function)))] if compile_too else [eager]
