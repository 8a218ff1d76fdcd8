"""Pictures as a viewer shows them, whatever their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What sets a picture upright, by its EXIF orientation."""
_WHITE = 65535
"""Of 16-bit levels; Pillow's 32-bit ones come from 16-bit files."""
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def plain(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says, 16-bit levels in 8 bits, what is transparent on white.

    Pillow's own ``convert`` leaves the turn out, cuts levels above 255 to white, and shows the colour that was stored
    under transparency. ValueError where levels are of no known range.
    """
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        see_through = {k: v for k, v in image.info.items() if k == "transparency"}
        image = image.transpose(turn)
        image.info = see_through  # what says how to turn it would turn it again
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever a damaged EXIF makes of Pillow's own assumptions: the picture is there without it
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _WHITE:
        raise ValueError(
            f"levels must be whole numbers of 8 bits, or of 16 in 0..{_WHITE}, got {image.mode} with "
            f"{levels.min()}..{levels.max()}; save the picture with 8"
        )
    return Image.fromarray(np.rint(levels / (_WHITE / 255)).astype(np.uint8))


def decode(file: str | Path | IO[bytes], name: object) -> Image.Image:
    """A picture's file, decoded and ``plain``. ValueError, which says ``name``, where it is none, damaged or too large
    to be honest; OSError where the file itself cannot be read."""
    try:
        with Image.open(file) as image:
            image.load()
            return plain(image)
    except UnidentifiedImageError as error:  # names an object in memory
        raise ValueError(f"{name} is no picture") from error
    except Exception as error:  # whatever a damaged file makes of a decoder's own assumptions
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def read_image(path: Path) -> Image.Image:
    """A picture file; ValueError or OSError as in ``decode``."""
    return decode(path, path)
