"""Shapes of the decode step that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of ``selective_state_update``: b batch, h heads (0: no such dimension), d width, n state."""

    name: str
    b: int
    h: int
    d: int
    n: int
    g: int = 1
    tied: bool = True  # dt, A and dt_bias expanded from one value a head
    extras: bool = True  # D, z and dt_bias
    slots: int = 0  # more states than rows, found through indices, one of them padding
    softplus: bool = True

    def tensors(
        self, dtype: torch.dtype = torch.float32, state: torch.dtype = torch.float32, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """The tensor arguments by name; A, D and dt_bias are float32, as mixed-precision models keep them."""
        r = torch.Generator().manual_seed(seed)
        heads = (self.h,) if self.h else ()
        wide = (*heads, self.d)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=r)

        def a_head(t: Tensor, *shape: int) -> Tensor:
            """One value a head, expanded."""
            return t[(..., *[None] * len(shape))].expand(*t.shape, *shape)

        b, d, n = self.b, self.d, self.n
        tied = self.tied and bool(heads)
        groups = (self.g,) if heads else ()
        indices = None
        if self.slots:
            indices = torch.randperm(self.slots, generator=r)[:b].to(torch.int32)
            indices[b // 2] = -1
        return {
            "state": normal(self.slots or b, *wide, n).to(state),
            "x": normal(b, *wide).to(dtype),
            "dt": a_head(normal(b, *heads).to(dtype), d) if tied else normal(b, *wide).to(dtype),
            "A": a_head(-torch.rand(*heads, generator=r) * 4, d, n) if tied else -torch.rand(*wide, n, generator=r) * 4,
            "B": normal(b, *groups, n).to(dtype),
            "C": normal(b, *groups, n).to(dtype),
            "D": normal(*wide) if self.extras else None,
            "z": normal(b, *wide).to(dtype) if self.extras else None,
            "dt_bias": None if not self.extras else a_head(normal(*heads), d) if tied else normal(*wide),
            "state_batch_indices": indices,
        }

    @property
    def options(self) -> dict[str, object]:
        return {"dt_softplus": self.softplus}


CASES = (
    Case("one value", 1, 1, 1, 1),
    Case("tied heads", 2, 4, 16, 32, g=2),
    Case("tied heads, primes", 3, 6, 7, 13, g=3, slots=5),
    Case("general", 2, 3, 17, 19, tied=False),
    Case("general, slots", 4, 2, 64, 128, tied=False, slots=9),
    Case("no heads", 3, 0, 33, 16),
    Case("no heads, nothing optional", 2, 0, 5, 3, extras=False, softplus=False),
    Case("nothing optional", 1, 2, 8, 8, extras=False),
    Case("threads", 2, 8, 64, 64),
    Case("long states", 1, 2, 5, 264, tied=False),
)

BENCH = (
    Case("130M, b 1", 1, 24, 64, 128),
    Case("1.3B, b 1", 1, 64, 64, 128),
    Case("1.3B, b 16", 16, 64, 64, 128),
)

GPU = (
    Case("1.3B, b 1", 1, 64, 64, 128),
    Case("1.3B, b 8", 8, 64, 64, 128),
    Case("1.3B, b 64", 64, 64, 64, 128),
    Case("1.3B, b 128", 128, 64, 64, 128),
)
"""What a GPU is measured at."""
