"""A model's answers to a benchmark, kept in a file as they come: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..pictures import read_image
from ..pipeline import Pipeline
from ..sampling import GREEDY, Sampling
from .question import Question

UNREADABLE = None
"""The answer where an image could not be read."""


def answers(
    pipeline: Pipeline,
    questions: Sequence[Question],
    out: Path,
    *,
    about: dict,
    ending: str = "",
    batch: int = 16,
    sampling: Sampling = GREEDY,
    form: str | None = None,
) -> list[str | None]:
    """The answer to each question, UNREADABLE where its image is damaged.

    ``out`` gets a line of ``about``, which says what is being run, then a line an answer. Where it is there already its
    answers are kept, but to what is now asked otherwise; ValueError if they are another run's, or damaged.
    FileNotFoundError names images that are missing, before anything is asked.
    """
    missing = sorted({str(q.image) for q in questions if not q.image.is_file()})
    if missing:
        shown = ", ".join(missing[:5]) + (", .." if len(missing) > 5 else "")
        raise FileNotFoundError(f"{len(missing)} images are missing: {shown}")
    head = {"about": {**about, "ending": ending, "form": form}}
    kept = _resume(out, head)
    known = {q.key: kept[_asked(q)] for q in questions if _asked(q) in kept}
    left = [question for question in questions if question.key not in known]
    with open(out, "a", encoding="utf-8") as file, tqdm(total=len(questions), unit="question") as bar:
        bar.update(len(questions) - len(left))
        for start in range(0, len(left), batch):
            part = left[start : start + batch]
            for question, said in zip(part, _ask(pipeline, part, ending, sampling, form), strict=True):
                known[question.key] = said
                line = dict(zip(_ASKED, _asked(question), strict=True)) | {"answer": said}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))
    return [known[question.key] for question in questions]


_ASKED = ("key", "image", "question")


def _asked(question: Question) -> tuple[str, ...]:
    return question.key, question.image.name, question.text


def _ask(
    pipeline: Pipeline, questions: Sequence[Question], ending: str, sampling: Sampling, form: str | None
) -> list[str | None]:
    images: dict[Path, Image.Image | None] = {}
    for question in questions:
        if question.image not in images:
            try:
                images[question.image] = read_image(question.image)
            except (OSError, ValueError):
                images[question.image] = None
    seen = [question for question in questions if images[question.image] is not None]
    said = pipeline.ask([images[q.image] for q in seen], [q.text + ending for q in seen], sampling, form)
    found = dict(zip((q.key for q in seen), said, strict=True))
    return [found.get(question.key, UNREADABLE) for question in questions]


def _resume(out: Path, head: dict) -> dict[tuple[str, ...], str | None]:
    """By what was asked, the answers in the file, which is cut behind its last whole line, or begun."""
    begun = (json.dumps(head, ensure_ascii=False) + "\n").encode()
    data = out.read_bytes() if out.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        out.write_bytes(begun)
        return {}
    if not whole.startswith(begun):
        raise ValueError(f"{out} holds answers of another run, {whole.splitlines()[0][:500]!r}; name another folder")
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines()[1:], 2):
        try:
            values = json.loads(line)
            asked, said = tuple(values[name] for name in _ASKED), values["answer"]
            if not all(isinstance(text, str) for text in asked) or not isinstance(said, str | None):
                raise TypeError("they must be texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            told = f"{out}, line {number}, is no {', '.join(_ASKED)} and answer: {error!r}"
            raise ValueError(f"{told}; remove the line to ask that again") from error
        found[asked] = said
    return found
