"""Questions about one image, turn by turn on one state: a turn costs its own tokens, whatever was said before.

A turn is a question in one of pipeline.FORMATS, then the answer and the end-of-text token, as models learn it. What was
cut short, by its greatest length or by who stopped listening, is closed by that token too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import MMU
from .engine import Row, stream
from .files import absent, write_whole
from .generation import check_steps
from .omnimamba import OmniMamba
from .pictures import plain
from .pipeline import FORMATS, Pipeline
from .sampling import GREEDY, Sampling
from .state import MambaState
from .weights import CheckpointError, fingerprint

LONGEST = 256
"""Tokens of an answer in a dialogue, at most, where nothing else is said."""


class Dialogue:
    """One model's state after an image and the turns so far; ids in, ids out."""

    def __init__(self, model: OmniMamba, state: MambaState) -> None:
        self.model, self.state = model, state
        self._turn: Iterator[int] | None = None

    @classmethod
    @torch.inference_mode()
    def about(cls, model: OmniMamba, features: Tensor) -> Dialogue:
        """Begin with an image's features (image_features, feature_dim)."""
        state = model.backbone.new_state(1)
        model.backbone.prefill(model.mmu_opening(features[None]), state, MMU)
        return cls(model, state)

    def ask(
        self, question: Tensor, steps: int, sampling: Sampling = GREEDY, stop: tuple[int, ...] | None = None
    ) -> Iterator[int]:
        """The answer's tokens as they come, the stop token left out; ``question`` are ids (l,), l at least 1.

        Whoever stops listening early has heard what the state knows: that, and the end of the turn. A turn that is left
        half heard ends at the latest where the next one begins, or the state is saved.
        """
        self._end_turn()
        self._turn = self._answer(question, steps, sampling, stop)
        yield from self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    @torch.inference_mode()  # of each step alone: between two, the caller and other threads have modes of their own
    def _answer(self, question: Tensor, steps: int, sampling: Sampling, stop: tuple[int, ...] | None) -> Iterator[int]:
        check_steps(steps)
        if question.ndim != 1 or not len(question):
            raise ValueError(f"question must have shape (l,), l at least 1, got {tuple(question.shape)}")
        stops = (self.model.config.tokens.eos,) if stop is None else stop
        row = Row(MMU, self._embed(question), steps, stops)
        last = None
        try:
            with closing(stream(self.model, [row], sampling, self.state)) as spoken:
                for _, tokens in spoken:
                    last = tokens
                    if int(tokens) in stops:
                        return
                    yield int(tokens)
        finally:
            if last is not None:  # the stream takes a token in when it is asked for the next
                step = self.model.backbone.bind_step(self.state, MMU)
                step(self._embed(last))
                if int(last) not in stops:
                    step(self._embed(torch.tensor([self.model.config.tokens.eos])))
                step.release()

    def save(self, path: str | Path, besides: Mapping[str, str] | None = None) -> None:
        """Write the state, from which ``load`` goes on, and texts by name ``besides``, which ``read_about`` gives."""
        self._end_turn()
        config, weights = json.dumps(self.model.config.to_dict()), fingerprint(self.model)
        about = {**(besides or {}), "position": str(self.state.position), "config": config, "weights": weights}
        tensors = {"conv": self.state.conv.contiguous(), "ssm": self.state.ssm.contiguous()}
        write_whole(Path(path), lambda temporary: save_file(tensors, temporary, metadata=about))

    @classmethod
    def load(cls, model: OmniMamba, path: str | Path) -> Dialogue:
        """Go on from what ``save`` wrote; CheckpointError where it is damaged or another model's."""
        fresh, about = model.backbone.new_state(1), read_about(path)
        try:
            found, position = load_file(path, device=str(fresh.ssm.device)), int(about["position"])
            config, conv, ssm = json.loads(about["config"]), found["conv"], found["ssm"]
            weights = about["weights"]
            if position < 0:
                raise ValueError(f"position must be 0 or more, got {position}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no dialogue's state: {error!r}") from error
        alike = conv.shape == fresh.conv.shape and ssm.shape == fresh.ssm.shape
        if config != json.loads(json.dumps(model.config.to_dict())) or not alike:
            raise CheckpointError(f"{path} is the state of another model: their configs differ")
        if weights != fingerprint(model):
            raise CheckpointError(f"{path} is the state of another model: of one size with this, but of other weights")
        return cls(model, MambaState(conv.to(fresh.conv.dtype), ssm.to(fresh.ssm.dtype), position))

    def _embed(self, ids: Tensor) -> Tensor:
        """(l, d_model) at the places after what was said."""
        backbone = self.model.backbone
        ids = ids.to(backbone.embedding.weight.device)
        return backbone.embed_understanding(backbone.embedding(ids[None]), self.state.position)[0]


def read_about(path: str | Path) -> dict[str, str]:
    """The texts in a file of ``Dialogue.save``; CheckpointError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(absent(Path(path))) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no dialogue's state: {error!r}") from error


class Chat:
    """A dialogue in words about one picture. ``turns`` are its questions and answers, as far as they were heard."""

    def __init__(self, pipeline: Pipeline, image: Image.Image, form: str | None = None) -> None:
        features = pipeline.pixels.look([image])[0].to(pipeline.device)
        self._set(pipeline, Dialogue.about(pipeline.model, features), form, [], _mark(image))

    def _set(self, pipeline: Pipeline, dialogue: Dialogue, form: str | None, turns: list, picture: str) -> None:
        if form is not None and form not in FORMATS:
            raise ValueError(f"form must be one of {', '.join(FORMATS)}, got {form!r}")
        self.pipeline, self.dialogue, self.form = pipeline, dialogue, form
        self.turns: list[tuple[str, str]] = turns
        self._picture = picture

    def ask(self, question: str, sampling: Sampling = GREEDY, steps: int = LONGEST) -> Iterator[str]:
        """The answer, piece by piece. ValueError, and no turn, where the question has no ids."""
        words = self.pipeline.words
        ids = self.pipeline.question(question, self.form, len(self.turns))
        if not len(ids):
            raise ValueError(f"the question must have a token, got {question!r}")
        place = len(self.turns)
        self.turns.append((question, ""))
        said: list[int] = []
        heard = ""
        for token in self.dialogue.ask(ids, steps, sampling):
            said.append(token)
            whole = words.decode(said)
            if whole.startswith(heard) and not whole.endswith("\ufffd"):  # half a character waits for its rest
                piece, heard = whole[len(heard) :], whole
                self.turns[place] = question, heard
                yield piece

    def save(self, path: str | Path) -> None:
        """Write the dialogue's state, in which the picture is, and its turns, whole or not at all."""
        besides = {"turns": json.dumps(self.turns), "form": json.dumps(self.form), "picture": self._picture}
        self.dialogue.save(path, besides)

    @classmethod
    def load(
        cls, pipeline: Pipeline, path: str | Path, image: Image.Image | None = None, form: str | None = None
    ) -> Chat:
        """Go on from what ``save`` wrote; ``form`` None goes on with the form that it had.

        CheckpointError where the file is damaged or another model's; ValueError where it is about another picture
        than ``image``.
        """
        dialogue, about = Dialogue.load(pipeline.model, path), read_about(path)
        try:
            turns, kept, picture = json.loads(about["turns"]), json.loads(about["form"]), about["picture"]
            turns = [(question, answer) for question, answer in turns]
            if not all(isinstance(text, str) for turn in turns for text in turn):
                raise ValueError("turns must be texts")
            if kept is not None and kept not in FORMATS:
                raise ValueError(f"form must be one of {', '.join(FORMATS)}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is the state of a dialogue without its turns: {error!r}") from error
        if image is not None and _mark(image) != picture:
            raise ValueError(f"{path} is a dialogue about another picture; name another file, or no picture")
        chat = cls.__new__(cls)
        chat._set(pipeline, dialogue, form or kept, turns, picture)
        return chat


def _mark(image: Image.Image) -> str:
    """Tells a picture from any other."""
    image = plain(image)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
