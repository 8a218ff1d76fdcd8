"""The linear layer with one adapter a task: one row, four rows and many, in fp32 and with 16-bit weights.

A model's weights come from DRAM once a token, so few rows are timed over as many copies of the weight as exceed the
last cache twice, and their floor is the DRAM read rate. The peer is torch: the product, then two thin ones for the
adapter.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from omnimamba_kernels import lora_linear

from . import inputs, peers
from .machine import last_level_cache
from .measure import Contender, Work, relative_error

IN, OUT, RANK = 2048, 8512, 8
GROUP = "lora_linear"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
full = pytest.mark.full


def case(rows: int, dtype: torch.dtype, adapter: bool) -> str:
    return f"{rows} x {IN} to {OUT}, {NAMES[dtype]} weights" + (", LoRA" if adapter else "")


def problem(rows: int, dtype: torch.dtype, adapter: bool) -> dict[str, torch.Tensor | None]:
    """fp32 activations; weights and adapters of ``dtype``."""
    make = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(shape, generator=make)  # noqa: E731
    return {
        "x": draw(rows, IN),
        "weight": (draw(OUT, IN) / IN**0.5).to(dtype),
        "lora_A": (draw(1, RANK, IN) / IN**0.5).to(dtype) if adapter else None,
        "lora_B": draw(1, OUT, RANK).to(dtype) if adapter else None,
    }


def torch_product(x, weight, lora_A, lora_B):
    """In the weights' own dtype, as PEFT computes it eagerly."""
    x = x.to(weight.dtype)
    y = F.linear(x, weight)
    return y if lora_A is None else y + F.linear(F.linear(x, lora_A[0]), lora_B[0])


CASES = [
    (1, torch.bfloat16, False),
    (4, torch.bfloat16, False),
    *(
        pytest.param(rows, dtype, adapter, marks=full)
        for rows, dtype, adapter in [
            (1, torch.float32, False),
            (4, torch.float32, False),
            (1, torch.bfloat16, True),
            (512, torch.float32, False),
            (512, torch.float32, True),
            (512, torch.bfloat16, False),
        ]
    ),
]


@pytest.mark.parametrize(("rows", "dtype", "adapter"), CASES)
def test_forward(bench, benchmark, rows, dtype, adapter):
    values = problem(rows, dtype, adapter)
    x, weight = values.pop("x"), values.pop("weight")
    few = rows <= 16
    copies = 1 + int(2 * last_level_cache() / weight.nbytes) if few else 1
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    known = {name: None if v is None else v.double() for name, v in values.items()}
    exact = lora_linear(x.double(), weight.double(), **known, backend="reference")

    def contender(name, call, bound):
        turn = itertools.cycle(weights)
        run = torch.no_grad()(lambda: call(x, next(turn), **values))
        return Contender(name, run, lambda: relative_error(call(x, weight, **values), exact), bound)

    contenders = [
        contender(name, lambda *a, name=name, **v: lora_linear(*a, **v, backend=name), inputs.BOUND[torch.float32])
        for name in inputs.own_backends()
    ]
    flops = 2.0 * rows * IN * OUT
    slow = peers.too_slow(dtype, rows, flops)
    if slow:
        bench.absent(GROUP, case(rows, dtype, adapter), "torch", slow)
    else:
        contenders.append(contender("torch", torch_product, inputs.BOUND[dtype]))
    work = Work("read", bytes=weight.nbytes, flops=flops) if few else Work("sgemm", bytes=weight.nbytes, flops=flops)
    bench.compare(benchmark, GROUP, case(rows, dtype, adapter), contenders, work)
