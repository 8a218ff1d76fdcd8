"""GQA: questions made from scene graphs, one right answer each (Hudson and Manning 2019).

Its file, testdev_balanced_questions.json and its like, is an object: id -> question, imageId, answer, types.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .question import Pairs, Question, Scores, read_json, share


def read(files: Sequence[Path], images: Path, answers: Path | None = None) -> list[Question]:
    """Grouped by the structure of the question (verify, query, choose, logical, compare)."""
    return [question for path in files for question in _read(path, images)]


def _read(path: Path, images: Path) -> list[Question]:
    try:
        return [
            Question(
                key,
                images / f"{value['imageId']}.jpg",
                value["question"],
                (value["answer"],) if "answer" in value else (),
                value.get("types", {}).get("structural", ""),
            )
            for key, value in read_json(path).items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no questions file of GQA: {error!r}") from error


def score(pairs: Pairs) -> Scores:
    """The share of answers that are the right one, letter for letter but for case and a full stop."""
    known = [pair for pair in pairs if pair[0].truth]
    if not known:
        return {"questions": 0}
    groups = sorted({question.group for question, _ in known if question.group})
    parts = {group: _accuracy([pair for pair in known if pair[0].group == group]) for group in groups}
    return {"accuracy": _accuracy(known), **parts, "questions": len(known)}


def _accuracy(pairs: Pairs) -> float:
    right = [answer is not None and _plain(answer) == _plain(question.truth[0]) for question, answer in pairs]
    return share(sum(right), len(pairs))


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()
