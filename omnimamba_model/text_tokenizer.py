"""Text to ids and back: a word list for small models, byte-level BPE for the published one. Both are tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from .config import SpecialTokens

SPECIAL = SpecialTokens(eos=0, pad=1, soi=2, eoi=3, sot=4, eot=5, t2i=6, mmu=7)
"""The frame tokens' ids in a tokenizer made here; words follow."""
FIRST_WORD = 8
PUBLISHED = "EleutherAI/gpt-neox-20b"
ADDED = (
    "[PAD]", "<|soi|>", "<|eoi|>", "<|sot|>", "<|eot|>", "<|t2i|>", "<|mmu|>", "<|soc|>", "<|eoc|>", "<|lvg|>",
)  # fmt: skip
"""What the published model adds to the GPT-NeoX tokenizer, at 50277 and on."""


class TextTokenizer(Protocol):
    """Words to ids and back. ``encode`` raises ValueError for text it has no ids for."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def is_special(self, i: int) -> bool:
        """Whether ``i`` can frame a sequence: no text is encoded to it."""
        ...

    def to_json(self) -> str: ...


def read_text_tokenizer(text: str) -> TextTokenizer:
    """The tokenizer of a tokenizer.json's text; ValueError where it is none."""
    values = _object(text)
    return WordTokenizer.from_json(text) if values.get("type") == "words" else BpeTokenizer.from_json(text)


def lacks_additions(text: str) -> bool:
    """Whether a tokenizer.json's text is GPT-NeoX's own, which ends where the published model's additions begin."""
    try:
        words = read_text_tokenizer(text)
    except ValueError:
        return False
    return isinstance(words, BpeTokenizer) and words.vocab_size == SpecialTokens().pad


class BpeTokenizer:
    """A tokenizer of the ``tokenizers`` library whose special tokens frame sequences."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def published(cls, source: str | Path = PUBLISHED) -> BpeTokenizer:
        """GPT-NeoX's tokenizer, from a folder with its tokenizer.json or the hub, with the published model's additions.

        ValueError where an addition gets another id than the published one.
        """
        path = Path(source) / "tokenizer.json"
        if Path(source).exists() and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        library = _library().Tokenizer
        try:
            tokenizer = library.from_file(str(path)) if path.exists() else library.from_pretrained(str(source))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{source} gives no tokenizer of the tokenizers library: {error}") from error
        first = SpecialTokens().pad
        tokenizer.add_special_tokens(list(ADDED))
        wanted = {token: first + i for i, token in enumerate(ADDED)}
        found = {token: tokenizer.token_to_id(token) for token in ADDED}
        if found != wanted:
            raise ValueError(f"{source} must have {first} tokens, so that {wanted}; got {found}")
        return cls(tokenizer)

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """A byte-level BPE of at most ``vocab_size`` ids learned from ``texts``, the frame tokens at 0 to 7."""
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = library.decoders.ByteLevel()
        special = [f"<|{name}|>" for name in dataclasses.asdict(SPECIAL)]
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> BpeTokenizer:
        """The tokenizer that ``to_json`` wrote; ValueError for anything else."""
        library = _library()
        try:
            return cls(library.Tokenizer.from_str(text))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer.json is no tokenizer of the tokenizers library: {error}") from error

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a frame token in it is one."""
        try:
            return self._tokenizer.encode(text).ids
        except TypeError:
            raise ValueError(f"the text must be Unicode without halves of characters, got {text!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids without frame tokens and without the blanks at its ends."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def is_special(self, i: int) -> bool:
        return i in self._special

    def to_json(self) -> str:
        return self._tokenizer.to_str(pretty=True) + "\n"


class WordTokenizer:
    """Each word of a fixed list has an id; case and punctuation do not count. Small enough to read."""

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

    def is_special(self, i: int) -> bool:
        return i < FIRST_WORD

    def to_json(self) -> str:
        return json.dumps({"type": "words", "words": self.words}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """The tokenizer that ``to_json`` wrote; ValueError for anything else."""
        values = _object(text)
        words = values.get("words") if values.get("type") == "words" else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError('tokenizer.json must hold {"type": "words", "words": [..]}; this is another tokenizer\'s')
        return cls(words)


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer.json must be an object, got {type(values).__name__}")
    return values


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this text tokenizer needs the tokenizers library: pip install tokenizers") from None
    return tokenizers


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
