"""A word-level tokenizer: small enough to read, saved as the checkpoint's tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from .config import SpecialTokens

SPECIAL = SpecialTokens(eos=0, pad=1, soi=2, eoi=3, sot=4, eot=5, t2i=6, mmu=7)
"""The frame tokens' ids; words follow."""
FIRST_WORD = 8


class WordTokenizer:
    """Each word of a fixed list has an id; case and punctuation do not count."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = sorted(set(words))
        self._ids = {word: FIRST_WORD + place for place, word in enumerate(self.words)}

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> WordTokenizer:
        """The tokenizer that knows every word of ``texts``."""
        return cls(word for text in texts for word in _split(text))

    @property
    def vocab_size(self) -> int:
        return FIRST_WORD + len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words; ValueError for a text without words or with one it does not know."""
        words = _split(text)
        if not words:
            raise ValueError(f"the text must contain a word, got {text!r}")
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(f"got {', '.join(unknown)} in {text!r}, expected words of {', '.join(self.words)}")
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of some ids, one space between; frame tokens are left out."""
        return " ".join(self.words[i - FIRST_WORD] for i in ids if i >= FIRST_WORD)

    def to_json(self) -> str:
        return json.dumps({"type": "words", "words": self.words}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """The tokenizer that ``to_json`` wrote; ValueError for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer.json is not JSON: {error}") from error
        words = values.get("words") if isinstance(values, dict) and values.get("type") == "words" else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError('tokenizer.json must hold {"type": "words", "words": [..]}; this is another tokenizer\'s')
        return cls(words)


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
