"""Records as batches. A batch is a function of the seed and of its place alone: a run that is taken up again, or dealt
out to more processes, sees what it would have seen.

Epoch e of n records is a permutation drawn from (seed, e); place i of the run is place i mod n of epoch i // n. A
record that cannot be used is passed over, counted, and the next one of the epoch stands in.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import OmniMambaConfig
from ..omnimamba import IGNORE
from ..pipeline import ImageTokenizer
from ..text_tokenizer import TextTokenizer
from .features import FeatureCache, RecentFeatures, decoded, look_at, read_bytes
from .parallel import ALONE, Ranks
from .phase import Batch
from .records import PICTURE, BadRecord, NoneUsable, Records

FORMS = ("caption", "instruct")
TEXT_ALONE = "text alone: understanding is learned from records with an image"
"""Why LLaVA's records without an image, which are as good as any, are passed over, as the official loader does."""

Made = tuple[Batch, Counter[str]]
"""A batch, and why records were passed over for it."""


class Unprepared(Exception):
    """A thread cannot make the batch before ``Lesson.prepare`` has been called."""


class Lesson:
    """Batches of one task. ``example(record, draw)`` makes one row, ``join(rows)`` a batch; a lesson is callable."""

    threaded = False
    """Whether a thread makes the batches. It loads nothing, which can take minutes and change the process's defaults
    under a step: where something has to be loaded first, ``make`` raises Unprepared."""

    def __init__(self, records: Records, batch: int, *, seed: int = 0, ranks: Ranks = ALONE) -> None:
        self.records, self.size, self.seed, self.ranks = records, batch, seed, ranks
        self.mine = ranks.share(batch)
        self.passed_over: Counter[str] = Counter()
        """Why records could not be used, and how often one was met."""

    def __call__(self, place: int) -> Batch:
        return self.take(lambda: self.make(place))

    def make(self, place: int, over: Callable[[], bool] = lambda: False) -> Made:
        """The batch, nothing counted yet. Where ``over()`` it ends at the next record: a CancelledError."""
        first, passed_over = place * self.size, Counter()
        rows = [self._row(first + i, passed_over, over) for i in range(self.mine.start, self.mine.stop)]
        return self.join(rows), passed_over

    def prepare(self) -> None:
        """Load what batches are made with."""

    def take(self, made: Callable[[], Made]) -> Batch:
        """Count what was passed over for the batch, which is learned now, or for want of which the run ends."""
        try:
            batch, passed_over = made()
        except NoneUsable as error:
            self.passed_over.update(error.passed_over)
            raise
        self.passed_over.update(passed_over)
        return batch

    def example(self, record: dict[str, Any], draw: random.Random) -> Any:
        """A row; BadRecord where the record does not have one. All chance comes from ``draw``."""
        raise NotImplementedError

    def join(self, rows: list[Any]) -> Batch:
        raise NotImplementedError

    def _row(self, place: int, passed_over: Counter[str], over: Callable[[], bool]) -> Any:
        epoch, at = divmod(place, len(self.records))
        order = _order(len(self.records), self.seed, epoch)
        draw = random.Random(f"{self.seed} {place}")
        for step in range(len(self.records)):
            if over():
                raise CancelledError
            try:
                return self.example(self.records[int(order[(at + step) % len(order)])], draw)
            except BadRecord as error:
                passed_over[str(error)] += 1
        raise NoneUsable.of(len(self.records), passed_over)


class Reading(Lesson):
    """Plain text, ``{"text": ..}``, for the base alone: every token and the end of the text are learned, from the end
    of the text before it on."""

    def __init__(
        self,
        records: Records,
        batch: int,
        config: OmniMambaConfig,
        words: TextTokenizer,
        *,
        length: int,
        **options: Any,
    ) -> None:
        super().__init__(records, batch, **options)
        if length < 1:
            raise ValueError(f"length must be 1 or more, got {length}")
        self.config, self.words, self.length = config, words, length

    def example(self, record: dict[str, Any], draw: random.Random) -> list[int]:
        if not isinstance(record.get("text"), str):
            raise BadRecord("text must be a text")
        eos = self.config.tokens.eos
        return [eos, *_encode(self.words, record["text"]), eos][: self.length + 1]

    def join(self, rows: list[Any]) -> Batch:
        ids = _padded(rows, self.config.tokens.pad)
        ends = torch.tensor([len(row) for row in rows])[:, None]
        return "text", {
            "ids": ids[:, :-1],
            "labels": ids.masked_fill(torch.arange(ids.shape[1]) >= ends, IGNORE)[:, 1:],
        }


class Drawing(Lesson):
    """T2I: ``{"captions": [text, ..], "tokens": [image_tokens ids]}``; one caption is picked at random.

    ``caption_dropout`` is the share of captions left empty, from which guidance learns its null prompt.
    """

    def __init__(
        self,
        records: Records,
        batch: int,
        config: OmniMambaConfig,
        words: TextTokenizer,
        *,
        caption_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(records, batch, **options)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must lie in [0, 1], got {caption_dropout}")
        self.config, self.words, self.caption_dropout = config, words, caption_dropout

    def example(self, record: dict[str, Any], draw: random.Random) -> tuple[list[int], list[int]]:
        captions, tokens = record.get("captions"), record.get("tokens")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise BadRecord("captions must be a list of texts")
        count, codes = self.config.image_tokens, self.config.image_vocab_size
        whole = isinstance(tokens, list) and len(tokens) == count and all(type(t) is int for t in tokens)
        if not whole or not 0 <= min(tokens) <= max(tokens) < codes:
            raise BadRecord(f"tokens must be {count} ids in 0..{codes - 1}")
        caption = draw.choice(captions)
        return [] if draw.random() < self.caption_dropout else _encode(self.words, caption), tokens

    def join(self, rows: list[Any]) -> Batch:
        slots, pad = self.config.text_slots, self.config.tokens.pad
        caption = [[pad] * (slots - len(ids)) + ids[:slots] for ids, _ in rows]
        return "t2i", {"caption": torch.tensor(caption), "image": torch.tensor([tokens for _, tokens in rows])}


class Understanding(Lesson):
    """MMU: ``{"image": file, "conversations": [{"from": "human" or "gpt", "value": text}, ..]}``.

    ``form`` "caption" learns the last answer, closed by the end of text; "instruct" learns every answer of

        In: {question}\\nOut: {answer}[eos]

    turn by turn, a newline before each later one, ``<|eot|>`` at the end, which is not learned. A question at the end
    without an answer is left out in both. A record without an image is passed over for the reason ``TEXT_ALONE``.
    """

    def __init__(
        self,
        records: Records,
        batch: int,
        config: OmniMambaConfig,
        words: TextTokenizer,
        pixels: ImageTokenizer,
        *,
        form: str = "instruct",
        images: str | Path = ".",
        text_length: int = 449,
        cache: FeatureCache | None = None,
        **options: Any,
    ) -> None:
        super().__init__(records, batch, **options)
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        longest = config.mmu_positions - config.image_features - 4
        if not 1 <= text_length <= longest:
            raise ValueError(f"text_length must lie in 1..{longest}, what mmu_positions leaves, got {text_length}")
        self.config, self.words, self.pixels, self.cache, self.recent = config, words, pixels, cache, RecentFeatures()
        self.form, self.images, self.text_length = form, Path(images), text_length

    def example(self, record: dict[str, Any], draw: random.Random) -> tuple[Tensor, list[int], list[int]]:
        if record.get("image") is None and PICTURE not in record:
            raise BadRecord(TEXT_ALONE)
        turns = _turns(record)
        ids, labels = self._caption(turns) if self.form == "caption" else self._instruct(turns)
        return self._features(record), ids, labels

    def join(self, rows: list[Any]) -> Batch:
        """Text is padded on the right to the longest row, as far as a batch needs; features stay as narrow as they come
        from the cache, for as long as the batch waits, and the model widens them."""
        text = _padded([ids for _, ids, _ in rows], self.config.tokens.pad)
        labels = _padded([marks for _, _, marks in rows], IGNORE)
        return "mmu", {"features": torch.stack([seen for seen, _, _ in rows]), "text": text, "labels": labels}

    def prepare(self) -> None:
        self.pixels.prepare()

    def _caption(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids = [*_encode(self.words, turns[1::2][-1][1]), self.config.tokens.eos][: self.text_length]
        return ids, list(ids)

    def _instruct(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Turns that would pass the length are left out, from there on."""
        ids: list[int] = []
        labels: list[int] = []
        for i, (asked, said) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
            newline = "\n" if i else ""
            question = _encode(self.words, f"{newline}In: {asked[1]}\nOut: ")
            answer = [*_encode(self.words, said[1]), self.config.tokens.eos]
            if len(ids) + len(question) + len(answer) > self.text_length - 1:
                break
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
        if not ids:
            raise BadRecord(f"no question with its answer fits into {self.text_length} tokens")
        return [*ids, self.config.tokens.eot], [*labels, IGNORE]

    def _features(self, record: dict[str, Any]) -> Tensor:
        picture = record.get(PICTURE)
        if picture is None:
            if not isinstance(record.get("image"), str):
                raise BadRecord("image must name a file")
            picture = read_bytes(self.images / record["image"])

        def look() -> Tensor:
            image = decoded(picture, record.get("image"))
            if self.threaded and not self.pixels.ready:
                raise Unprepared
            return look_at(image, self.pixels.look)

        if self.cache is None:
            return self.recent.get(picture, look)
        return self.recent.get(picture, lambda: self.cache.get(picture, look))


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    mixed = random.Random(f"order {seed} {epoch}").getrandbits(63)
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(who, text) of a conversation, the mark of the picture's place taken out."""
    found = record.get("conversations")
    fits = isinstance(found, list) and len(found) > 1
    if not fits or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in found):
        raise BadRecord("conversations must be a list of two turns or more, each with a value")
    turns = [(str(turn.get("from")), turn["value"].replace("<image>", "").strip()) for turn in found]
    if any(who != ("human", "gpt")[i % 2] for i, (who, _) in enumerate(turns)):
        raise BadRecord("conversations must alternate from human to gpt")
    return turns


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """Lists of numbers as (b, the longest), filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _encode(words: TextTokenizer, text: str) -> list[int]:
    try:
        return list(_ids(words, text))
    except ValueError as error:
        raise BadRecord(str(error)) from error


@lru_cache(maxsize=4096)
def _ids(words: TextTokenizer, text: str) -> tuple[int, ...]:
    return tuple(words.encode(text))


def together(lessons: dict[str, Callable[[int], Batch]]) -> Counter[str]:
    """Why records were passed over, over all lessons that count it."""
    return sum((lesson.passed_over for lesson in lessons.values() if isinstance(lesson, Lesson)), Counter())
