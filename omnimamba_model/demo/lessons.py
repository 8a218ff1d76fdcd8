"""Batches: scans and words as the token sequences that the model learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..image_tokenizer import PatchTokenizer
from ..omnimamba import IGNORE
from ..text_tokenizer import SPECIAL, WordTokenizer
from ..training import Batch
from .digits import Scans, shift
from .words import CAPTIONS, QUESTIONS, caption, sentences

TEXT_SLOTS = 5
"""The longest caption, in words."""


def caption_table(words: WordTokenizer) -> Tensor:
    """(phrasings, 10 digits, TEXT_SLOTS) ids, padded on the left."""
    return _pad([[words.encode(caption(p, digit)) for digit in range(10)] for p in CAPTIONS], TEXT_SLOTS, left=True)


def answer_table(words: WordTokenizer) -> tuple[Tensor, Tensor]:
    """Question, answer and end, padded on the right, and labels that leave the question out.

    Both (questions, 10 digits, the longest).
    """
    asked = [words.encode(question) for question in QUESTIONS]
    said = [[words.encode(answer(d)) + [SPECIAL.eos] for d in range(10)] for answer in QUESTIONS.values()]
    longest = max(len(q) + len(a) for q, answers in zip(asked, said, strict=True) for a in answers)
    text = [[q + a for a in answers] for q, answers in zip(asked, said, strict=True)]
    text = _pad(text, longest)
    labels = text.masked_fill(text == SPECIAL.pad, IGNORE)
    for row, q in zip(labels, asked, strict=True):
        row[:, : len(q)] = IGNORE
    return text, labels


class Lessons:
    """Random batches of each kind from some scans; the generator alone decides which.

    ``noise`` is the standard deviation added to every pixel, whose range is 1, before a scan becomes
    tokens or features. Nearby codes take turns then, so that no scan has one string of tokens to
    learn by heart.
    """

    def __init__(
        self,
        scans: Scans,
        words: WordTokenizer,
        pixels: PatchTokenizer,
        generator: torch.Generator,
        batch: int,
        noise: float,
    ) -> None:
        self.scans, self.pixels, self.generator, self.batch, self.noise = scans, pixels, generator, batch, noise
        self.captions = caption_table(words)
        self.text, self.labels = answer_table(words)
        said = [[[SPECIAL.eos, *words.encode(sentence), SPECIAL.eos] for sentence in sentences()]]
        self.sentences = _pad(said, max(map(len, said[0])))[0]

    def by_name(self) -> dict[str, Callable[[int], Batch]]:
        """For the trainer, which asks for places in order: each is the next from the generator."""
        kinds = {"sentences": self.read, "images": self.imagine, "t2i": self.draw, "mmu": self.look}
        return {name: lambda place, make=make: make() for name, make in kinds.items()}

    def read(self) -> Batch:
        """Plain sentences."""
        ids = self.sentences[self._pick(len(self.sentences))]
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == SPECIAL.pad, IGNORE)
        return "text", {"ids": ids[:, :-1], "labels": labels}

    def imagine(self) -> Batch:
        """Image tokens after an empty caption, without any adapter."""
        image = self.pixels.encode(self._noisy(self.scans.images[self._pick(len(self.scans))]))
        caption = torch.full((self.batch, TEXT_SLOTS), SPECIAL.pad)
        return "t2i", {"caption": caption, "image": image, "adapter": False}

    def draw(self) -> Batch:
        """Captions and the image tokens they ask for."""
        rows = self._pick(len(self.scans))
        caption = self.captions[self._pick(len(CAPTIONS)), self.scans.labels[rows]]
        return "t2i", {"caption": caption, "image": self.pixels.encode(self._noisy(self.scans.images[rows]))}

    def look(self) -> Batch:
        """Scans shifted by up to a pixel, a question about each, its answer to be learned."""
        rows, question = self._pick(len(self.scans)), self._pick(len(QUESTIONS))
        digits = self.scans.labels[rows]
        images = self._noisy(shift(self.scans.images[rows], self.generator))
        text, labels = self.text[question, digits], self.labels[question, digits]
        return "mmu", {"features": self.pixels.features(images), "text": text, "labels": labels}

    def _noisy(self, images: Tensor) -> Tensor:
        return images + self.noise * torch.randn(images.shape, generator=self.generator)

    def _pick(self, n: int) -> Tensor:
        return torch.randint(n, (self.batch,), generator=self.generator)


def longest_answer(words: WordTokenizer) -> int:
    """Tokens of the longest answer and its end."""
    return int((answer_table(words)[1] != IGNORE).sum(-1).max())


def _pad(rows: Sequence[Sequence[Sequence[int]]], width: int, left: bool = False) -> Tensor:
    """Lists of id lists to (len(rows), len(rows[0]), width), filled up with the pad token."""
    table = torch.full((len(rows), len(rows[0]), width), SPECIAL.pad)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            place = slice(width - len(ids), width) if left else slice(len(ids))
            table[i, j, place] = torch.tensor(ids)
    return table
