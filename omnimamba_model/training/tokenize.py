"""``omnimamba tokenize``: a folder of pictures and captions to the JSON lines that drawing learns from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..files import write_whole
from ..pictures import read_image
from ..pipeline import ImageTokenizer
from .records import PICTURES


def tokenize(
    folder: str | Path, out: str | Path, pixels: ImageTokenizer, captions: str | Path | None = None, batch: int = 16
) -> tuple[int, Counter[str]]:
    """Write ``{"captions": [text, ..], "tokens": [ids], "image": name}`` a line; how many, and why others were not.

    Captions are the lines of NAME.txt beside NAME.jpg, or those of a COCO captions file (``images`` and
    ``annotations``). Pictures are cropped to a square about their middle. The file is written whole or not at all.
    ValueError where no picture has both.
    """
    folder, passed_over = Path(folder), Counter()
    if captions is not None:
        known = dict(coco_captions(Path(captions)))
        names, said_of = list(known), known.__getitem__
    else:
        names, said_of = list(_pictures(folder)), partial(_beside, folder)
    written = 0

    def write(path: Path) -> None:
        nonlocal written
        with open(path, "w", encoding="utf-8") as file:
            waiting: list[tuple[str, list[str], Image.Image]] = []
            for i, name in enumerate(tqdm(names, unit="image")):
                try:
                    texts = said_of(name)
                    if not texts:
                        raise ValueError("it has no caption")
                    waiting.append((name, texts, square(read_image(folder / name))))
                except (OSError, ValueError) as error:
                    passed_over[f"{name}: {error}"] += 1
                if waiting and (len(waiting) == batch or i == len(names) - 1):
                    for (named, said, _), ids in zip(waiting, pixels.tokens_of([w[2] for w in waiting]), strict=True):
                        line = {"captions": said, "tokens": ids.tolist(), "image": named}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    written += len(waiting)
                    waiting.clear()
        if not written:
            first = f", such as {next(iter(passed_over))}" if passed_over else ""
            raise ValueError(f"no picture of {folder} has a caption; {len(passed_over)} were passed over{first}")

    write_whole(Path(out), write)
    return written, passed_over


def square(image: Image.Image) -> Image.Image:
    """The middle of a picture, as wide as it is high."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pictures(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower().removeprefix(".") in PICTURES:
            yield str(path.relative_to(folder))


def _beside(folder: Path, name: str) -> list[str]:
    """The lines of NAME.txt, none where there is no such file; OSError or ValueError where it cannot be read."""
    path = (folder / name).with_suffix(".txt")
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def coco_captions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each image's file name and what was said of it; ValueError where ``path`` is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in values["images"]}
        if odd := [name for name in names.values() if not isinstance(name, str)]:
            raise TypeError(f"file_name must be a text, got {odd[0]!r}")
        said: dict[str, list[str]] = {name: [] for name in names.values()}
        for note in values["annotations"]:
            said[names[note["image_id"]]].append(note["caption"].strip())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no captions file of COCO: {error!r}") from error
    yield from said.items()
