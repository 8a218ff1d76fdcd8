"""Whole words as tokens: all that a small, closed vocabulary needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_PIECES = re.compile(r"\w+|[^\w\s]")


class WordTokenizer:
    """Lower-case words and punctuation marks to ids from ``first`` on; the ids below frame sequences.

    ``first`` leaves room for ``SpecialTokens`` with ids 0 to 7.
    """

    def __init__(self, words: Iterable[str], first: int = 8) -> None:
        self.words, self.first = sorted(set(words)), first
        self._ids = {word: first + i for i, word in enumerate(self.words)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], first: int = 8) -> WordTokenizer:
        """The tokenizer of every word in ``texts``."""
        return cls((piece for text in texts for piece in _pieces(text)), first)

    @property
    def vocab_size(self) -> int:
        return self.first + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; ValueError names the words the vocabulary lacks."""
        pieces = _pieces(text)
        unknown = sorted({piece for piece in pieces if piece not in self._ids})
        if unknown:
            raise ValueError(f"{text!r} has words this model never learned: {', '.join(unknown)}")
        return [self._ids[piece] for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids, with no space before a mark; ids that are no word are left out."""
        words = (self.words[i - self.first] for i in ids if self.first <= i < self.vocab_size)
        return re.sub(r" (?=[^\w\s])", "", " ".join(words))

    def to_json(self) -> str:
        return json.dumps({"kind": "words", "first": self.first, "words": self.words}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("kind") != "words":
            raise ValueError("tokenizer.json is not a word tokenizer's: its kind must be 'words'")
        return cls(values["words"], values["first"])


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(text.lower())
