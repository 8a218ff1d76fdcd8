"""VQAv2: ten people's answers to a question (Goyal et al. 2017).

Its questions file holds data_subtype and questions: question_id, image_id, question; its annotations file annotations:
question_id, answer_type, answers. Images are named COCO_SUBTYPE_IMAGE.jpg.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .question import Pairs, Question, Scores, read_json

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}
CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "i'd've i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't oughtn't shan't she's "
        "should've shouldn't somebody's someone's something's that's there'd there's they'd they'll they're they've "
        "wasn't we've weren't what'll what're what's what've when's where'd where's who'd who'll who's who've why'll "
        "why're why's won't would've wouldn't y'all you'd you'll you're you've"
    ).split()
}


def read(files: Sequence[Path], images: Path, answers: Path | None = None) -> list[Question]:
    """``answers`` is the annotations file; without it the questions have no truth, as those of the test split."""
    truths = {} if answers is None else _truths(answers)
    return [question for path in files for question in _read(path, images, truths, answers)]


def _truths(path: Path) -> dict[int, tuple[tuple[str, ...], str]]:
    try:
        found = {
            note["question_id"]: (tuple(str(said["answer"]) for said in note["answers"]), note.get("answer_type", ""))
            for note in read_json(path)["annotations"]
        }
        without = [key for key, (said, _) in found.items() if not said]
        if without:
            raise TypeError(f"question {without[0]} has no answers")
        return found
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no annotations file of VQAv2: {error!r}") from error


def _read(path: Path, images: Path, truths: dict, answers: Path | None) -> list[Question]:
    try:
        values = read_json(path)
        subtype = values["data_subtype"].replace("-dev", "")  # test-dev asks about the test split's images
        found = []
        for value in values["questions"]:
            key = value["question_id"]
            if type(key) is not int:
                raise TypeError(f"question_id must be a whole number, got {key!r}")
            if answers is not None and key not in truths:
                raise ValueError(f"{answers} has no annotation of question {key}")
            truth, kind = truths.get(key, ((), ""))
            if type(value["image_id"]) is not int:
                raise TypeError(f"image_id must be a whole number, got {value['image_id']!r}")
            image = images / f"COCO_{subtype}_{value['image_id']:012}.jpg"
            found.append(Question(str(key), image, value["question"], truth, kind))
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no questions file of VQAv2: {error!r}") from error


def score(pairs: Pairs) -> Scores:
    """An answer counts by how many of nine people gave it, three being all that is needed, the mean over which of the
    ten is left out."""
    known = [(question.group, _score(question, answer)) for question, answer in pairs if question.truth]
    if not known:
        return {"questions": 0}
    groups = sorted({group for group, _ in known if group})
    parts = {group: _mean([value for of, value in known if of == group]) for group in groups}
    return {"accuracy": _mean([value for _, value in known]), **parts, "questions": len(known)}


def submission(pairs: Pairs) -> list[dict[str, int | str]]:
    """What the evaluation server takes for the splits whose answers are secret."""
    return [{"question_id": int(question.key), "answer": normalised(answer or "")} for question, answer in pairs]


def _score(question: Question, answer: str | None) -> float:
    if answer is None:
        return 0.0
    if len(set(question.truth)) == 1:  # the official script leaves answers as they are where all agree
        hits = [other in (_flat(answer), normalised(answer)) for other in map(_flat, question.truth)]
    else:
        hits = [normalised(other) == normalised(answer) for other in question.truth]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


def normalised(answer: str) -> str:
    """As the official script does before it compares: punctuation, case, numbers, articles, apostrophes."""
    text = said = _flat(answer)
    comma_in_number = re.search(r"\d,\d", said) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in said or f" {mark}" in said
        text = text.replace(mark, "" if beside_space or comma_in_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _flat(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
