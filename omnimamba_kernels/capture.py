"""A fixed sequence of native kernels in one call: for decode loops, whose kernels take less time than their Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native
from .native import CannotCapture

_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "full")
"""What torch may still do: make memory, or a constant, which a replay finds as it was made. And views."""


class _OnlyMemory(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch.compile does not get here, and to keep it out torch would import it, a second and 130 MB."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in _MEMORY and not function.is_view:
            native.refuse_while_recording(str(function))
        return function(*args, **(kwargs or {}))


def capture(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """Records the native kernels that ``function(*inputs)`` would run; returns a function that runs them in one call.

    The idea of a CUDA graph, on a CPU: a decode step of a small model spends much of its time in the Python around
    its kernels. ``function`` is called once and its kernels are noted, not run: nothing is computed and no state moves.
    The returned function takes inputs of the same shapes and dtypes, copies them to where the kernels read, runs the
    kernels in their order and returns a copy of the output.

    Values may change between calls: of the inputs, of the weights and states that ``function`` closes over. Their
    memory may not: a weight that is replaced, not overwritten, needs a new capture. Indices are not checked again.
    The result has no gradients, and changes in place are not told to autograd. Use it from one thread at a time.

    Args:
        function: calls functions of this package, torch for views and empty memory alone; it may overwrite its inputs.
        inputs: examples of what it takes, contents unused.

    Raises:
        CannotCapture: another torch operation was met, or a kernel of another back end: the reference, a GPU's.
        ValueError: the returned function got inputs of another shape or dtype.
    """
    reason = native.why_not()
    if reason:
        raise CannotCapture(f"capture: there are no native kernels to record: {reason}")
    places = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    recording = native.Recording()
    with torch.no_grad(), recording.on(), _OnlyMemory():
        output = function(*places)

    def replay(*values: Tensor) -> Tensor:
        for i, (place, value) in enumerate(zip(places, values, strict=True)):
            if value.shape != place.shape or value.dtype != place.dtype:
                raise ValueError(
                    f"input {i}: got {value.dtype} of shape {tuple(value.shape)}, expected {place.dtype} of shape "
                    f"{tuple(place.shape)} as at capture; capture the function again for another shape"
                )
            place.copy_(value)
        recording.run()
        return output.clone()

    return replay
