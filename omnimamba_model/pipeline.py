"""From words to pictures and from pictures to words: the model between its two tokenizers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import OmniMambaConfig
from .files import write_whole
from .generation import GREEDY, Sampling, answer, draw
from .image_tokenizer import PatchTokenizer
from .omnimamba import OmniMamba
from .text_tokenizer import FIRST_WORD, WordTokenizer
from .weights import CheckpointError, load, read_tokenizer


class TextTokenizer(Protocol):
    """Words to ids and back. ``encode`` raises ValueError for text it has no ids for."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ImageTokenizer(Protocol):
    """Grey images (b, height, width) in [0, 1] to what the model draws with and what it looks at."""

    size: tuple[int, int]
    """Height and width in pixels."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens (b, image_tokens) to images."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Images to the feature vectors of understanding (b, image_features, feature_dim)."""
        ...


@dataclass
class Pipeline:
    model: OmniMamba
    words: TextTokenizer
    pixels: ImageTokenizer
    answer_tokens: int = 32
    """The longest answer."""

    @classmethod
    def load(cls, folder: str | Path) -> Pipeline:
        """All three parts from a checkpoint folder; CheckpointError where one is missing or damaged."""
        model, text = load(folder), read_tokenizer(folder)
        if not isinstance(model, OmniMamba):
            raise CheckpointError(f"{folder} holds a plain language model, which can neither draw nor see")
        if text is None:
            raise CheckpointError(f"{folder} has no tokenizer.json")
        try:
            words = WordTokenizer.from_json(text)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        pixels = PatchTokenizer.load(folder)
        _check_together(folder, model.config, words, pixels)
        return cls(model, words, pixels)

    def draw(self, prompts: Sequence[str], sampling: Sampling, guidance: float = 1.0) -> list[Image.Image]:
        """One drawing a prompt."""
        caption = self.model.pad_captions([self.words.encode(prompt) for prompt in prompts])
        drawn = self.pixels.decode(draw(self.model, caption, sampling, guidance))
        levels = (drawn.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return [Image.fromarray(grey) for grey in levels.cpu().numpy()]

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str], sampling: Sampling = GREEDY) -> list[str]:
        """One answer a pair. Questions of one length share a batch, so that padding never enters the state."""
        if len(images) != len(questions):
            raise ValueError(f"questions must be as many as images, {len(images)}, got {len(questions)}")
        asked = [self.words.encode(question) for question in questions]
        features = self.pixels.features(torch.stack([self._read(image) for image in images]))
        groups: dict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(asked):
            groups[len(ids)].append(row)
        said = [""] * len(asked)
        for rows in groups.values():
            question = torch.tensor([asked[row] for row in rows])
            for row, ids in zip(
                rows, answer(self.model, features[rows], question, self.answer_tokens, sampling), strict=True
            ):
                said[row] = self.words.decode(_until(ids.tolist(), self.model.config.tokens.eos))
        return said

    def _read(self, image: Image.Image) -> Tensor:
        """A picture as grey levels in [0, 1] at the tokenizer's size; enlarged pixels shrink back exactly."""
        height, width = self.pixels.size
        grey = image.convert("L").resize((width, height), Image.Resampling.BOX)
        return torch.from_numpy(np.array(grey, dtype=np.float32)) / 255


def _check_together(folder: str | Path, config: OmniMambaConfig, words: WordTokenizer, pixels: PatchTokenizer) -> None:
    """CheckpointError that names each field of config.json in which a tokenizer disagrees with the model."""
    texts, images = "tokenizer.json", "image_tokenizer.safetensors"
    problems = [
        f"{name} is {value}, but {file} has {has}"
        for name, value, file, has in (
            ("backbone.vocab_size", config.backbone.vocab_size, texts, words.vocab_size),
            ("image_vocab_size", config.image_vocab_size, images, len(pixels.codebook)),
            ("image_tokens", config.image_tokens, images, pixels.tokens),
            ("image_features", config.image_features, images, pixels.tokens),
            ("feature_dim", config.feature_dim, images, pixels.feature_dim),
        )
        if value != has
    ]
    problems += [
        f"tokens.{name} is {i}, but {texts} has words from {FIRST_WORD}"
        for name, i in dataclasses.asdict(config.tokens).items()
        if i >= FIRST_WORD
    ]
    if problems:
        raise CheckpointError(f"{folder}/config.json does not fit its tokenizers: {'; '.join(problems)}")


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def contact_sheet(images: Sequence[Image.Image], columns: int = 10, least: int = 128) -> Image.Image:
    """Images of one size in rows of ``columns``, each pixel enlarged so that a side has ``least`` pixels or more."""
    width, height = images[0].size
    factor = max(1, -(-least // min(width, height)))
    gap = 8 if len(images) > 1 else 0
    cell_w, cell_h = width * factor + gap, height * factor + gap
    across, down = min(columns, len(images)), -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (across * cell_w - gap, down * cell_h - gap), "white")
    for i, image in enumerate(images):
        big = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(big, (i % columns * cell_w, i // columns * cell_h))
    return sheet


def read_image(path: Path) -> Image.Image:
    """A picture file, decoded; OSError or ValueError where it is none, damaged or too large to be honest."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def write_png(image: Image.Image, path: Path) -> None:
    """The image as a PNG file, whole or not there."""
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))
