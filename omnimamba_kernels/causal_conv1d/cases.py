"""Shapes of the causal convolution that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of ``causal_conv1d_fn``: b batch, d channels, l length, w width, and what else it is given."""

    name: str
    b: int
    d: int
    l: int
    w: int = 4
    layout: str = "channel-last"  # or "contiguous", "slice" (channel-last rows of a wider buffer)
    bias: bool = True
    activation: str | None = "silu"
    sequences: bool = False
    initial_states: bool = False
    final_states: bool = False
    row: tuple[int, int] | None = None  # of a "slice": its rows' width and the place of the first channel

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor | None]:
        """The tensor arguments by name; weights are float32, as mixed-precision models keep them."""
        g = torch.Generator().manual_seed(seed)
        b, d, l, w = self.b, self.d, self.l, self.w
        if self.layout == "contiguous":
            x = torch.randn(b, d, l, generator=g).to(dtype)
        else:
            extra = d // 2 + 3 if self.layout == "slice" else 0
            width, first = self.row or (d + extra, extra // 2)
            x = torch.randn(b, l, width, generator=g).to(dtype)[..., first : first + d].transpose(1, 2)
        return {
            "x": x,
            "weight": torch.randn(d, w, generator=g) * w**-0.5,
            "bias": torch.randn(d, generator=g) if self.bias else None,
            "seq_idx": packed_ids(b, l, g) if self.sequences else None,
            "initial_states": torch.randn(b, d, w - 1, generator=g).to(dtype) if self.initial_states else None,
        }

    @property
    def options(self) -> dict[str, object]:
        return {"activation": self.activation, "return_final_states": self.final_states}


def packed_ids(b: int, l: int, generator: torch.Generator) -> Tensor:
    """(b, l) int32: sequences 0, 1, ... one after another, some of one position, some positions of padding (-1)."""
    starts = torch.rand(b, l, generator=generator) < 0.2
    ids = starts.cumsum(1)
    return torch.where(torch.rand(b, l, generator=generator) < 0.1, -1, ids).to(torch.int32)


CASES = (
    Case("one step", 1, 5, 1),
    Case("shorter than the filter", 2, 17, 2, initial_states=True, final_states=True),
    Case("slice of wider rows", 1, 160, 10, layout="slice"),
    Case("primes", 2, 37, 53, w=3, layout="slice", initial_states=True, final_states=True),
    Case("width 2, no bias, linear", 3, 16, 31, w=2, bias=False, activation=None, final_states=True),
    Case("packed", 2, 33, 71, sequences=True, initial_states=True, final_states=True),
    Case("packed slice, width 3", 2, 19, 40, w=3, layout="slice", sequences=True, final_states=True),
    Case("contiguous", 2, 7, 300, layout="contiguous", initial_states=True, final_states=True),
    Case("contiguous primes", 1, 3, 521, w=3, layout="contiguous"),
    Case("contiguous packed", 2, 5, 277, layout="contiguous", sequences=True, initial_states=True, final_states=True),
    Case("contiguous short", 2, 3, 3, w=2, layout="contiguous", bias=False, activation=None),
    Case("several tiles", 1, 21, 600),
    Case("several tiles, packed", 2, 32, 150, sequences=True, initial_states=True, final_states=True),
)

BENCH = (
    Case("130M, 1 x 4096", 1, 1792, 4096),
    Case("130M slice, 1 x 4096", 1, 1792, 4096, layout="slice"),
    Case("1.3B, 1 x 2048", 1, 4352, 2048),
)

GPU = (  # slices of the mixer's rows z, x B C, dt
    Case("130M, 8 x 2048", 8, 1792, 2048, layout="slice", row=(3352, 1536)),
    Case("1.3B, 8 x 2048", 8, 4352, 2048, layout="slice", row=(8512, 4096)),
    Case("1.3B, 1 x 2048", 1, 4352, 2048, layout="slice", row=(8512, 4096)),
    Case("1.3B contiguous, 8 x 2048", 8, 4352, 2048, layout="contiguous"),
)
"""What a GPU is measured at."""
