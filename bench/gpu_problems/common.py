"""What the problems of all operations are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.backends import NAMES
from omnimamba_kernels.report.calls import Made

from .. import plain

Values = dict[str, Tensor | int | None]
Call = Callable[[], Any]
MOST_TOKENS = 20_000
"""Beyond it plain PyTorch is left out: its memory and time grow out of bounds."""


@dataclass
class Steps:
    """A whole of which some steps are really timed: ``parts`` are (how many each stands for, a call that takes one).

    ``replayed``: on a GPU each step is timed as a CUDA graph, as a fast generation runs it.
    """

    parts: list[tuple[float, Call]]
    replayed: bool = False

    def __call__(self) -> Any:
        """The last of them."""
        return self.parts[-1][1]()


@dataclass
class Problem:
    """One call at one size. ``contenders`` make a function without arguments, or Steps; ours come first."""

    group: str
    case: str
    bytes: float
    flops: float
    contenders: dict[str, Callable[[], Call]]
    error: Callable[[Any], float]
    bound: float
    errors: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    """The check of a contender that computes something else than the others: a yardstick."""
    needs: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Bytes and FLOPs of a contender that cannot do with the others'."""
    graph: bool = False
    """Whether contenders are timed as CUDA graphs too, however long a call takes, and compared by these."""
    energy: bool = False
    """Whether a call's energy is read, for which calls take a second more."""
    tokens: float = 0
    """Tokens that a call gives."""
    note: str = ""
    ours: tuple[str, ...] = tuple(NAMES)
    """Names of contenders that are ours; all others are peers."""


class Parts:
    """Problems made part by part. A part that fails raises, and the next ``next()`` goes on with the part after it."""

    def __init__(self, parts: Iterable[Callable[[], Problem | Iterator[Problem]]]) -> None:
        self.parts, self.part = iter(parts), iter(())

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Problem:
        while True:
            part, self.part = self.part, iter(())
            for problem in part:
                self.part = part
                return problem
            found = next(self.parts)()
            self.part = iter((found,)) if isinstance(found, Problem) else iter(found)


def backends(device: torch.device, tokens: int = 0) -> list[str]:
    """Ours that run on the device, the reference last where it is bearable."""
    own = {"cuda": ("cuda", "triton"), "cpu": ("native",)}[device.type]
    found = [name for name, reason in kernels.backends().items() if reason is None and name in own]
    return found + ["reference"] * (tokens <= MOST_TOKENS)


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def sizes(device: torch.device, large: tuple, small: tuple) -> tuple:
    return large if device.type == "cuda" else small


def made(device: torch.device, make: Callable[[], Values]) -> Values:
    """Tensors drawn on the device itself, by a fixed seed."""
    torch.manual_seed(0)
    with Made(device):
        return make()


def peer(module: str, name: str, *arguments: Any, **named: Any) -> Callable[[], Call]:
    """A call of a function that another package may have; ImportError where it has not."""

    def make() -> Call:
        function = getattr(import_module(module), name)
        return lambda: function(*arguments, **named)

    return make


def compiles(device: torch.device) -> bool:
    """Whether torch.compile is a peer: on a CPU pytest's own benchmarks have it."""
    return device.type == "cuda"


def written_out(device: torch.device, function: Callable[..., Any], first: bool) -> dict[str, Callable[..., Any]]:
    """The operation in plain torch, eager and, of the ``first`` case alone since a compilation takes long, compiled."""
    return {name: lazily(make) for name, make in plain.peers(function, first and compiles(device))}


def lazily(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What ``make`` makes, once it is called."""
    made = functools.cache(make)
    return lambda *arguments, **named: made()(*arguments, **named)


def nbytes(*values: Tensor | None) -> int:
    return sum(v.numel() * v.element_size() for v in values if v is not None)


def leaves(values: Values, wanted: tuple[str, ...] | None = None) -> Values:
    """The values anew, the ``wanted`` ones (None: all floating ones) with gradients."""
    learns = lambda k, v: torch.is_tensor(v) and v.is_floating_point() and k in (wanted or values)  # noqa: E731
    return {k: v.detach().requires_grad_() if learns(k, v) else v for k, v in values.items()}


def forward(functions: dict[str, Callable[[Values], Any]], values: Values) -> dict[str, Callable[[], Call]]:
    """The forward alone, of each contender."""
    return {who: lambda f=f: torch.no_grad()(lambda: f(values)) for who, f in functions.items()}


def backward(
    functions: dict[str, Callable[[Values], Tensor]],
    values: Values,
    upstream: Tensor,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Callable[[], Call]]:
    """The backward alone, of each contender, on a graph that is kept: gradients of the wanted values in their order."""

    def build(make: Callable[[Values], Tensor]) -> Call:
        own = leaves(values, wanted)
        y, asked = make(own), [v for v in own.values() if torch.is_tensor(v) and v.requires_grad]
        return lambda: torch.autograd.grad(y, asked, upstream, retain_graph=True)

    return {who: lambda make=make: build(make) for who, make in functions.items()}


def in_place(calls: dict[str, Callable[[], Call]], *states: Tensor) -> dict[str, Callable[[], Call]]:
    """Calls that change ``states``: each contender begins with the states of now."""
    begin = [state.clone() for state in states]

    def build(make: Callable[[], Call]) -> Call:
        for state, start in zip(states, begin, strict=True):
            state.copy_(start)
        return torch.no_grad()(make())

    return {who: lambda make=make: build(make) for who, make in calls.items()}
