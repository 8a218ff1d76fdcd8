"""The chunked scan, forward and forward with backward, against its reference and transformers' fallback."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from omnimamba_kernels import mamba_chunk_scan_combined

from . import inputs, peers, plain
from .measure import Contender, Work, worst_error
from .rates import product

SHAPES = ((1, 1024, 24), (1, 4096, 24), (1, 1024, 64), (1, 4096, 64))
"""Batch, length, heads of what is promised; all of it in fp32."""
TRANSFORMERS_CHUNK = 256
FORWARD, TRAINING = "ssd_scan forward", "ssd_scan forward + backward"
full = pytest.mark.full


CASES = [
    (SHAPES[0], torch.float32),
    *(pytest.param(shape, torch.float32, marks=full) for shape in (*SHAPES[1:], (4, 1024, 24))),
    pytest.param((1, 4096, 24), torch.bfloat16, marks=full),
    pytest.param((1, 1024, 24), torch.float16, marks=full),
]


def promised(shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
    return shape in SHAPES and dtype == torch.float32


def case(b: int, l: int, h: int, dtype: torch.dtype = torch.float32) -> str:
    return f"{b} x {l}, {h} heads{inputs.suffix(dtype)}"


def ours(backend: str | None):
    return lambda **v: mamba_chunk_scan_combined(chunk_size=inputs.CHUNK, dt_softplus=True, backend=backend, **v)


@functools.cache
def transformers():
    scan = peers.fallback("mamba2_chunk_scan")
    return lambda x, **v: scan(x, chunk_size=TRANSFORMERS_CHUNK, dt_softplus=True, **v)


def some_heads(values: dict[str, Tensor], heads: list[int]) -> dict[str, Tensor]:
    """The same problem for a few heads of one group, in fp64."""
    per_head = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0}
    index = torch.tensor(heads)
    chosen = {k: v.index_select(per_head[k], index) if k in per_head else v for k, v in values.items()}
    return inputs.double(chosen)


class Problem:
    """One shape's inputs, and what fp64 says of three of its heads."""

    def __init__(self, b: int, l: int, h: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self.values = (b, l, h), dtype, inputs.scan(b, l, h, dtype=dtype)
        self.heads = [0, h // 2, h - 1]
        self.upstream = torch.randn(self.values["x"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def forward_error(self, function) -> float:
        with torch.no_grad():
            exact = ours("reference")(**some_heads(self.values, self.heads))
            return worst_error((function(**self.values)[:, :, self.heads],), (exact,))

    def training_error(self, function) -> float:
        """With an output gradient that is zero outside three heads, every input's gradient is theirs alone."""
        upstream = torch.zeros_like(self.upstream)
        upstream[:, :, self.heads] = self.upstream[:, :, self.heads]
        found = dict(zip(("y", *self.values), inputs.gradients(function, self.leaves(), upstream), strict=True))
        few = inputs.with_gradients(some_heads(self.values, self.heads))
        exact = inputs.gradients(ours("reference"), few, upstream[:, :, self.heads].double())
        found = some_heads({"y": found.pop("y")[:, :, self.heads], **found}, self.heads)
        return worst_error(tuple(found.values()), exact)

    def leaves(self) -> dict[str, Tensor]:
        return inputs.with_gradients(self.values)

    def contenders(self, training: bool, quick: bool) -> list[Contender]:
        """The reference runs in the smallest case only, its backward not in a quick run, as does transformers' fallback
        under torch.compile, whose compilation takes longer than all that is timed."""
        own, smallest = inputs.own_backends(), (self.shape, self.dtype) == CASES[0]
        if (not smallest or (training and quick)) and len(own) > 1:
            own.remove("reference")
        found = [(name, lambda name=name: ours(name)) for name in own]
        found.append((peers.label(), transformers))
        if smallest and not training and not quick:
            found.append((plain.COMPILED, functools.cache(lambda: plain.compiled(transformers()))))
        return [self.contender(name, make, training) for name, make in found]

    def contender(self, name: str, make, training: bool) -> Contender:
        bound = inputs.BOUND[self.dtype]
        if not training:
            run = torch.no_grad()(lambda: make()(**self.values))
            return Contender(name, run, lambda: self.forward_error(make()), bound)
        leaves = self.leaves()
        run = lambda: inputs.gradients(make(), leaves, self.upstream)  # noqa: E731
        return Contender(name, run, lambda: self.training_error(make()), bound)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward(bench, benchmark, shape, dtype):
    work = Work(product(dtype), flops=inputs.scan_flops(*shape))
    contenders, judged = Problem(*shape, dtype).contenders(False, bench.quick), promised(shape, dtype)
    bench.compare(benchmark, FORWARD, case(*shape, dtype), contenders, work, peaks=True, judged=judged)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_training(bench, benchmark, shape, dtype):
    """FLOPs are three times the forward's: the backward counts as two forwards. Peak memory is taken in children, which
    a quick run has no time for."""
    work = Work(product(dtype), flops=3 * inputs.scan_flops(*shape))
    contenders, judged = Problem(*shape, dtype).contenders(True, bench.quick), promised(shape, dtype)
    rows = bench.compare(benchmark, TRAINING, case(*shape, dtype), contenders, work, judged=judged)
    if judged and shape[2] == 24 and not bench.quick:
        bench.peaks(benchmark, rows, "scan_training", b=shape[0], l=shape[1], h=shape[2])
