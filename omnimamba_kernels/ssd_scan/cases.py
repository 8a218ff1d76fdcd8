"""Shapes of the scan that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of ``mamba_chunk_scan_combined``: b batch, l length, h heads of p channels, g groups of n states."""

    name: str
    b: int
    l: int
    h: int
    p: int
    g: int = 1
    n: int = 16
    chunk: int = 64
    skip: int = 0  # D: 0 none, 1 (h,), 2 (h, p)
    gate: bool = False
    bias: bool = True
    softplus: bool = True
    limit: tuple[float, float] = (0.0, float("inf"))
    initial_states: bool = False
    sequences: str | None = None  # or "seq_idx", "cu_seqlens"
    padding: int = 0  # positions after the last of "cu_seqlens"

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor | None]:
        """The tensor arguments by name. x, B and C are slices of one wider row, as a mixer cuts them; steps, decays and
        states are float32, as mixed-precision models keep them."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        b, l, h, p, g, n = self.b, self.l, self.h, self.p, self.g, self.n
        row = normal(b, l, h * p + 2 * g * n).to(dtype)
        x, B, C = row.split([h * p, g * n, g * n], dim=-1)
        return {
            "x": x.unflatten(-1, (h, p)),
            "dt": normal(b, l, h) if self.softplus else normal(b, l, h).abs() * 0.3,
            "A": -torch.rand(h, generator=generator) * 4 - 0.1,
            "B": B.unflatten(-1, (g, n)),
            "C": C.unflatten(-1, (g, n)),
            "D": (None, normal(h), normal(h, p))[self.skip],
            "z": normal(b, l, h, p).to(dtype) if self.gate else None,
            "dt_bias": normal(h) - 1 if self.bias else None,
            "initial_states": normal(b, h, p, n) if self.initial_states else None,
            "seq_idx": packed_ids(b, l, generator) if self.sequences == "seq_idx" else None,
            "cu_seqlens": packed_offsets(l - self.padding, generator) if self.sequences == "cu_seqlens" else None,
        }

    @property
    def options(self) -> dict[str, object]:
        return {
            "chunk_size": self.chunk,
            "dt_softplus": self.softplus,
            "dt_limit": self.limit,
            "return_final_states": True,
            "return_varlen_states": self.sequences == "cu_seqlens",
        }


def packed_ids(b: int, l: int, generator: torch.Generator) -> Tensor:
    """(b, l) int32: sequences 0, 1, ... one after another, and runs of padding (-1)."""
    starts = torch.rand(b, l, generator=generator) < 0.06
    ids = starts.cumsum(1)
    return torch.where((ids % 4 == 2), -1, ids).to(torch.int32)


def packed_offsets(l: int, generator: torch.Generator) -> Tensor:
    """(sequences + 1,) rising offsets, among them an empty sequence at each end and one inside."""
    inner = torch.randint(0, l + 1, (3,), generator=generator).sort().values
    return torch.cat([torch.zeros(2), inner, inner[1:2], torch.full((2,), l)]).sort().values.long()


CASES = (
    Case("one position", 2, 1, 3, 5, n=3, skip=1, initial_states=True),
    Case("short", 1, 7, 4, 16, g=2, skip=2, gate=True, initial_states=True),
    Case("one chunk less one", 1, 63, 2, 16),
    Case("primes", 2, 131, 3, 37, g=3, n=19, skip=1, gate=True, initial_states=True),
    Case("the field's sizes", 1, 70, 4, 64, g=2, n=128, skip=1),
    Case("several slabs", 2, 200, 32, 4, g=16, n=4, skip=1, initial_states=True),
    Case("steps as they are", 1, 90, 2, 17, softplus=False, bias=False, limit=(0.05, 0.4)),
    Case("limits", 2, 70, 6, 16, skip=2, limit=(0.1, 1.0), initial_states=True),
    Case("packed with padding", 2, 150, 4, 16, g=2, skip=2, gate=True, initial_states=True, sequences="seq_idx"),
    Case("packed by offsets", 1, 170, 2, 24, skip=1, initial_states=True, sequences="cu_seqlens"),
    Case("slow decay", 1, 140, 4, 16, g=2, skip=1, limit=(0.05, 0.2), initial_states=True),
    Case("packed by offsets, then padding", 1, 90, 2, 8, skip=1, gate=True, sequences="cu_seqlens", padding=11),
)

BENCHMARKS = tuple(
    Case(f"1 x {l}, {h} heads", 1, l, h, 64, n=128, chunk=256, skip=1) for l in (1024, 4096) for h in (24, 64)
)

GPU = (
    Case("8 x 2048, 64 heads", 8, 2048, 64, 64, n=128, chunk=256, skip=1),
    Case("1 x 2048, 64 heads", 1, 2048, 64, 64, n=128, chunk=256, skip=1),
    Case("4 x 32768, 64 heads", 4, 32768, 64, 64, n=128, chunk=256, skip=1),
    Case("32 x 2048, 64 heads", 32, 2048, 64, 64, n=128, chunk=256, skip=1),
    Case("8 x 4096, 64 heads", 8, 4096, 64, 64, n=128, chunk=256, skip=1),
    Case("8 x 2048, 80 heads", 8, 2048, 80, 64, n=128, chunk=256, skip=1),
    Case("1 x 1M, 24 heads", 1, 2**20, 24, 64, n=128, chunk=256, skip=1),
)
"""What a GPU is measured at: the 1.3B, the 2.7B and, for one very long sequence, the 130M model."""

WIDE = Case("4 x 4096, 24 heads of 128, 256 states", 4, 4096, 24, 128, n=256, chunk=256, skip=1)
"""The largest heads and states in use: kernels are compiled for it, not measured."""

BROAD = Case("4 x 4096, 24 heads of 128", 4, 4096, 24, 128, n=128, chunk=256, skip=1)
"""Large heads with states as usual: as WIDE."""

PACKED = Case("1 x 4096 packed, 64 heads", 1, 4096, 64, 64, g=2, n=128, chunk=256, skip=2, gate=True,
              initial_states=True, sequences="cu_seqlens")  # fmt: skip
"""Everything that a call may ask for at once: compiled, not measured."""
