"""The published model's pictures: drawn by VQ-16, seen through DINOv2 and SigLIP.

In a checkpoint's folder: vq16.safetensors, the image tokenizer; vision.json, where both encoders are found: on the hub,
in a folder, or in one that lies in the checkpoint's and moves with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import absent, write_whole
from .foreign import read_pickle
from .pictures import plain
from .vision import DINO, SIGLIP, VisionEncoder
from .vq16 import VQ16, VQConfig
from .weights import CheckpointError, check_dtypes, check_fit

FILE, VISION = "vq16.safetensors", "vision.json"
_CONFIG = "vq_config"
_UNUSED = ("quantize.codebook_used",)
"""What the official file may hold besides the network: a count kept in training."""


class PublishedPixels:
    """Both ways between pictures and numbers; the encoders are loaded when first needed."""

    file, files = FILE, (FILE, VISION)

    def __init__(self, vq: VQ16, side: int = 256, encoders: tuple[str, str] = (DINO, SIGLIP)) -> None:
        self.vq, self.side, self.encoders = vq.eval().requires_grad_(False), side, encoders

    @cached_property
    def vision(self) -> VisionEncoder:
        with torch.random.fork_rng(devices=[]):  # when they are loaded changes nothing that is drawn
            return VisionEncoder.from_pretrained(*self.encoders).to(self.vq.quant_conv.weight.device)

    @property
    def ready(self) -> bool:
        """Whether the encoders are loaded."""
        return "vision" in self.__dict__

    def prepare(self) -> None:
        """Load the encoders, from the hub perhaps. transformers sets the process's default dtype meanwhile."""
        _ = self.vision

    def to(self, device: str | torch.device) -> PublishedPixels:
        self.vq.to(device)
        if self.ready:
            self.vision.to(device)
        return self

    def sizes(self) -> dict[str, int]:
        """What a model's config must agree with."""
        tokens = (self.side // self.vq.config.downsample) ** 2
        return {"image_vocab_size": self.vq.config.codebook_size, "image_tokens": tokens}

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> list[Image.Image]:
        """Image tokens (b, image_tokens), row by row, to colour pictures."""
        across = self.side // self.vq.config.downsample
        images = self.vq.decode(tokens.to(self.vq.quant_conv.weight.device).view(len(tokens), across, across))
        levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(rows) for rows in levels.permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def tokens_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Square pictures to image tokens (b, image_tokens), row by row."""
        shape, weight = (self.side, self.side), self.vq.quant_conv.weight
        rows = [np.array(plain(image).convert("RGB").resize(shape, Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(rows)).to(weight.device).permute(0, 3, 1, 2)
        return self.vq.encode((pixels / 127.5 - 1).to(weight.dtype)).flatten(1)

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to features (b, 729, 2176)."""
        return self.vision.look(images)

    def describe(self) -> str:
        return " beside ".join(self.encoders)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        described = {_CONFIG: json.dumps(dataclasses.asdict(self.vq.config)), "side": str(self.side)}
        tensors = {name: tensor.contiguous() for name, tensor in self.vq.state_dict().items()}
        places = (_told(folder, place) for place in self.encoders)
        encoders = json.dumps(dict(zip(("dino", "siglip"), places, strict=True)), indent=2) + "\n"
        write_whole(folder / VISION, lambda path: path.write_text(encoders, encoding="utf-8"))
        write_whole(folder / FILE, lambda path: save_file(tensors, path, metadata=described))

    @classmethod
    def load(cls, folder: str | Path) -> PublishedPixels:
        """What ``save`` wrote into ``folder``; CheckpointError where it is missing or damaged."""
        path, encoders = Path(folder) / FILE, Path(folder) / VISION
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata() or {}
            values = json.loads(described[_CONFIG])
            config = VQConfig(**{**values, "multipliers": tuple(values["multipliers"])})
            vq, side = _filled(config, load_file(path), path), int(described["side"])
            names = json.loads(encoders.read_text(encoding="utf-8"))
            return cls(vq, side, (_found(folder, names["dino"]), _found(folder, names["siglip"])))
        except FileNotFoundError as error:
            raise CheckpointError(absent(Path(error.filename or path))) from None
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} or {encoders.name} is damaged: {error}") from error


def _told(folder: Path, place: str) -> str:
    """How vision.json names an encoder: a folder by a path that holds from anywhere, a hub repository as it is."""
    if not Path(place).is_dir():
        return place
    path, home = Path(place).resolve(), folder.resolve()
    return str(path.relative_to(home) if path.is_relative_to(home) else path)


def _found(folder: str | Path, place: str) -> str:
    path = Path(folder).resolve() / place
    return str(path) if path.is_dir() else place


def read_official_vq(path: str | Path) -> VQ16:
    """The image tokenizer of LlamaGen's file, vq_ds16_t2i.pt; CheckpointError lists all that does not fit."""
    tensors = {name: t for name, t in read_pickle(Path(path)).items() if name not in _UNUSED}
    return _filled(VQConfig(), tensors, Path(path))


def _filled(config: VQConfig, tensors: dict[str, Tensor], path: Path) -> VQ16:
    with torch.device("meta"):
        vq = VQ16(config)
    check_fit(vq, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    check_dtypes({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}, path)
    vq.load_state_dict(tensors, assign=True)
    return vq
