"""The demo's metrics: what is drawn, what is answered, and how much of it is memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..omnimamba import Prediction
from ..pipeline import Pipeline
from ..training.lessons import Drawing, Understanding
from ..training.records import open_records
from .data import DRAWING, IMAGES, UNDERSTANDING, as_pictures
from .digits import Scans
from .judge import Judge, copied_fraction, nearest_ratio
from .settings import DATA, Settings
from .words import CAPTIONS, QUESTIONS, caption

EXAM = "exam"
"""The folder of the scans to score."""
MOST = 450
"""Records that are predicted."""


@dataclass(frozen=True)
class Drawings:
    """Drawings asked for in words: prompts, the digits they name, and what was drawn as tokens and as images."""

    prompts: list[str]
    digits: Tensor
    tokens: Tensor
    images: Tensor


def make_drawings(pipeline: Pipeline, settings: Settings, seed: int) -> Drawings:
    """Digits in turn, the next phrasing after every ten."""
    digits = torch.arange(settings.drawings) % 10
    prompts = [caption(CAPTIONS[i // 10 % len(CAPTIONS)], i % 10) for i in range(settings.drawings)]
    pictures = pipeline.draw(prompts, settings.sampling(seed), settings.guidance)
    tokens = pipeline.pixels.tokens_of(pictures)
    return Drawings(prompts, digits, tokens, pipeline.pixels.decode(tokens))


def make_answers(pipeline: Pipeline, scored: Scans) -> dict[str, list[str]]:
    """The model's answer to every question about every scan, by question."""
    pictures = as_pictures(scored.images)
    return {question: pipeline.ask(pictures, [question] * len(pictures)) for question in QUESTIONS}


def answer_accuracy(said: dict[str, list[str]], digits: Tensor) -> dict[str, float]:
    """The share of exactly right answers, by question."""
    right = {
        question: [words == QUESTIONS[question](digit) for words, digit in zip(answers, digits.tolist(), strict=True)]
        for question, answers in said.items()
    }
    return {question: sum(marks) / len(marks) for question, marks in right.items()}


@torch.inference_mode()
def predictions(pipeline: Pipeline, folder: Path) -> dict[str, Prediction]:
    """By task, over a folder's records, ``MOST`` at most: image tokens given a caption, an answer's given picture and
    question."""
    config, words = pipeline.model.config, pipeline.words
    drawn, _ = open_records([folder / DRAWING])
    asked, _ = open_records([folder / UNDERSTANDING])
    few = [min(MOST, len(records)) for records in (drawn, asked)]
    drawing = Drawing(drawn, few[0], config, words)
    looking = Understanding(asked, few[1], config, words, pipeline.pixels, images=folder / IMAGES, text_length=20)
    batches = [lesson(0) for lesson in (drawing, looking)]
    return {task: pipeline.model(task, **batch) for task, batch in batches}


def losses(pipeline: Pipeline, folder: Path) -> dict[str, float]:
    """``predictions``' mean cross-entropy in nats a token."""
    return {task: prediction.loss.item() for task, prediction in predictions(pipeline, folder).items()}


def metrics(
    pipeline: Pipeline, work: Path, training: Scans, scored: Scans, drawn: Drawings, said: dict[str, list[str]]
) -> dict[str, Any]:
    """Every figure of metrics.json but the time; ``training`` is what was learned from, ``scored`` was not."""
    judge, pixels = Judge(training), pipeline.pixels
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
        "held_out_loss": losses(pipeline, work / EXAM),
        "training_loss": losses(pipeline, work / DATA),
    }
