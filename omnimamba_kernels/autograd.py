"""The one bridge between an implementation's forward and backward and torch's autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: ModuleType, options: dict, *tensors: Tensor | None):
        outputs, saved = implementation.forward(*tensors, save=True, **options)
        ctx.implementation, ctx.options = implementation, options
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        needs = ctx.needs_input_grad[2:]
        return None, None, *ctx.implementation.backward(ctx.saved_tensors, grads, needs, **ctx.options)


def run(implementation: ModuleType, *tensors: Tensor | None, **options: Any) -> tuple[Tensor | None, ...]:
    """Runs ``implementation.forward(*tensors, **options)`` so that its outputs can be differentiated.

    An implementation exports

    * ``forward(*tensors, save, **options) -> (outputs, saved)``: two tuples; ``save``: a backward will follow,
    * ``backward(saved, grads, needs, **options) -> grads``: one gradient a tensor of ``forward``; ``needs`` says which
      are wanted, an entry of ``grads`` is None where that output was not used.

    The reference has no ``backward``: its forward is differentiable PyTorch.
    """
    recorded = False
    if torch.is_grad_enabled():
        for t in tensors:
            recorded = recorded or (t is not None and t.requires_grad)
    if recorded and hasattr(implementation, "backward"):
        return _Run.apply(implementation, options, *tensors)
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):  # arithmetic is float32 at least, whatever a caller's autocast says
        with torch.autocast(device, enabled=False):
            return implementation.forward(*tensors, save=recorded, **options)[0]
    return implementation.forward(*tensors, save=recorded, **options)[0]
