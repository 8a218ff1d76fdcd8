"""The linear layer with one adapter a task: one row, four rows and many; fp32, 16-bit and int8 weights; rows of two
tasks.

A model's weights come from DRAM once a token, so few rows are timed over as many copies of the weight as exceed the
last cache twice, and their floor is the DRAM read rate. The peers are torch, eager and compiled (the product, then two
thin ones for the adapter), and PEFT's layer.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from omnimamba_kernels import dequantize_int8, lora_linear, quantize_int8

from . import inputs, peers, plain
from .machine import last_level_cache
from .measure import Contender, Work, relative_error, worst_error
from .rates import product

IN, OUT, RANK = 2048, 8512, 8
GROUP, TRAINING = "lora_linear", "lora_linear forward + backward"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW = 16
"""Rows up to which a product is bound by reading its weights."""
IN_130M, OUT_130M = (768, 3352), (1536, 768)
"""in_proj and out_proj of the 130M shape."""
full = pytest.mark.full


def case(rows: int, dtype: torch.dtype, adapter: bool, size: tuple[int, int] = (IN, OUT), narrow: bool = False) -> str:
    """``narrow``: the activations too are of ``dtype``."""
    kinds = "weights and activations" if narrow else "weights"
    return f"{rows} x {size[0]} to {size[1]}, {NAMES[dtype]} {kinds}" + (", LoRA" if adapter else "")


def problem(
    rows: int, dtype: torch.dtype, adapter: bool, size: tuple[int, int] = (IN, OUT)
) -> dict[str, torch.Tensor | None]:
    """fp32 activations; weights and adapters of ``dtype``."""
    make, (width, out) = torch.Generator().manual_seed(rows), size
    draw = lambda *shape: torch.randn(shape, generator=make)  # noqa: E731
    return {
        "x": draw(rows, width),
        "weight": (draw(out, width) / width**0.5).to(dtype),
        "lora_A": (draw(1, RANK, width) / width**0.5).to(dtype) if adapter else None,
        "lora_B": draw(1, out, RANK).to(dtype) if adapter else None,
    }


CASES = [
    (1, torch.bfloat16, False, (IN, OUT)),
    (4, torch.bfloat16, False, (IN, OUT)),
    *(pytest.param(1024, torch.float32, False, size, marks=full) for size in (IN_130M, OUT_130M)),
    *(
        pytest.param(rows, dtype, adapter, (IN, OUT), marks=full)
        for rows, dtype, adapter in [
            (1, torch.float32, False),
            (1, torch.float16, False),
            (4, torch.float32, False),
            (1, torch.bfloat16, True),
            (512, torch.float32, False),
            (512, torch.float32, True),
            (512, torch.bfloat16, False),
            (2048, torch.bfloat16, False),
        ]
    ),
]
NARROW = [(512, torch.bfloat16), (2048, torch.bfloat16)]
"""Rows of 16 bits times weights of as many, as in training under autocast."""


@pytest.mark.parametrize(("rows", "dtype", "adapter", "size"), CASES)
def test_forward(bench, benchmark, rows, dtype, adapter, size):
    forward(bench, benchmark, rows, dtype, adapter, size)


@full
@pytest.mark.parametrize(("rows", "dtype"), NARROW)
def test_forward_of_16_bits(bench, benchmark, rows, dtype):
    forward(bench, benchmark, rows, dtype, False, (IN, OUT), narrow=True)


def forward(bench, benchmark, rows, dtype, adapter, size, narrow=False):
    values, named = problem(rows, dtype, adapter, size), case(rows, dtype, adapter, size, narrow)
    x, weight = values.pop("x").to(dtype if narrow else torch.float32), values.pop("weight")
    few, weights = rows <= FEW, cold(rows, weight)
    known = {name: None if v is None else v.double() for name, v in values.items()}
    exact = lora_linear(x.double(), weight.double(), **known, backend="reference")

    def contender(name, call, bound):
        turn = itertools.cycle(weights)
        run = torch.no_grad()(lambda: call(x, next(turn), **values))
        return Contender(name, run, lambda: relative_error(call(x, weight, **values), exact), bound)

    contenders = [
        contender(name, lambda *a, name=name, **v: lora_linear(*a, **v, backend=name), inputs.BOUND[x.dtype])
        for name in inputs.own_backends()
    ]
    flops = 2.0 * rows * size[0] * size[1]
    slow = peers.too_slow(dtype, rows, flops)
    if slow:
        bench.absent(GROUP, named, "torch", slow)
    else:
        contenders += [
            contender(name, lazy(make), inputs.BOUND[dtype])
            for name, make in plain.peers(plain.lora, adapter and rows > 1)
        ]
        if adapter:
            layer = functools.cache(lambda at: peers.peft(next(w for w in weights if w.data_ptr() == at), **values))
            call = lambda x, weight, **v: layer(weight.data_ptr())(x.to(weight.dtype))  # noqa: E731
            contenders.append(contender(peers.peft_label(), call, inputs.BOUND[dtype]))
    work = Work("read" if few else product(dtype), bytes=weight.nbytes, flops=flops)
    judged = few and dtype == torch.bfloat16 and not adapter
    bench.compare(benchmark, GROUP, named, contenders, work, peaks=True, judged=judged)


def cold(rows: int, weight: torch.Tensor) -> list[torch.Tensor]:
    """The weight, for few rows as many times as no cache holds it."""
    copies = 1 + int(2 * last_level_cache() / weight.nbytes) if rows <= FEW else 1
    return [weight, *(weight.clone() for _ in range(copies - 1))]


@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=full), pytest.param(512, marks=full)])
def test_int8(bench, benchmark, rows):
    """int8 weights with a scale for every 64 of a row; torch has the numbers that they stand for, in fp32."""
    values = problem(rows, torch.float32, False)
    x, (weight, scale) = values["x"], quantize_int8(values["weight"])
    whole = dequantize_int8(weight, scale)
    exact, few, bound = x.double() @ whole.double().T, rows <= FEW, inputs.BOUND[torch.float32]

    def contender(name, call, kept, work=None):
        turn = itertools.cycle(cold(rows, kept))
        run = torch.no_grad()(lambda: call(x, next(turn)))
        return Contender(name, run, lambda: relative_error(call(x, kept), exact), bound, work=work)

    def ours(name):
        return lambda x, w: lora_linear(x, w, None, None, scale=1.0, weight_scale=scale, backend=name)

    flops, against = 2.0 * rows * IN * OUT, "read" if few else "sgemm"
    contenders = [contender(name, ours(name), weight) for name in inputs.own_backends()]
    theirs = Work(against, bytes=whole.nbytes, flops=flops)
    contenders.append(contender("torch, fp32 weights", torch.nn.functional.linear, whole, theirs))
    work = Work(against, bytes=weight.nbytes + scale.nbytes, flops=flops)
    bench.compare(benchmark, GROUP, f"{rows} x {IN} to {OUT}, int8 weights", contenders, work, peaks=True)


@pytest.mark.parametrize(("rows", "dtype"), [(4, torch.bfloat16), pytest.param(512, torch.float32, marks=full)])
def test_two_tasks(bench, benchmark, rows, dtype):
    """Every other row has the other adapter, as where drawings and answers are one batch."""
    values, other = (problem(rows + i, dtype, True) for i in range(2))
    x, weight, task = values["x"], values["weight"], torch.arange(rows) % 2
    lora_A, lora_B = (torch.cat([values[name], other[name]]) for name in ("lora_A", "lora_B"))
    wide = [t.double() for t in (x, weight, lora_A, lora_B)]
    exact = lora_linear(*wide, task=task, backend="reference")

    def contender(name, call, bound):
        turn = itertools.cycle(cold(rows, weight))
        run = torch.no_grad()(lambda: call(x, next(turn)))
        return Contender(name, run, lambda: relative_error(call(x, weight), exact), bound)

    def ours(name):
        return lambda x, w: lora_linear(x, w, lora_A, lora_B, task=task, backend=name)

    flops = 2.0 * rows * IN * OUT
    contenders = [contender(name, ours(name), inputs.BOUND[torch.float32]) for name in inputs.own_backends()]
    named, slow = f"{case(rows, dtype, True)}, 2 tasks", peers.too_slow(dtype, rows, flops)
    if slow:
        bench.absent(GROUP, named, plain.EAGER, slow)
    else:
        torchs = lambda x, w: plain.lora_of_tasks(x, w, lora_A, lora_B, task)  # noqa: E731
        contenders.append(contender(plain.EAGER, torchs, inputs.BOUND[dtype]))
    work = Work("read" if rows <= FEW else product(dtype), bytes=weight.nbytes, flops=flops)
    bench.compare(benchmark, GROUP, named, contenders, work, peaks=True)


def lazy(make):
    """The function that ``make`` makes, once it is called."""
    return lambda *a, **v: make()(*a, **v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@full
def test_training(bench, benchmark, dtype):
    """Forward and backward with the base frozen: gradients of the input and of both halves of the adapter, these in
    their own dtype."""
    rows = 512
    values = problem(rows, dtype, True)
    weight, upstream = values.pop("weight"), torch.randn(rows, OUT, generator=torch.Generator().manual_seed(1))
    frozen = weight.double()
    ours = lambda name: lambda x, lora_A, lora_B: lora_linear(x, weight, lora_A, lora_B, backend=name)  # noqa: E731
    exact = inputs.gradients(
        lambda **v: lora_linear(v["x"], frozen, v["lora_A"], v["lora_B"], backend="reference"),
        inputs.with_gradients(inputs.double(values)),
        upstream.double(),
    )

    def contender(name, function, bound, dtype=torch.float32):
        leaves, mine = inputs.with_gradients(values), upstream.to(dtype)
        run = lambda: inputs.gradients(function, leaves, mine)  # noqa: E731
        return Contender(name, run, lambda: worst_error(run(), exact), bound)

    flops = 2.0 * rows * IN * OUT * 2
    contenders = [contender(name, ours(name), inputs.BOUND[dtype]) for name in inputs.own_backends()]
    slow = peers.too_slow(dtype, rows, flops)
    if slow:
        bench.absent(TRAINING, case(rows, dtype, True), "torch", slow)
    else:
        contenders += [
            contender(name, lambda make=make, **v: make()(weight=weight, **v), inputs.BOUND[dtype], dtype)
            for name, make in plain.peers(plain.lora, dtype == torch.float32)
        ]
        contenders.append(peft_training(values, weight, upstream, exact))
    bench.compare(
        benchmark, TRAINING, case(rows, dtype, True), contenders, Work(product(dtype), flops=flops), peaks=True
    )


def peft_training(values, weight, upstream, exact) -> Contender:
    """PEFT's adapter is parameters of its layer: the gradients are theirs."""
    x = values["x"].detach().requires_grad_()
    layer = functools.cache(lambda: peers.peft(weight, values["lora_A"], values["lora_B"]))
    upstream = upstream.to(weight.dtype)

    def run():
        mine = layer()
        y = mine(x.to(weight.dtype))
        halves = mine.lora_A["default"].weight, mine.lora_B["default"].weight
        dx, dA, dB = torch.autograd.grad(y, [x, *halves], upstream)
        return y, dx, dA[None], dB[None]

    return Contender(peers.peft_label(), run, lambda: worst_error(run(), exact), inputs.BOUND[weight.dtype])
