"""Fréchet inception distance between two folders of pictures (Heusel et al. 2017), by torchmetrics."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..pictures import read_image
from ..training.tokenize import square

SIDE = 299
"""What Inception looks at."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def fid(
    real: Path,
    drawn: Path,
    features: nn.Module | None = None,
    batch: int = 32,
    device: str | torch.device = "cpu",
    inception: Path | None = None,
) -> float:
    """The distance, 0 for equal sets.

    ``features`` maps bytes (b, 3, 299, 299) to vectors (b, n); None is Inception v3 as the measure is published, with
    the weights of the file ``inception`` (pt_inception-2015-12-05-6726825d.pth), which torch-fidelity fetches once
    where none is named. Pictures are cropped to a square about their middle and resized bicubically. ImportError
    without torchmetrics; ValueError where a folder has fewer than two pictures, or ``inception`` is no file.
    """
    folders = [(pictures(real), True), (pictures(drawn), False)]
    if inception is not None and not inception.is_file():
        raise ValueError(f"{inception} must be a file with Inception's weights")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        given = 2048 if features is None else features
        weights = None if inception is None else str(inception)
        metric = FrechetInceptionDistance(given, feature_extractor_weights_path=weights)
    except ModuleNotFoundError as error:
        raise ImportError(f"FID needs torchmetrics, pip install 'omnimamba[evaluate]': {error}") from error
    metric.set_dtype(torch.float64).to(device)
    for paths, is_real in folders:
        name = (real if is_real else drawn).name
        for images in tqdm(_batches(paths, batch), total=-(-len(paths) // batch), desc=name, unit="batch"):
            metric.update(images.to(device), real=is_real)
    return float(metric.compute())


def read_features(path: Path) -> nn.Module:
    """The network that ``torch.export.save`` wrote; ValueError where the file is none."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no file of torch.export.save")
    try:
        return torch.export.load(path).module()
    except Exception as error:  # torch raises of many kinds
        raise ValueError(f"{path} is no whole file of torch.export.save: {error}") from error


def pictures(folder: Path) -> list[Path]:
    """ValueError where there are fewer than two, of which no covariance can be had."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if len(found) < 2:
        raise ValueError(f"{folder} must be a folder of two pictures or more, got {len(found)}")
    return found


def _batches(paths: list[Path], batch: int) -> Iterator[Tensor]:
    for start in range(0, len(paths), batch):
        yield torch.stack([_bytes(read_image(path)) for path in paths[start : start + batch]])


def _bytes(image: Image.Image) -> Tensor:
    whole = square(image.convert("RGB")).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)
