"""A fixed sequence of kernels in one call: for decode loops, whose kernels take less time than their Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native
from .native import CannotCapture

Recorded = tuple[Callable[[], None], Tensor]
"""What runs the kernels again, and where they leave the output."""

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


def capture(function: Callable[..., Tensor], *inputs: Tensor, changes: Sequence[Tensor] = ()) -> Callable[..., Tensor]:
    """Records the kernels that ``function(*inputs)`` would run; returns a function that runs them in one call.

    A decode step of a small model spends much of its time in the Python around its kernels. With inputs on a GPU the
    record is a CUDA graph; on a CPU it is the same idea for the native kernels. Neither computes anything or moves a
    state. The returned function takes inputs of the same shapes and dtypes, copies them to where the kernels read, runs
    the kernels in their order and returns a copy of the output.

    Values may change between calls: of the inputs, of the weights and states that ``function`` closes over. Their
    memory may not: a weight that is replaced, not overwritten, needs a new capture. Indices are not checked again.
    The result has no gradients, and changes in place are not told to autograd. Use it from one thread at a time.

    Args:
        function: may overwrite its inputs. On a CPU it calls functions of this package, torch for views and empty
            memory alone; on a GPU whatever never waits for the device.
        inputs: examples of what it takes, contents unused.
        changes: other tensors that it overwrites. On a GPU it runs once before it is recorded, so that its kernels are
            compiled and loaded; then these are put back as they were.

    Raises:
        CannotCapture: on a CPU, another torch operation was met, or a kernel of another back end; on a GPU, something
            that cannot be recorded.
        ValueError: the returned function got inputs of another shape or dtype.
    """
    places = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    on_gpu = any(t.device.type == "cuda" for t in places)
    run, output = (_cuda_graph if on_gpu else _native)(function, places, changes)

    def replay(*values: Tensor) -> Tensor:
        for i, (place, value) in enumerate(zip(places, values, strict=True)):
            if value.shape != place.shape or value.dtype != place.dtype:
                raise ValueError(
                    f"input {i}: got {value.dtype} of shape {tuple(value.shape)}, expected {place.dtype} of shape "
                    f"{tuple(place.shape)} as at capture; capture the function again for another shape"
                )
            place.copy_(value)
        run()
        return output.clone()

    return replay


def _native(function: Callable[..., Tensor], places: list[Tensor], _: Sequence[Tensor]) -> Recorded:
    reason = native.why_not()
    if reason:
        raise CannotCapture(f"capture: there are no native kernels to record: {reason}")
    recording = native.Recording()
    with torch.no_grad(), recording.on(), _OnlyMemory():
        output = function(*places)
    return recording.run, output


@dataclass
class _Graph:
    """A CUDA graph, and what keeps the memory alive that its kernels work on."""

    graph: torch.cuda.CUDAGraph
    function: Callable[..., Tensor]
    places: list[Tensor]
    output: Tensor

    @torch.no_grad()
    def run(self) -> None:
        """Inside the capture of another graph, which can hold no replay, the kernels themselves become a part of it."""
        if torch.cuda.is_current_stream_capturing():
            self.output.copy_(self.function(*self.places))
        else:
            self.graph.replay()


def _cuda_graph(function: Callable[..., Tensor], places: list[Tensor], changes: Sequence[Tensor]) -> Recorded:
    before = [t.clone() for t in changes]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.device(places[0].device):
        for place in places:
            place.zero_()
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                function(*places)
            with torch.cuda.graph(graph, stream=side):
                output = function(*places)
        except RuntimeError as error:
            recover(here, places[0])
            raise CannotCapture(f"capture: a CUDA graph of it cannot be made: {error}") from error
        finally:
            here.wait_stream(side)
            for t, values in zip(changes, before, strict=True):
                t.copy_(values)
    return _Graph(graph, function, places, output).run, output


def recover(stream: torch.cuda.Stream, scratch: Tensor) -> None:
    """Back to ``stream`` after a capture that failed; ``scratch``, a tensor on the device, is overwritten.

    torch then stays on the capture's stream, and its generator refuses to draw as if the capture went on. The end of
    another one, of a single kernel, tells the generator otherwise.
    """
    torch.cuda.set_stream(stream)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
            scratch.zero_()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # what failed first is what the caller tells
