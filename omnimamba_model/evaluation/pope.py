"""POPE: is there such a thing in the image? (Li et al. 2023)

Its files, coco_pope_random.json and its like, hold one JSON object a line: question_id, image, text, label (yes or no).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .question import Pairs, Question, Scores, read_text, share

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read(files: Sequence[Path], images: Path, answers: Path | None = None) -> list[Question]:
    """Each file's questions are a group."""
    return [question for path in files for question in _read(path, images)]


def _read(path: Path, images: Path) -> list[Question]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            label = str(value["label"]).strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"label must be yes or no, got {value['label']!r}")
            key = f"{path.stem}/{value['question_id']}"
            found.append(Question(key, images / value["image"], value["text"], (label,), path.stem))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is no question of POPE: {error!r}") from error
    return found


def score(pairs: Pairs) -> Scores:
    """``yes`` is the positive answer, no answer neither yes nor no; the mean is over the files."""
    groups = sorted({question.group for question, _ in pairs})
    found = {group: _score([pair for pair in pairs if pair[0].group == group]) for group in groups}
    mean = {name: sum(part[name] for part in found.values()) / len(found) for name in FIGURES}
    return {"mean": mean, **found}


def _score(pairs: Pairs) -> dict[str, float]:
    said = [(None if answer is None else _yes(answer), question.truth == ("yes",)) for question, answer in pairs]
    hits = sum(yes is True and true for yes, true in said)
    claimed, there = sum(yes is True for yes, _ in said), sum(true for _, true in said)
    return {
        "accuracy": share(sum(yes == true for yes, true in said), len(said)),
        "precision": share(hits, claimed),
        "recall": share(hits, there),
        "f1": share(2 * hits, claimed + there),
        "yes_ratio": share(claimed, len(said)),
        "questions": len(said),
    }


def _yes(answer: str) -> bool:
    """As POPE's own script reads an answer: a denial in the first sentence is a no, all else a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)
