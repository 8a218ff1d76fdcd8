"""The one bridge between an implementation's forward and backward and torch's autograd."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import type_of


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: ModuleType, options: dict, *tensors: Tensor | None):
        outputs, saved = implementation.forward(*tensors, save=True, **options)
        ctx.implementation, ctx.options, ctx.context = implementation, options, copy_context()
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        needs = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return None, None, *(None for _ in needs)
        # In the context of the forward: its choice of back end and of instruction set, which saved tensors depend on.
        backward = partial(ctx.implementation.backward, ctx.saved_tensors, grads, needs, **ctx.options)
        return None, None, *ctx.context.copy().run(backward)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def run(implementation: ModuleType, *tensors: Tensor | None, **options: Any) -> tuple[Tensor | None, ...]:
    """Runs ``implementation.forward(*tensors, **options)`` so that its outputs can be differentiated.

    An implementation exports

    * ``forward(*tensors, save, **options) -> (outputs, saved)``: two tuples; ``save``: a backward will follow,
    * ``backward(saved, grads, needs, **options) -> grads``: one gradient a tensor of ``forward``; ``needs`` says which
      are wanted, an entry of ``grads`` is None where that output was not used.

    The reference has no ``backward``: its forward is differentiable PyTorch.
    """
    recorded = wants_gradients(*tensors)
    if hasattr(implementation, "backward"):
        _refuse_forward_mode(tensors)
        if recorded:
            return _Run.apply(implementation, options, *tensors)
    device = type_of(tensors[0].device)
    # Arithmetic is float32 at least, whatever a caller's autocast says. Of meta tensors torch cannot say.
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return implementation.forward(*tensors, save=recorded, **options)[0]
    return implementation.forward(*tensors, save=recorded, **options)[0]


def _refuse_forward_mode(tensors: tuple[Tensor | None, ...]) -> None:
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("kernels have no forward-mode derivatives; pass backend='reference', whose PyTorch has them")
