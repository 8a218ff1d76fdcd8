"""A drawing of every caption of a file, in a folder, for measures that compare sets of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import write_whole
from ..pipeline import Pipeline, write_png
from ..sampling import Sampling
from ..training.tokenize import coco_captions
from .question import read_json, read_text

ABOUT = "drawings.json"
"""What the drawings of a folder were made of."""


def read_captions(path: Path) -> list[str]:
    """A caption a line; or COCO's captions file, the first caption of each of its images. ValueError where none is."""
    if path.suffix == ".json":
        found = [said[0] for _, said in coco_captions(path) if said]
    else:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} has no captions")
    return found


def draw_captions(
    pipeline: Pipeline,
    captions: Sequence[str],
    folder: Path,
    sampling: Sampling,
    guidance: float,
    batch: int = 16,
    *,
    checkpoint: str = "",
) -> None:
    """000000.png and on. Drawings that are there are kept; a batch has one seed, so that a stop changes none.

    ValueError where the folder's drawings were made of anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"checkpoint": checkpoint, "sampling": vars(sampling), "guidance": guidance, "batch": batch}
    about |= pipeline.describe()
    _claim(folder / ABOUT, about | {"captions": list(captions)})
    with tqdm(total=len(captions), unit="image") as bar:
        for start in range(0, len(captions), batch):
            part = captions[start : start + batch]
            paths = [folder / f"{start + i:06}.png" for i in range(len(part))]
            if not all(path.exists() for path in paths):
                seed = None if sampling.seed is None else _signed(sampling.seed * 1_000_003 + start)
                drawn = pipeline.draw(part, replace(sampling, seed=seed), guidance)
                for image, path in zip(drawn, paths, strict=True):
                    write_png(image, path)
            bar.update(len(part))


def _signed(number: int) -> int:
    """The lowest 64 bits, as a seed has them."""
    return (number + 2**63) % 2**64 - 2**63


def _claim(path: Path, mine: dict[str, Any]) -> None:
    if not path.exists():
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8"))
        return
    theirs = read_json(path)
    changed = [name for name in mine if not isinstance(theirs, dict) or mine[name] != theirs.get(name)]
    if changed:
        raise ValueError(f"{path.parent} holds drawings of other {', '.join(changed)}; name another folder")
