"""Scans and words as the files that the trainer reads.

text.jsonl   {"text": sentence}                                          stage 0
t2i.jsonl    {"captions": [every phrasing], "tokens": [ids]}             drawing
mmu.json     {"image": file, "conversations": [a question, its answer]}  understanding, LLaVA's format
images/      the pictures of mmu.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..image_tokenizer import PatchTokenizer
from .digits import Scans
from .words import QUESTIONS, captions, sentences

TEXT, DRAWING, UNDERSTANDING, IMAGES = "text.jsonl", "t2i.jsonl", "mmu.json", "images"


def write_lessons(folder: Path, scans: Scans, pixels: PatchTokenizer, copies: int, noise: float, seed: int) -> None:
    """``copies`` of every scan for either task, none like another.

    ``noise`` is the standard deviation added to every pixel, whose range is 1: nearby codes take turns then, so that no
    scan has one string of tokens to learn by heart. For understanding a scan is also moved, turned and stretched a
    little, and copies take turns in what is asked of them.
    """
    generator = torch.Generator().manual_seed(seed)
    many = Scans(scans.images.repeat(copies, 1, 1), scans.labels.repeat(copies))
    grain = noise * torch.randn(2, *many.images.shape, generator=generator)
    folder.mkdir(parents=True)
    _write_lines(folder / TEXT, ({"text": sentence} for sentence in sentences()))
    _write_drawings(folder, Scans(many.images + grain[0], many.labels), pixels)
    asked = torch.arange(copies).repeat_interleave(len(scans)) + torch.arange(len(scans)).repeat(copies)
    _write_questions(folder, Scans(vary(many.images, generator) + grain[1], many.labels), asked[:, None])


def write_exam(folder: Path, scans: Scans, pixels: PatchTokenizer) -> None:
    """Scans as they are, every question about each."""
    folder.mkdir(parents=True)
    _write_drawings(folder, scans, pixels)
    _write_questions(folder, scans, torch.arange(len(QUESTIONS)).expand(len(scans), -1))


def _write_drawings(folder: Path, scans: Scans, pixels: PatchTokenizer) -> None:
    pairs = zip(scans.labels.tolist(), pixels.encode(scans.images).tolist(), strict=True)
    _write_lines(folder / DRAWING, ({"captions": captions(digit), "tokens": tokens} for digit, tokens in pairs))


def _write_questions(folder: Path, scans: Scans, asked: Tensor) -> None:
    """``asked`` (n, k): the places in QUESTIONS, modulo their number, of what is asked about each scan."""
    (folder / IMAGES).mkdir()
    questions, records = list(QUESTIONS), []
    for i, (picture, digit, places) in enumerate(
        zip(as_pictures(scans.images), scans.labels.tolist(), asked.tolist(), strict=True)
    ):
        name = f"{i:05}.png"
        picture.save(folder / IMAGES / name)
        records += [_conversation(name, questions[place % len(questions)], digit) for place in places]
    (folder / UNDERSTANDING).write_text(json.dumps(records), encoding="utf-8")


def _conversation(image: str, question: str, digit: int) -> dict[str, Any]:
    turns = [("human", f"<image>\n{question}"), ("gpt", QUESTIONS[question](digit))]
    return {"image": image, "conversations": [{"from": who, "value": said} for who, said in turns]}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Images (n, height, width) in [0, 1], what is beyond cut off, as grey pictures."""
    levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(grey) for grey in levels.numpy()]


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (n, height, width) turned by up to 8 degrees, stretched by up to a tenth and moved by up to half a
    pixel along each axis, black where nothing was."""

    def between(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(*shape, generator=generator) - 1)

    n, height, width = images.shape
    angle, stretch, move = between(math.radians(8), n), 1 + between(0.1, 2, n), between(1.0, 2, n)
    move = move / torch.tensor([width, height])[:, None]  # the image's sides lie at -1 and 1
    across = torch.stack([angle.cos() / stretch[0], -angle.sin() / stretch[0], move[0]], dim=1)
    down = torch.stack([angle.sin() / stretch[1], angle.cos() / stretch[1], move[1]], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), [n, 1, height, width], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
