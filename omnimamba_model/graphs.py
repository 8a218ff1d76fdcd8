"""A decode step that is recorded once and replayed: on a GPU a CUDA graph, kept for the next generation.

A graph serves all steps of its kind: room for as many rows, the same task or a mixture of them, one dtype, the very
weights it was recorded with. Its kernels change states in memory of its own: a state that is bound moves in, and out on
release. Rows that a state has not are zeros there, computed and never looked at.
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
"""Graphs that wait to be used again, whatever their rows; beyond, what ``_kept`` says."""
ONE_GENERATION = 4
"""Times the rows of its largest graph, in all graphs of a generation together at most: rooms of n rows, then of the
powers of two below, n + 2 n; where a mixture of tasks ends as one task, one room twice."""


class Step:
    """Takes one token in: an embedding (b, d_model) to its hidden state (b, d_model). The state moves on with it."""

    def __init__(
        self, advance: Callable[[Tensor], Tensor], state: MambaState, dtype: torch.dtype, graph: Graph | None = None
    ) -> None:
        self.state = state
        self._advance, self._dtype, self._graph = advance, dtype, graph

    def __call__(self, embedding: Tensor) -> Tensor:
        rows, room = len(embedding), len(embedding) if self._graph is None else self._graph.state.ssm.shape[1]
        given = embedding.to(self._dtype, copy=True)
        if room > rows:
            given = torch.cat([given, given.new_zeros(room - rows, given.shape[1])])
        hidden = self._advance(given)[:rows]
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
            own = self.state.conv, self.state.ssm  # perhaps a part of the graph's rows
            self.state.conv, self.state.ssm = (t.clone(memory_format=torch.contiguous_format) for t in own)
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

    def bind(self, backbone: MambaBackbone, state: MambaState, task: Task = BASE, room: int | None = None) -> Step:
        """A step from ``state``, which lives in the graph's memory until the step is released.

        The graph has ``room`` rows, None as many as the state; ValueError where the state has more.
        """
        rows = state.ssm.shape[1]
        room = rows if room is None else room
        if room < rows:
            raise ValueError(f"room must be for {rows} rows or more, got {room}")
        kind = room, "mixed" if isinstance(task, Tensor) else task, backbone.dtype, state.ssm.device
        weights = _weights(backbone)
        self._free = [graph for graph in self._free if weights is not None and graph.weights == weights]
        graph = next((graph for graph in self._free if graph.kind == kind), None)
        if graph is None:
            graph = self._record(backbone, room, task, kind, weights)
        else:
            self._free.remove(graph)
        for own, given in ((graph.state.conv, state.conv), (graph.state.ssm, state.ssm)):
            own[:, :rows].copy_(given)
            own[:, rows:].zero_()
        state.conv, state.ssm = graph.state.conv[:, :rows], graph.state.ssm[:, :rows]
        if graph.task is not None:
            graph.task[:rows].copy_(task)
        return Step(graph.advance, state, wide(backbone.dtype), graph)

    def take_back(self, graph: Graph) -> None:
        self._free = _kept([*self._free, graph])

    def _record(self, backbone: MambaBackbone, room: int, task: Task, kind: Hashable, weights: Hashable) -> Graph:
        with torch.inference_mode(False), torch.no_grad():  # memory that any mode may write to
            own, route = backbone.new_state(room), None
            if isinstance(task, Tensor):
                route = torch.full((room,), BASE, dtype=torch.int32, device=task.device)
                route[: len(task)] = task
        return Graph(self, kind, weights, own, route, backbone.record_step(own, task if route is None else route))


def _kept(free: list[Graph]) -> list[Graph]:
    """Those that go on waiting, the one that waited longest first: MOST, and more of them for as long as they have no
    more rows, and so states, than one generation goes through. So the same generation records nothing anew."""
    rows = [graph.state.ssm.shape[1] for graph in free]
    first = 0
    while len(free) - first > MOST and sum(rows[first:]) > ONE_GENERATION * max(rows[first:]):
        first += 1
    return free[first:]


def _weights(backbone: MambaBackbone) -> Hashable:
    """Changes when a weight is replaced or overwritten; None where the latter could not be seen."""
    tensors = [*backbone.layers.parameters(), *backbone.layers.buffers(), backbone.norm_f.weight]
    if any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)
