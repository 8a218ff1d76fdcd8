"""Shapes of the gated RMSNorm that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of ``rmsnorm_fn`` on x of ``shape``, in ``groups`` groups, rows ``wider`` times as wide in memory."""

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    gate: bool = True
    before: bool = True
    bias: bool = False
    wider: int = 1

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor | None]:
        """The tensor arguments by name; weights are float32, as mixed-precision models keep them."""
        g = torch.Generator().manual_seed(seed)
        d = self.shape[-1]

        def rows() -> Tensor:
            return torch.randn(*self.shape[:-1], self.wider * d, generator=g).to(dtype)[..., :d]

        return {
            "x": rows(),
            "weight": torch.randn(d, generator=g),
            "bias": torch.randn(d, generator=g) if self.bias else None,
            "z": rows() if self.gate else None,
        }

    @property
    def options(self) -> dict[str, object]:
        return {"eps": 1e-5, "group_size": self.shape[-1] // self.groups, "norm_before_gate": self.before}


CASES = (
    Case("one short row", (3,)),
    Case("one row", (1, 48), bias=True),
    Case("no gate", (5, 37), gate=False),
    Case("no gate, bias", (3, 64), gate=False, bias=True, groups=4),
    Case("gate after", (2, 7, 48), bias=True, wider=3),
    Case("gate before", (2, 7, 48), before=False, wider=2),
    Case("gate before, bias, groups", (4, 130), before=False, bias=True, groups=2),
    Case("groups of primes", (3, 69), groups=3),
    Case("four dimensions", (2, 2, 3, 34), groups=2, bias=True, wider=2),
    Case("many rows", (600, 20), bias=True),
    Case("wide rows", (3, 2080), bias=True),
    Case("wide rows of a prime", (2, 2111), before=False),
    Case("a group wider than native keeps", (2, 5003), before=False),
)

BENCH = (
    Case("130M, 4096 rows", (1, 4096, 1536), before=False),
    Case("1.3B, 2048 rows", (1, 2048, 4096), before=False),
    Case("130M, one row", (1, 1536), before=False),
)

GPU = (
    Case("130M, 8 x 2048", (8, 2048, 1536), before=False, wider=2),
    Case("1.3B, 8 x 2048", (8, 2048, 4096), before=False, wider=2),
    Case("2.7B, 1 x 2048", (1, 2048, 5120), before=False, wider=2),
    Case("7B, 8 groups, 1 x 2048", (1, 2048, 8192), groups=8, before=False, wider=2),
    Case("1.3B, 64 rows", (64, 4096), before=False, wider=2),
)
"""What a GPU is measured at: the norm of Mamba-2 models, z a slice of a wider row."""

COMPILED = (Case("16 groups, 1 x 2048", (1, 2048, 4096), groups=16, before=False, wider=2),)
"""Of other sizes than those measured, for which launch tables have rules of their own: compiled alone."""
