"""Shapes of the LoRA linear layer that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .int8 import GROUP


@dataclass(frozen=True)
class Case:
    """x (*lead, width), weight (out, width), ``tasks`` adapters of ``rank``; no adapter where tasks is 0."""

    lead: tuple[int, ...]
    width: int
    out: int
    tasks: int = 2
    rank: int = 8
    bias: bool = False

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        return f"{lead}-{self.width}-{self.out}-tasks{self.tasks}-r{self.rank}{'-bias' if self.bias else ''}"


DECODE = (Case((1,), 2048, 8512), Case((4,), 2048, 8512), Case((1,), 768, 3352), Case((1,), 2048, 8512, tasks=0))
"""One position of each sequence through in_proj of the 1.3B and the 130M model."""

SEQUENCE = (Case((1, 512), 2048, 8512), Case((8, 1024), 768, 3352))
"""Whole sequences."""

SMALL = (
    Case((1,), 1, 1, tasks=1, rank=1, bias=True),
    Case((4,), 64, 40, rank=4),
    Case((2, 3), 37, 23, tasks=3, rank=5, bias=True),
    Case((16,), 129, 65, tasks=0, bias=True),
    Case((50,), 33, 131, tasks=1, rank=2),
    Case((5, 11), 300, 61, tasks=3, rank=3, bias=True),
    Case((67,), 96, 290, tasks=2, rank=8),
    Case((12,), 264, 72, rank=8),
    Case((70,), 96, 264, tasks=3, rank=6, bias=True),
)
"""Few and many rows, primes, one of everything, more of each than one block of a product, rows of whole packs."""

LARGE = Case((1100,), 72, 1000, tasks=2, rank=8, bias=True)
"""Enough tiles for Hopper's own product on a chip of 132 multiprocessors, with edges on every side."""

COMPILED = (
    Case((1,), 2048, 8512, rank=16),
    Case((1,), 2048, 8512, rank=32),
    Case((1,), 4096, 2048, rank=32),
    Case((1,), 2560, 5120),
    Case((64,), 2048, 8512),
)
"""Of other sizes than those measured, for which launch tables have rules of their own: compiled alone."""


def inputs(case: Case, dtype: torch.dtype, weight_dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """Arguments of ``lora_linear`` by name; rows alternate over all tasks and -1."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = weight_dtype) -> Tensor:
        return (torch.randn(shape, generator=make) * scale).to(dtype)

    tasks = case.tasks
    return {
        "x": draw(*case.lead, case.width, dtype=dtype),
        "weight": draw(case.out, case.width, scale=case.width**-0.5),
        "lora_A": draw(tasks, case.rank, case.width, scale=case.width**-0.5) if tasks else None,
        "lora_B": draw(tasks, case.out, case.rank, scale=case.rank**-0.5) if tasks else None,
        "bias": draw(case.out) if case.bias else None,
        "task": torch.randint(-1, tasks, case.lead, generator=make) if tasks else None,
    }


def int8_inputs(
    case: Case, dtype: torch.dtype, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 3
) -> dict[str, Tensor | None]:
    """The same with any int8 weights and any scales, the extremes of both among them: more than ``quantize_int8``
    would make."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (case.out, case.width), generator=make, dtype=torch.int8)
    weight[0, 0], weight[-1, -1] = -128, 127
    scale = torch.rand(case.out, -(-case.width // GROUP), generator=make) * 0.02 - 0.005
    return inputs(case, dtype, dtype) | {"weight": weight, "weight_scale": scale.to(scale_dtype)}


GPU = (
    Case((1,), 2048, 8512),
    Case((16,), 2048, 8512),
    Case((8192,), 2048, 8512, tasks=0),
    Case((8192,), 2048, 8512),
    Case((8192,), 4096, 2048, rank=16),
)
"""What a GPU is measured at: in_proj and out_proj of the 1.3B model, decoding and training, tasks mixed."""
