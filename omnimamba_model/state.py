"""What a Mamba-2 model remembers of a sequence: the same few bytes at any length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MambaConfig


@dataclass
class MambaState:
    """conv (layers, b, conv channels, d_conv - 1) and ssm (layers, b, heads, headdim, d_state).

    ``conv`` keeps the last inputs of each convolution, ``ssm`` the state of each scan, always fp32;
    ``position`` counts the tokens taken in.
    """

    conv: Tensor
    ssm: Tensor
    position: int = 0

    @classmethod
    def empty(cls, config: MambaConfig, batch: int, *, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Zeros; ``dtype`` is the convolution inputs' own, the scan's states are fp32."""
        conv = torch.zeros(config.n_layer, batch, config.conv_dim, config.d_conv - 1, dtype=dtype, device=device)
        shape = (config.n_layer, batch, config.nheads, config.headdim, config.d_state)
        return cls(conv, torch.zeros(shape, dtype=torch.float32, device=device))

    def take(self, rows: list[int]) -> MambaState:
        """The states of some rows, in that order and as often as they are named."""
        return MambaState(self.conv[:, rows].contiguous(), self.ssm[:, rows].contiguous(), self.position)

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes
