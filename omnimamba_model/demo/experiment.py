"""The demo from data to checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import write_whole
from ..image_tokenizer import PatchTokenizer
from ..omnimamba import OmniMamba
from ..sampling import Sampling
from ..text_tokenizer import WordTokenizer
from ..training import train
from ..weights import save
from .digits import Scans, split
from .lessons import TEXT_SLOTS, Lessons
from .pictures import loss_figure, samples_figure
from .score import make_answers, make_drawings, metrics
from .settings import Settings
from .words import tokenizer

Losses = dict[str, list[dict[str, float]]]
"""Each phase's losses, a dictionary by lesson for every step."""


def run(
    out: str | Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    validate: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on scikit-learn's digits, draw, answer, and write everything into the folder ``out``.

    Writes metrics.json, samples.png, loss.png and the checkpoint, each whole or not at all; returns
    the metrics. Everything but ``seconds`` is a function of ``seed`` and ``settings``.
    ``validate`` leaves the held-out scans alone and scores a part of the training split: settings are
    chosen that way.
    """
    started, settings, out = time.perf_counter(), settings or Settings(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    training, scored = split(validate)
    words = tokenizer()
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        pixels = PatchTokenizer(settings.codes, settings.patch, (8, 8))
        pixels.fit(training.images, torch.Generator().manual_seed(seed))
        model = build(settings, words, pixels)
        history = teach(model, settings, training, words, pixels, seed, progress)
        drawn = make_drawings(model, words, pixels, settings.drawings, Sampling(settings.temperature, seed=seed))
        said = make_answers(model, words, pixels, scored.images)
        result = {
            **metrics(model, words, pixels, training, scored, drawn, said),
            "parameters": sum(p.numel() for p in model.parameters()),
            "schedule": settings.schedule,
            "steps": {phase.name: phase.steps for phase in settings.phases},
            "temperature": settings.temperature,
            "seed": seed,
            "scored_on": "validation part of the training split" if validate else "held-out scans",
        }
    samples, curves = samples_figure(drawn, scored, said), loss_figure(history)
    result["seconds"] = round(time.perf_counter() - started, 1)
    save(model, out, tokenizer=words.to_json())
    pixels.save(out)
    write_whole(out / "samples.png", lambda path: samples.savefig(path, format="png"))
    write_whole(out / "loss.png", lambda path: curves.savefig(path, format="png"))
    write_whole(out / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """For tensors this small a second thread brings next to nothing, and costs much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(settings: Settings, words: WordTokenizer, pixels: PatchTokenizer) -> OmniMamba:
    """A model with random weights, whose image table starts as the codes themselves, turned into its width."""
    model = OmniMamba(settings.model(words, pixels, TEXT_SLOTS))
    model.backbone.img_embeddings.word_embeddings.weight.data.copy_(_spread(pixels.codebook, settings.d_model))
    return model


def _spread(codes: Tensor, width: int) -> Tensor:
    """Codes (k, d) about their mean to (k, width) by a random isometry: like patches begin as like rows."""
    turn = torch.linalg.qr(torch.randn(width, codes.shape[1])).Q
    return (codes - codes.mean(0)) @ turn.T


def teach(
    model: OmniMamba,
    settings: Settings,
    training: Scans,
    words: WordTokenizer,
    pixels: PatchTokenizer,
    seed: int,
    progress: bool,
) -> Losses:
    """All phases in turn.

    The paper trains the two halves of its first stage apart and merges them. Neither half trains or
    reads what the other one's loss depends on, so one after the other comes to the same.
    """
    generator = torch.Generator().manual_seed(seed)
    lessons = Lessons(training, words, pixels, generator, settings.batch, settings.noise).by_name()
    history: Losses = {}
    total = sum(phase.steps for phase in settings.phases)
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for phase in settings.phases:
            bar.set_description(phase.name)
            rows = history[phase.name] = []

            def report(losses: dict[str, float], rows: list = rows) -> None:
                rows.append(losses)
                bar.update()
                if len(rows) % 20 == 0:
                    bar.set_postfix({lesson: f"{loss:.2f}" for lesson, loss in losses.items()})

            train(model, phase, lessons, report)
    return history
