"""MME: two yes-or-no questions an image, in fourteen kinds (Fu et al. 2023).

A folder a kind. In it NAME.txt stands beside the image, or under questions_answers_YN/ with the image under images/;
a line is a question, a tab, and Yes or No.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .question import Pairs, Question, Scores, read_text, share

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PICTURES = (".jpg", ".png", ".jpeg")


def read(files: Sequence[Path], images: Path, answers: Path | None = None) -> list[Question]:
    """``images`` is the folder with a folder a kind, and perhaps others; ``files`` may name some kinds' alone."""
    folders = [path for path in (files or sorted(images.iterdir())) if path.is_dir()]
    kinds = [path for path in folders if path.name in PERCEPTION + COGNITION]
    if not kinds or (files and kinds != folders):
        unknown = ", ".join(path.name for path in folders if path not in kinds)
        raise ValueError(f"{images} must hold folders named by MME's kinds, got {unknown or 'none'}")
    return [question for kind in kinds for question in _read(kind)]


def _read(kind: Path) -> list[Question]:
    apart = (kind / "questions_answers_YN").is_dir()
    texts, pictures = (kind / "questions_answers_YN", kind / "images") if apart else (kind, kind)
    found = []
    for path in sorted(texts.glob("*.txt")):
        image = next((p for end in PICTURES if (p := pictures / (path.stem + end)).exists()), None)
        if image is None:
            raise FileNotFoundError(f"{path} has no image {path.stem}.jpg or .png in {pictures}")
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            text, _, truth = (part.strip() for part in line.rpartition("\t"))
            if not text or truth.lower() not in ("yes", "no"):
                raise ValueError(f"{path}, line {number}, must be a question, a tab, and Yes or No, got {line!r}")
            found.append(Question(f"{kind.name}/{path.stem}/{number}", image, text, (truth.lower(),), kind.name))
    return found


def score(pairs: Pairs) -> Scores:
    """A kind's score is its accuracy and the share of images with every answer right, 200 at most; the two totals add
    up their kinds, 2000 and 800 at most."""
    kinds = {}
    for kind in dict.fromkeys(question.group for question, _ in pairs):
        right: dict[Path, list[bool]] = {}
        for question, answer in pairs:
            if question.group == kind:
                right.setdefault(question.image, []).append((_word(answer),) == question.truth)
        every = [one for image in right.values() for one in image]
        accuracy, whole = share(sum(every), len(every)), share(sum(map(all, right.values())), len(right))
        kinds[kind] = {
            "score": accuracy + whole, "accuracy": accuracy, "accuracy_plus": whole, "questions": len(every),
        }  # fmt: skip
    total = {
        name: sum(kinds[kind]["score"] for kind in of if kind in kinds)
        for name, of in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {**total, **kinds}


def _word(answer: str | None) -> str:
    """As MME's own script reads an answer: by its first four characters."""
    begun = (answer or "").strip().lower()[:4]
    return "yes" if "yes" in begun else "no" if "no" in begun else "other"
