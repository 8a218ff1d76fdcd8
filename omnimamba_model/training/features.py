"""What the frozen encoders saw of a picture, kept on disk and in memory: they need to look once."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import clear_temporaries, write_whole
from ..pictures import decode
from .records import BadRecord

_ABANDONED = 3600.0
"""Seconds after which nobody is still writing a file of the cache."""


class FeatureCache:
    """Features (image_features, feature_dim) by the picture's bytes, one file each, in 16 bits unless told otherwise.

    Many processes may share a folder: files are whole or not there, and equal pictures have equal files. ``encoder``
    names what looked, so that another encoder's features are never taken for its own.
    """

    def __init__(self, folder: str | Path, encoder: str, dtype: torch.dtype = torch.float16) -> None:
        self.folder, self.encoder, self.dtype = Path(folder), encoder, dtype

    def path(self, picture: bytes) -> Path:
        name = hashlib.sha256(self.encoder.encode() + b"\0" + picture).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def clear(folder: str | Path) -> None:
        """Remove what killed processes left half written."""
        for part in Path(folder).glob("??"):
            clear_temporaries(part, _ABANDONED)

    def get(self, picture: bytes, look: Callable[[], Tensor]) -> Tensor:
        """The kept features, or what ``look()`` sees, which is kept; a damaged file is made anew."""
        path = self.path(picture)
        try:
            return load_file(path)["features"]
        except (FileNotFoundError, SafetensorError, KeyError):
            features = look().to(self.dtype).cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: save_file({"features": features}, temporary))
        return features


class RecentFeatures:
    """Features of the pictures that were asked for last, by the picture's bytes, as many as fit into ``most`` bytes."""

    def __init__(self, most: int = 64 * 2**20) -> None:
        self.most, self._size = most, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, picture: bytes, look: Callable[[], Tensor]) -> Tensor:
        """The kept features, or what ``look()`` sees, which is kept."""
        key = hashlib.sha256(picture).digest()
        found = self._kept.pop(key, None)
        if found is None:
            found = look()
            self._size += found.nbytes
        self._kept[key] = found
        while self._size > self.most:
            _, oldest = self._kept.popitem(last=False)
            self._size -= oldest.nbytes
        return found


def read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a device would never end
            raise BadRecord(f"{path} cannot be read: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error.strerror}") from error


def decoded(picture: bytes, name: object) -> Image.Image:
    try:
        return decode(io.BytesIO(picture), f"image {name}")
    except ValueError as error:
        raise BadRecord(str(error)) from error


def look_at(image: Image.Image, look: Callable[[list[Image.Image]], Tensor]) -> Tensor:
    """One picture's features, on the CPU wherever the encoders are, without gradients."""
    with torch.no_grad():
        return look([image])[0].cpu()
