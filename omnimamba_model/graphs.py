"""A decode step that is recorded once and replayed: on a GPU a CUDA graph, kept for the next generation.

A graph serves all steps of its kind: as many rows, the same task or a mixture of them, one dtype, the very weights it
was recorded with. Its kernels change states in memory of its own: a state that is bound moves in, and out on release.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import BASE
from .layers import Task, wide
from .state import MambaState

if TYPE_CHECKING:
    from .backbone import MambaBackbone

MOST = 8
"""Graphs that wait to be used again; beyond, the one that waited longest goes."""


class Step:
    """Takes one token in: an embedding (b, d_model) to its hidden state (b, d_model). The state moves on with it."""

    def __init__(
        self, advance: Callable[[Tensor], Tensor], state: MambaState, dtype: torch.dtype, graph: Graph | None = None
    ) -> None:
        self.state = state
        self._advance, self._dtype, self._graph = advance, dtype, graph

    def __call__(self, embedding: Tensor) -> Tensor:
        hidden = self._advance(embedding.to(self._dtype, copy=True))
        self.state.position += 1
        return hidden

    def release(self, keep: bool = True) -> None:
        """Let another generation use the graph, if there is one. The step is over; its state is good for more if
        ``keep``, and otherwise lost."""
        graph, self._graph = self._graph, None
        if graph is None:
            return
        self._advance = _over
        if keep:
            self.state.conv, self.state.ssm = graph.state.conv.clone(), graph.state.ssm.clone()
        graph.home.take_back(graph)


def _over(_: Tensor) -> Tensor:
    raise RuntimeError("this step was released, and another may use its graph: bind the state again")


@dataclass
class Graph:
    """``advance`` moves ``state`` on, each row by the adapter that ``task`` names where they are mixed."""

    home: StepGraphs
    kind: Hashable
    weights: Hashable
    state: MambaState
    task: Tensor | None
    advance: Callable[[Tensor], Tensor]


class StepGraphs:
    """The graphs of one backbone that no generation uses just now. A copy of the backbone starts without any."""

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        self.devices = devices
        self._free: list[Graph] = []

    def __reduce__(self):
        return StepGraphs, (self.devices,)

    def bind(self, backbone: MambaBackbone, state: MambaState, task: Task = BASE) -> Step:
        """A step from ``state``, which lives in the graph's memory until the step is released."""
        kind = state.ssm.shape[1], "mixed" if isinstance(task, Tensor) else task, backbone.dtype, state.ssm.device
        weights = _weights(backbone)
        self._free = [graph for graph in self._free if weights is not None and graph.weights == weights]
        graph = next((graph for graph in self._free if graph.kind == kind), None)
        if graph is None:
            graph = self._record(backbone, state.ssm.shape[1], task, kind, weights)
        else:
            self._free.remove(graph)
        graph.state.conv.copy_(state.conv)
        graph.state.ssm.copy_(state.ssm)
        state.conv, state.ssm = graph.state.conv, graph.state.ssm
        if graph.task is not None:
            graph.task.copy_(task)
        return Step(graph.advance, state, wide(backbone.dtype), graph)

    def take_back(self, graph: Graph) -> None:
        self._free = [*self._free, graph][-MOST:]

    def _record(self, backbone: MambaBackbone, batch: int, task: Task, kind: Hashable, weights: Hashable) -> Graph:
        with torch.inference_mode(False), torch.no_grad():  # memory that any mode may write to
            own = backbone.new_state(batch)
            route = task.to(torch.int32, copy=True) if isinstance(task, Tensor) else None
        return Graph(self, kind, weights, own, route, backbone.record_step(own, task if route is None else route))


def _weights(backbone: MambaBackbone) -> Hashable:
    """Changes when a weight is replaced or overwritten; None where the latter could not be seen."""
    tensors = [*backbone.layers.parameters(), *backbone.layers.buffers(), backbone.norm_f.weight]
    if any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)
