"""A drawing of every caption of a file, in a folder, for measures that compare sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..pipeline import Pipeline, write_png
from ..sampling import Sampling
from ..training.tokenize import coco_captions


def read_captions(path: Path) -> list[str]:
    """A caption a line; or COCO's captions file, the first caption of each of its images."""
    if path.suffix == ".json":
        return [said[0] for _, said in coco_captions(path) if said]
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def draw_captions(
    pipeline: Pipeline, captions: Sequence[str], folder: Path, sampling: Sampling, guidance: float, batch: int = 16
) -> None:
    """000000.png and on. Drawings that are there are kept; a batch has one seed, so that a stop changes none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(captions), unit="image") as bar:
        for start in range(0, len(captions), batch):
            part = captions[start : start + batch]
            paths = [folder / f"{start + i:06}.png" for i in range(len(part))]
            if not all(path.exists() for path in paths):
                seed = None if sampling.seed is None else sampling.seed * 1_000_003 + start
                drawn = pipeline.draw(part, replace(sampling, seed=seed), guidance)
                for image, path in zip(drawn, paths, strict=True):
                    write_png(image, path)
            bar.update(len(part))
