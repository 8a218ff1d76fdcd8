"""Grey images as a few tokens: square patches, each named by the nearest entry of a fitted codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import absent, write_whole
from .pictures import plain
from .weights import CheckpointError

FILE = "image_tokenizer.safetensors"


class PatchTokenizer(nn.Module):
    """Vector quantisation of ``patch`` x ``patch`` squares, row by row.

    ``encode`` and ``decode`` serve drawing. Understanding reads ``features``, which lose nothing: each
    patch with a border of half a patch around it, in grey levels about zero (arXiv 2503.08686 likewise
    looks through an encoder and draws through a tokenizer).
    """

    file, files = FILE, (FILE,)

    def __init__(self, codes: int, patch: int, size: tuple[int, int]) -> None:
        super().__init__()
        if codes < 1:
            raise ValueError(f"codes must be 1 or more, got {codes}")
        if patch < 2 or patch % 2 or min(size) < patch or size[0] % patch or size[1] % patch:
            raise ValueError(f"patch must be even and divide the image size {size}, got {patch}")
        self.patch, self.size = patch, size
        self.register_buffer("codebook", torch.zeros(codes, patch * patch))

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return (self.size[0] // self.patch) * (self.size[1] // self.patch)

    @property
    def feature_dim(self) -> int:
        return (2 * self.patch) ** 2

    def fit(self, images: Tensor, generator: torch.Generator) -> PatchTokenizer:
        """Set the codebook by k-means over the patches of images (b, height, width) in [0, 1]."""
        self.codebook.copy_(k_means(self._patches(images).flatten(0, 1), len(self.codebook), generator))
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, height, width) in [0, 1] to tokens (b, tokens)."""
        return nearest(self._patches(images).flatten(0, 1), self.codebook).view(len(images), -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (b, tokens) to images (b, height, width)."""
        columns = self.codebook[tokens].transpose(1, 2)
        return F.fold(columns, self.size, kernel_size=self.patch, stride=self.patch)[:, 0]

    def features(self, images: Tensor) -> Tensor:
        """Images (b, height, width) in [0, 1] to (b, tokens, feature_dim)."""
        self._check(images)
        windows = F.unfold(images[:, None], 2 * self.patch, padding=self.patch // 2, stride=self.patch)
        return 2 * windows.transpose(1, 2) - 1

    def sizes(self) -> dict[str, int]:
        """What a model's config must agree with."""
        own = {"image_vocab_size": len(self.codebook), "image_tokens": self.tokens}
        return own | {"image_features": self.tokens, "feature_dim": self.feature_dim}

    def pictures(self, tokens: Tensor) -> list[Image.Image]:
        """Tokens (b, tokens) to grey pictures."""
        levels = (self.decode(tokens.to(self.codebook.device)).float().clamp(0, 1) * 255).round().to(torch.uint8)
        return [Image.fromarray(grey) for grey in levels.cpu().numpy()]

    ready = True

    def prepare(self) -> None:
        """There is nothing to load."""

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size to features; the enlarged pixels of a drawing shrink back exactly."""
        return self.features(self._grey(images))

    def tokens_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size to tokens (b, tokens)."""
        return self.encode(self._grey(images))

    def _grey(self, images: Sequence[Image.Image]) -> Tensor:
        height, width = self.size
        grey = [plain(image).convert("L").resize((width, height), Image.Resampling.BOX) for image in images]
        return torch.from_numpy(np.stack([np.array(g, dtype=np.float32) for g in grey])) / 255

    def describe(self) -> str:
        return f"patches of {self.patch} at {self.size}"

    def save(self, folder: str | Path) -> None:
        tensors = {"codebook": self.codebook, "size": torch.tensor(self.size)}
        write_whole(Path(folder) / FILE, lambda path: save_file(tensors, path))

    @classmethod
    def load(cls, folder: str | Path) -> PatchTokenizer:
        """The tokenizer that ``save`` wrote into ``folder``; CheckpointError where it is missing or damaged."""
        path = Path(folder) / FILE
        try:
            tensors = load_file(path)
            codebook, size = tensors["codebook"], tensors["size"]
            _check_stored(codebook, size)
            tokenizer = cls(len(codebook), math.isqrt(codebook.shape[1]), tuple(size.tolist()))
            tokenizer.codebook.copy_(codebook)
        except FileNotFoundError:
            raise CheckpointError(absent(path)) from None
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not an image tokenizer: {error}") from error
        return tokenizer

    def _patches(self, images: Tensor) -> Tensor:
        self._check(images)
        return F.unfold(images[:, None], self.patch, stride=self.patch).transpose(1, 2)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 3 or tuple(images.shape[1:]) != self.size:
            raise ValueError(f"images must have shape (b, {self.size[0]}, {self.size[1]}), got {tuple(images.shape)}")


def _check_stored(codebook: Tensor, size: Tensor) -> None:
    if size.shape != (2,) or size.dtype != torch.long:
        raise ValueError(f"size must be 2 whole numbers (int64), got {size.dtype} of shape {tuple(size.shape)}")
    if codebook.ndim != 2 or math.isqrt(codebook.shape[1]) ** 2 != codebook.shape[1]:
        raise ValueError(f"codebook must have shape (codes, patch * patch), got {tuple(codebook.shape)}")
    if not codebook.is_floating_point() or not bool(codebook.float().isfinite().all()):
        raise ValueError(f"codebook must hold finite floating-point numbers, got {codebook.dtype} or NaN or infinity")


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The place of each point's (n, d) nearest centre (k, d): (n,); the first of equals."""
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)


def k_means(points: Tensor, k: int, generator: torch.Generator, rounds: int = 100) -> Tensor:
    """k centres (k, d) of points (n, d): Lloyd's rounds from a k-means++ start (Arthur and Vassilvitskii 2007)."""
    first = torch.randint(len(points), (1,), generator=generator)
    centres = points[first]
    distance = (points - centres).square().sum(1)
    while len(centres) < k:
        if not distance.any():
            raise ValueError(f"k-means needs {k} different points, got {len(centres)}")
        chosen = points[torch.multinomial(distance, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        distance = torch.minimum(distance, (points - chosen).square().sum(1))
    for _ in range(rounds):
        member = nearest(points, centres)
        count = torch.bincount(member, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, member, points)
        moved = torch.where(count[:, None] > 0, sums / count[:, None].clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
