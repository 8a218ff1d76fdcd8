"""Public functions of the gated RMSNorm, under mamba_ssm's name, and of the residual addition before a norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import autograd, checks
from ..backends import choose
from ..compile import traceable


def _fake(x: Tensor, *_: object) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]


@traceable(_fake)
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over groups of the last dimension, optionally gated by ``silu(z)`` after it or before it.

    ``norm(u) = u / sqrt(mean(u^2) + eps) weight + bias``; ``y = norm(x) silu(z)`` or, with ``norm_before_gate=False``,
    ``y = norm(x silu(z))``.

    Args:
        x: (..., d), any strides.
        weight: (d,).
        bias: (d,) or None.
        z: the gate, x's shape, or None.
        eps: added to the mean square.
        group_size: how many neighbours of the last dimension are normalised together; None: all d.
        norm_before_gate: the order of the two.
        backend: one of ``backends()``; None chooses.

    Returns:
        y like x. Gradients reach x, weight, bias and z.

    Raises:
        ValueError: a shape or group size does not fit. TypeError: a dtype does not. RuntimeError: the backend cannot.

    Source: RMSNorm (arXiv 1910.07467); Mamba-2 (arXiv 2405.21060), section 7.
    """
    _check(x, weight, bias, z, group_size)
    eps = checks.number("eps", eps, 0.0)
    group = x.shape[-1] if group_size is None else group_size
    if z is not None and z.dtype != x.dtype:  # neither is rounded to the other's type
        wide = torch.promote_types(x.dtype, z.dtype)
        x_wide, z_wide = x.to(wide), z.to(wide)
        y = rmsnorm_fn(x_wide, weight, bias, z_wide, eps, group_size, norm_before_gate, backend=backend)
        return y.to(x.dtype)
    tensors = (x, weight, bias, z)
    options = {"eps": eps, "group_size": group, "norm_before_gate": bool(norm_before_gate)}
    return autograd.run(choose("gated_norm", backend, *tensors, **options), *tensors, **options)[0]


@checks.once_a_kind
def _check(x, weight, bias, z, group_size) -> None:
    checks.tensors(x=x, weight=weight)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., d) with d at least 1")
    d = x.shape[-1]
    checks.shape("weight", weight, d, letters="(d,)")
    checks.shape("bias", bias, d, letters="(d,)")
    checks.shape("z", z, *x.shape, letters="x's shape")
    checks.divisible("x's last dimension", d, "group_size", d if group_size is None else group_size)
    checks.floating(x=x, weight=weight, bias=bias, z=z)
    checks.same_device(x=x, weight=weight, bias=bias, z=z)


def _fake_sum(residual: Tensor, *_: object) -> Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


@traceable(_fake_sum, mutates=("residual",))
@torch.no_grad()
def add_rmsnorm(
    residual: Tensor, update: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """``residual += update`` in place, and the RMSNorm of the sum: what stands between two layers of a decode step.

    Args:
        residual: (..., d), any strides; changes in place, rounded to its own dtype.
        update: residual's shape.
        weight: (d,).
        eps: added to the mean square.
        backend: one of ``backends()``; None chooses.

    Returns:
        ``residual / sqrt(mean(residual^2) + eps) weight`` like residual. No gradients.

    Raises:
        ValueError: a shape does not fit. TypeError: a dtype does not. The residual is then untouched.

    Source: RMSNorm (arXiv 1910.07467); fused_add_rms_norm of vLLM does the same.
    """
    _check_sum(residual, update, weight)
    eps = checks.number("eps", eps, 0.0)
    checks.writable(residual=residual)
    implementation = choose("gated_norm", backend, residual, weight, None, update, eps=eps,
                            group_size=residual.shape[-1], norm_before_gate=True)  # fmt: skip
    if hasattr(implementation, "add_forward"):
        y = implementation.add_forward(residual, update, weight, eps=eps)
    else:
        y = rmsnorm_fn(residual.add_(update), weight, None, eps=eps, backend=backend)
    increment_version((residual,))
    return y


@checks.once_a_kind
def _check_sum(residual, update, weight) -> None:
    checks.tensors(residual=residual, update=update, weight=weight)
    if residual.dim() < 1 or residual.shape[-1] < 1:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected (..., d) with d at least 1")
    checks.shape("update", update, *residual.shape, letters="residual's shape")
    checks.shape("weight", weight, residual.shape[-1], letters="(d,)")
    checks.floating(residual=residual, update=update, weight=weight)
    checks.same_device(residual=residual, update=update, weight=weight)
