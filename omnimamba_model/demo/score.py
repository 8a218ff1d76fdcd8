"""The demo's metrics: what is drawn, what is answered, and how much of it is memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..generation import answer, draw
from ..image_tokenizer import PatchTokenizer
from ..omnimamba import OmniMamba
from ..sampling import Sampling
from ..text_tokenizer import WordTokenizer
from .digits import Scans
from .judge import Judge, copied_fraction, nearest_ratio
from .lessons import answer_table, caption_table, longest_answer
from .words import CAPTIONS, QUESTIONS, caption


@dataclass(frozen=True)
class Drawings:
    """Drawings asked for in words: prompts, the digits they name, and what was drawn as tokens and as images."""

    prompts: list[str]
    digits: Tensor
    tokens: Tensor
    images: Tensor


def make_drawings(
    model: OmniMamba, words: WordTokenizer, pixels: PatchTokenizer, count: int, sampling: Sampling
) -> Drawings:
    """``count`` drawings: digits in turn, the next phrasing after every ten."""
    places = torch.arange(count)
    digits, phrasings = places % 10, places // 10 % len(CAPTIONS)
    prompts = [caption(CAPTIONS[p], d) for p, d in zip(phrasings.tolist(), digits.tolist(), strict=True)]
    tokens = draw(model, caption_table(words)[phrasings, digits], sampling)
    return Drawings(prompts, digits, tokens, pixels.decode(tokens))


def make_answers(
    model: OmniMamba, words: WordTokenizer, pixels: PatchTokenizer, images: Tensor
) -> dict[str, list[str]]:
    """The model's answer to every question about every image (n, height, width), by question."""
    features, steps = pixels.features(images), longest_answer(words)
    said = {}
    for question in QUESTIONS:
        asked = torch.tensor([words.encode(question)]).expand(len(images), -1)
        said[question] = [words.decode(ids) for ids in answer(model, features, asked, steps).tolist()]
    return said


def answer_accuracy(said: dict[str, list[str]], digits: Tensor) -> dict[str, float]:
    """The share of exactly right answers, by question."""
    right = {
        question: [words == QUESTIONS[question](digit) for words, digit in zip(answers, digits.tolist(), strict=True)]
        for question, answers in said.items()
    }
    return {question: sum(marks) / len(marks) for question, marks in right.items()}


@torch.inference_mode()
def losses(model: OmniMamba, words: WordTokenizer, pixels: PatchTokenizer, scans: Scans) -> dict[str, float]:
    """Mean cross-entropy in nats: of an image token given the caption, of an answer's word given scan and question.

    Captions and questions take turns over the scans.
    """
    places = torch.arange(len(scans))
    captions, (text, labels) = caption_table(words), answer_table(words)
    asked = captions[places % len(CAPTIONS), scans.labels]
    about = (places % len(QUESTIONS), scans.labels)
    return {
        "t2i": model.t2i(asked, pixels.encode(scans.images)).loss.item(),
        "mmu": model.mmu(pixels.features(scans.images), text[about], labels[about]).loss.item(),
    }


def metrics(
    model: OmniMamba,
    words: WordTokenizer,
    pixels: PatchTokenizer,
    training: Scans,
    scored: Scans,
    drawn: Drawings,
    said: dict[str, list[str]],
) -> dict[str, Any]:
    """Every figure of metrics.json but the time; ``training`` is what was learned from, ``scored`` was not."""
    judge = Judge(training)
    known, others = pixels.encode(training.images), pixels.encode(scored.images)
    by_question = answer_accuracy(said, scored.labels)
    return {
        "t2i_accuracy": judge.accuracy(drawn.images, drawn.digits),
        "mmu_accuracy": sum(by_question.values()) / len(by_question),
        "mmu_accuracy_by_question": by_question,
        "classifier_accuracy": judge.accuracy(scored.images, scored.labels),
        "ceiling_accuracy": judge.accuracy(pixels.decode(others), scored.labels),
        "copied_fraction": copied_fraction(drawn.tokens, known),
        "copied_fraction_of_real_scans": copied_fraction(others, known),
        "nearest_ratio": nearest_ratio(drawn.images, pixels.decode(others), pixels.decode(known)),
        "held_out_loss": losses(model, words, pixels, scored),
        "training_loss": losses(model, words, pixels, training),
    }
