"""What the demo says about digits: captions, questions with their answers, and plain sentences."""

from __future__ import annotations

from collections.abc import Callable

from ..pipeline import FORMATS
from ..text_tokenizer import BpeTokenizer

VOCABULARY = 400
"""Ids of the tokenizer at most: enough that every word below is one."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""The ten digits, and what comes after nine."""

CAPTIONS = (
    "{a digit}",
    "the digit {digit}",
    "the number {digit}",
    "a handwritten {digit}",
    "a picture of {a digit}",
    "please draw {a digit}",
    "draw the digit {digit}",
    "write the number {digit}",
    "{a digit} written by hand",
    "{digit} in handwriting",
)
"""Ways to ask for a drawing."""

QUESTIONS: dict[str, Callable[[int], str]] = {
    "which digit is this?": lambda digit: NAMES[digit],
    "what number do you see?": lambda digit: NAMES[digit],
    "which number comes after this digit?": lambda digit: NAMES[digit + 1],
    "is this digit even or odd?": lambda digit: "odd" if digit % 2 else "even",
    "is this digit more than four?": lambda digit: "yes" if digit > 4 else "no",
    "describe this image.": lambda digit: caption("a handwritten {digit}", digit),
}
"""Questions about a scan, each with the one answer that counts as right."""

FACTS = (
    lambda digit: f"{NAMES[digit]} is {'odd' if digit % 2 else 'even'}",
    lambda digit: f"{NAMES[digit]} is {'' if digit > 4 else 'not '}more than four",
    lambda digit: f"{NAMES[digit + 1]} comes after {NAMES[digit]}",
)


def caption(phrasing: str, digit: int) -> str:
    """One of ``CAPTIONS`` with the digit's name in it."""
    name = NAMES[digit]
    article = "an" if name == "eight" else "a"
    return phrasing.replace("{a digit}", f"{article} {name}").replace("{digit}", name)


def captions(digit: int) -> list[str]:
    return [caption(phrasing, digit) for phrasing in CAPTIONS]


def sentences() -> list[str]:
    """Plain text about numbers, no image needed: facts and captions."""
    return [fact(digit) for fact in FACTS for digit in range(10)] + [c for digit in range(10) for c in captions(digit)]


def tokenizer() -> BpeTokenizer:
    """A byte-level BPE learned from everything that the demo says."""
    form, _ = FORMATS["instruct"]
    said = [form.format(question) + answer(digit) for question, answer in QUESTIONS.items() for digit in range(10)]
    return BpeTokenizer.trained([*sentences(), *said], VOCABULARY)
