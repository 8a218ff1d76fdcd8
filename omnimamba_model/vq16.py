"""The image tokenizer of the published model: LlamaGen's VQ-16 (arXiv 2406.06525, section 2.1), frozen.

An image (3, 16 h, 16 w) in [-1, 1] becomes h x w vectors of 8 numbers, each replaced by the nearest of 16384 unit
vectors; its place in that codebook is the token. Convolutions at five widths, halving the sides four times:

    encoder: conv_in, per width 2 residual blocks (attention after each at the last width) and a halving, mid, conv_out
    decoder: conv_in, mid, per width 3 residual blocks (attention at the first) and a doubling, conv_out

Tensors bear the names of the official file, ``vq_ds16_t2i.pt`` (71,883,403 parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQConfig:
    """Sizes; the defaults are the published tokenizer's."""

    codebook_size: int = 16384
    codebook_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    groups: int = 32
    """Of every group norm."""

    @property
    def downsample(self) -> int:
        """Pixels of a side to one token."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)


class VQ16(nn.Module):
    """``encode`` images to tokens and ``decode`` tokens to images; see the module's text for the maths."""

    def __init__(self, config: VQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, height, width) in [-1, 1], sides multiples of 16, to tokens (b, height / 16, width / 16)."""
        side = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"images must have shape (b, 3, height, width), sides multiples of {side}, got {tuple(images.shape)}"
            )
        return self.quantize.nearest(self.quant_conv(self.encoder(images)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (b, h, w) to images (b, 3, 16 h, 16 w), about [-1, 1]."""
        if tokens.ndim != 3:
            raise ValueError(f"tokens must have shape (b, h, w), got {tuple(tokens.shape)}")
        return self.decoder(self.post_quant_conv(self.quantize(tokens)))


class Codebook(nn.Module):
    """Unit vectors; the table keeps them before they are normalised."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, h, w) to (b, width, h, w)."""
        return F.normalize(self.embedding(tokens), dim=-1).permute(0, 3, 1, 2)

    def nearest(self, z: Tensor) -> Tensor:
        """(b, width, h, w) to tokens (b, h, w): of unit vectors the nearest has the largest product."""
        points = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        table = F.normalize(self.embedding.weight, dim=-1)
        rows = [(row.flatten(0, 1) @ table.T).argmax(-1).view(row.shape[:2]) for row in points]
        return torch.stack(rows) if rows else points.new_zeros(points.shape[:3], dtype=torch.long)


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = _conv3(3, config.channels)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            resample = {} if last else {"downsample": Downsample(out)}
            self.conv_blocks.append(Level(width, out, 2, attends=last, groups=groups, **resample))
            width = out
        self.mid = _middle(width, groups)
        self.norm_out = _norm(groups, width)
        self.conv_out = _conv3(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        return _through(self.conv_in(x), [*self.conv_blocks, *self.mid, self.norm_out, nn.SiLU(), self.conv_out])


class Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        width = widths[-1]
        self.conv_in = _conv3(config.z_channels, width)
        self.mid = _middle(width, groups)
        self.conv_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            out, first = widths[level], level == len(widths) - 1
            resample = {} if level == 0 else {"upsample": Upsample(out)}
            self.conv_blocks.append(Level(width, out, 3, attends=first, groups=groups, **resample))
            width = out
        self.norm_out = _norm(groups, width)
        self.conv_out = _conv3(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        return _through(self.conv_in(z), [*self.mid, *self.conv_blocks, self.norm_out, nn.SiLU(), self.conv_out])


class Level(nn.Module):
    """Residual blocks at one width, attention after each where it ``attends``, then at most one change of size."""

    def __init__(self, width: int, out: int, depth: int, *, attends: bool, groups: int, **resample: nn.Module) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(width if i == 0 else out, out, groups) for i in range(depth))
        self.attn = nn.ModuleList(AttentionBlock(out, groups) for _ in range(depth if attends else 0))
        self._resample = tuple(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return _through(x, [self.get_submodule(name) for name in self._resample])


class ResidualBlock(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, width)
        self.conv1 = _conv3(width, out)
        self.norm2 = _norm(groups, out)
        self.conv2 = _conv3(out, out)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        update = self.conv1(F.silu(self.norm1(x)))
        update = self.conv2(F.silu(self.norm2(update)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + update


class AttentionBlock(nn.Module):
    """One head over all positions, with a residual connection."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(groups, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halves both sides; the row and column of zeros come below and to the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(width, width, groups), AttentionBlock(width, groups), ResidualBlock(width, width, groups)]
    )


def _conv3(width: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1)


def _norm(groups: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def _through(x: Tensor, modules: list[nn.Module]) -> Tensor:
    for module in modules:
        x = module(x)
    return x
