"""A benchmark from its files to its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from ..pipeline import Pipeline
from ..sampling import GREEDY, Sampling
from . import vqav2
from .answers import UNREADABLE, answers
from .benchmark import BENCHMARKS
from .question import Scores


def judge(
    name: str,
    pipeline: Pipeline,
    files: Sequence[Path],
    images: Path,
    out: Path,
    *,
    annotations: Path | None = None,
    checkpoint: str = "",
    ending: str | None = None,
    batch: int = 16,
    sampling: Sampling = GREEDY,
    form: str | None = None,
) -> Scores:
    """Ask everything, and write OUT/answers.jsonl, OUT/scores.json and, for VQAv2, OUT/submission.json.

    ``ending`` goes behind every question; None is the benchmark's own. A damaged image counts as a wrong answer, and
    ``unreadable`` tells how many there were.
    """
    benchmark = BENCHMARKS[name]
    questions = benchmark.read(files, images, annotations)
    if not questions:
        raise ValueError(f"{', '.join(map(str, files)) or images} has no questions")
    if len({question.key for question in questions}) < len(questions):
        raise ValueError(f"{', '.join(map(str, files))} has several questions of one id")
    out.mkdir(parents=True, exist_ok=True)
    said = answers(
        pipeline,
        questions,
        out / "answers.jsonl",
        about={"benchmark": name, "checkpoint": checkpoint, "sampling": vars(sampling), **pipeline.describe()},
        ending=benchmark.ending if ending is None else ending,
        batch=batch,
        sampling=sampling,
        form=form,
    )
    pairs = list(zip(questions, said, strict=True))
    scores = {**benchmark.score(pairs), "unreadable": said.count(UNREADABLE)}
    _write(out / "scores.json", scores)
    if benchmark is BENCHMARKS["vqav2"]:
        _write(out / "submission.json", vqav2.submission(pairs))
    return scores


def _write(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
