"""The demo from data to checkpoint: files for the trainer, its runs, and what the trained model draws and answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..files import write_whole
from ..image_tokenizer import PatchTokenizer
from ..omnimamba import OmniMamba
from ..pipeline import Pipeline
from ..training import run as trainer
from ..training import settings as training_settings
from ..training.merge import merge
from .data import write_exam, write_lessons
from .digits import Scans, split
from .pictures import loss_figure, samples_figure
from .score import EXAM, make_answers, make_drawings, metrics
from .settings import DATA, MERGED, START, Settings
from .words import tokenizer

WORK = "training"
"""The folder within OUT that belongs to the runs."""


def run(
    out: str | Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    validate: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on scikit-learn's digits, draw, answer, and write everything into the folder ``out``.

    Writes metrics.json, samples.png, loss.png and the checkpoint, each whole or not at all; returns the metrics.
    Everything but ``seconds`` is a function of ``seed`` and ``settings``. ``validate`` leaves the held-out scans alone
    and scores a part of the training split: settings are chosen that way.

    Lessons and runs lie in ``out``/training. A demo that was stopped goes on from there, and ``seconds`` is the last
    call's; one that was finished, or had other settings, is made anew.
    """
    started, settings, out = time.perf_counter(), settings or Settings(), Path(out)
    work, (training, scored) = out / WORK, split(validate)
    with torch.random.fork_rng(devices=[]), _one_thread():
        _claim(work, {**dataclasses.asdict(settings), "seed": seed, "validate": validate})
        prepare(work, settings, training, scored, seed)
        trained = teach(work, settings.runs(work, seed), progress)
        pipeline = Pipeline.load(trained)
        drawn = make_drawings(pipeline, settings, seed)
        said = make_answers(pipeline, scored)
        result = {
            **metrics(pipeline, work, training, scored, drawn, said),
            "parameters": sum(p.numel() for p in pipeline.model.parameters()),
            "schedule": settings.schedule,
            "steps": {name: values["steps"] for name, values in settings.runs(work, seed).items()},
            "temperature": settings.temperature,
            "guidance": settings.guidance,
            "seed": seed,
            "scored_on": "validation part of the training split" if validate else "held-out scans",
        }
    samples, curves = samples_figure(drawn, scored, said), loss_figure(_losses(work, settings.runs(work, seed)))
    result["seconds"] = round(time.perf_counter() - started, 1)
    pipeline.model.save_pretrained(out, tokenizer=pipeline.words.to_json())
    pipeline.pixels.save(out)
    write_whole(out / "samples.png", lambda path: samples.savefig(path, format="png"))
    write_whole(out / "loss.png", lambda path: curves.savefig(path, format="png"))
    write_whole(out / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    write_whole(work / CLAIM, lambda path: path.write_text(_FINISHED))
    return result


CLAIM = "demo.json"
"""Lies in the runs' folder as long as that is a demo's."""
_FINISHED = "{}"


def _claim(work: Path, mine: dict[str, Any]) -> None:
    """Leave ``work`` as it is where these settings were begun there and not finished, else empty. ValueError where it
    holds what no demo made."""
    claim = work / CLAIM
    if claim.exists() and json.loads(claim.read_text()) == mine:
        return
    work.mkdir(parents=True, exist_ok=True)
    held = [path for path in work.iterdir() if path != claim]
    if held and not claim.exists():
        names = ", ".join(sorted(path.name for path in held)[:5])
        raise ValueError(f"{work} holds {names}, which are no demo's; name another folder, or remove it")
    write_whole(claim, lambda path: path.write_text(_FINISHED))  # whatever stops this, nothing goes on from the rest
    for path in held:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_whole(claim, lambda path: path.write_text(json.dumps(mine)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """For tensors this small a second thread brings next to nothing, and costs much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(work: Path, settings: Settings, training: Scans, scored: Scans, seed: int) -> None:
    """Write lessons, exam and the model to begin with; nothing where they are there."""
    if (work / START).exists():
        return
    words = tokenizer()
    torch.manual_seed(seed)
    pixels = PatchTokenizer(settings.codes, settings.patch, (8, 8))
    pixels.fit(training.images, torch.Generator().manual_seed(seed))
    for name in (DATA, EXAM, "unfinished"):
        shutil.rmtree(work / name, ignore_errors=True)
    write_lessons(work / DATA, training, pixels, settings.copies, settings.noise, seed)
    write_exam(work / EXAM, scored, pixels)
    model = OmniMamba(settings.model(words, pixels))
    model.backbone.img_embeddings.word_embeddings.weight.data.copy_(_spread(pixels.codebook, settings.d_model))
    model.save_pretrained(work / "unfinished", tokenizer=words.to_json())
    pixels.save(work / "unfinished")
    (work / "unfinished").rename(work / START)


def _spread(codes: Tensor, width: int) -> Tensor:
    """Codes (k, d) about their mean to (k, width) by a random isometry: like patches begin as like rows."""
    turn = torch.linalg.qr(torch.randn(width, codes.shape[1])).Q
    return (codes - codes.mean(0)) @ turn.T


def teach(work: Path, runs: dict[str, dict[str, Any]], progress: bool) -> Path:
    """Each run in turn, as ``omnimamba train`` does it; the folder of the last one's model."""
    for name, values in runs.items():
        if name == "stage2":
            merge(work / "stage1-mmu" / "model", work / "stage1-t2i" / "model", work / MERGED)
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        trained = trainer.run(training_settings.read(path), lambda line: None, progress)
    return trained


def _losses(work: Path, runs: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Each run's losses, a dictionary by lesson for every step."""
    found = {}
    for name in runs:
        lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "step" in line]
        found[name] = [{k.removeprefix("loss "): v for k, v in step.items() if k.startswith("loss ")} for step in steps]
    return found
