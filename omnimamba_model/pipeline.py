"""From words to pictures and from pictures to words: the model between its two tokenizers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from .config import OmniMambaConfig
from .engine import generate
from .files import write_whole
from .foreign import read_any
from .generation import answer_rows, draw
from .hub import OFFICIAL_VQ, locate
from .image_tokenizer import PatchTokenizer
from .omnimamba import OmniMamba
from .places import Place, text_beside
from .published import PublishedPixels, read_official_vq
from .sampling import GREEDY, Sampling
from .text_tokenizer import TextTokenizer, WordTokenizer, read_text_tokenizer
from .vision import feature_sizes
from .weights import TOKENIZER, CheckpointError, fingerprint

VOCAB_PADDING = 16
"""Tables are rounded up to a multiple of this many rows; the last ones have no token."""
PIXELS = (*PublishedPixels.files, *PatchTokenizer.files, OFFICIAL_VQ)
"""The files of an image tokenizer, whichever kind."""

FORMATS = {"instruct": ("In: {}\nOut: ", "\n"), "user": ("USER: {} ASSISTANT:", " "), "plain": ("{}", "")}
"""How a question is put (stage 2 of training; the official inference script; as it is), and what stands before every
question but the first."""


class ImageTokenizer(Protocol):
    """Pictures to what the model looks at, and what it draws to pictures."""

    file: str
    """Its file in a checkpoint's folder."""

    def sizes(self) -> dict[str, int]:
        """The fields of OmniMambaConfig that it sets."""
        ...

    def pictures(self, tokens: Tensor) -> list[Image.Image]:
        """Image tokens (b, image_tokens) to pictures."""
        ...

    def tokens_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Square pictures to image tokens (b, image_tokens)."""
        ...

    @property
    def ready(self) -> bool:
        """Whether ``look`` need load nothing first, as ``prepare`` does."""
        ...

    def prepare(self) -> None: ...

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to the feature vectors of understanding (b, image_features, feature_dim).

        In training a thread looks beside the step, whose dropout draws from torch's generator of the whole process:
        nothing here may draw from it, or two runs differ.
        """
        ...

    def describe(self) -> str:
        """What looks, in words that tell it from any other."""
        ...

    def save(self, folder: str | Path) -> None: ...

    def to(self, device: str | torch.device) -> ImageTokenizer: ...


@dataclass
class Pipeline:
    model: OmniMamba
    words: TextTokenizer
    pixels: ImageTokenizer
    answer_tokens: int = 32
    """The longest answer of ``ask``, as benchmarks want it: a word or a phrase."""

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        encoders: tuple[str, str] | None = None,
        fold: bool | None = None,
    ) -> Pipeline:
        """All three parts of a checkpoint: a folder, a hub repository, or a file with the tokenizers beside it.

        CheckpointError where one is missing or damaged. ``encoders`` as in ``seen_through``, in place of those that the
        checkpoint names. ``fold``: drawing looks up what image MLP and caption_embed make of every token
        (``OmniMamba.fold``), which answers have no use for; None where making that takes about a second or less: on a
        GPU always, on a CPU up to ``embeddings.QUICK_TO_FOLD``. At 1.3B that takes a CPU longer than one drawing saves.
        """
        place = Place.at(locate(name_or_path))
        model = read_any(place.model, device, dtype)
        if not isinstance(model, OmniMamba):
            raise CheckpointError(f"{name_or_path} holds a plain language model, which can neither draw nor see")
        words, pixels = load_tokenizers(place.tokenizers, model.config, place.additions)
        if encoders is not None:
            pixels = seen_through(pixels, encoders, model.config)
        if model.backbone.quick_to_fold() if fold is None else fold:
            model.fold()
        return cls(model, words, pixels.to(device))

    @property
    def device(self) -> torch.device:
        return self.model.backbone.embedding.weight.device

    def describe(self) -> dict[str, str]:
        """What answers and drawings hang on besides what is asked: a name for the weights, how they are kept, and what
        looks."""
        dtype = str(self.model.backbone.embedding.weight.dtype).removeprefix("torch.")
        return {"weights": fingerprint(self.model), "dtype": dtype, "pictures": self.pixels.describe()}

    def question(self, text: str, form: str | None = None, turn: int = 0) -> Tensor:
        """The ids (l,) of a question; ``form`` is one of FORMATS, None the one that goes with the text tokenizer."""
        form = form or ("plain" if isinstance(self.words, WordTokenizer) else "instruct")
        if form not in FORMATS:
            raise ValueError(f"form must be one of {', '.join(FORMATS)}, got {form!r}")
        frame, between = FORMATS[form]
        ids = self.words.encode((between if turn else "") + frame.format(text))
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def draw(
        self, prompts: Sequence[str], sampling: Sampling, guidance: float = 1.0, copies: int = 1, exact: bool = False
    ) -> list[Image.Image]:
        """``copies`` drawings a prompt, prompt by prompt; ``exact`` as in ``generation.draw``. Of a prompt of more
        than ``text_slots`` tokens the beginning is drawn, with a warning."""
        _expect_texts("prompts", prompts)
        asked, slots = [self.words.encode(prompt) for prompt in prompts], self.model.config.text_slots
        for prompt, ids in zip(prompts, asked, strict=True):
            if len(ids) > slots:
                told = f"a prompt has {len(ids)} tokens, of which the first {slots} are drawn: {prompt[:80]!r}"
                warnings.warn(told, stacklevel=2)
        caption = self.model.pad_captions(asked)
        return self.pixels.pictures(draw(self.model, caption, sampling, guidance, copies, exact))

    def ask(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        sampling: Sampling = GREEDY,
        form: str | None = None,
        steps: int | None = None,
    ) -> list[str]:
        """One answer a pair, questions of any lengths side by side; ``steps`` tokens each at most, None is
        ``answer_tokens``."""
        _expect_texts("questions", questions)
        if len(images) != len(questions):
            raise ValueError(f"questions must be as many as images, {len(images)}, got {len(questions)}")
        if not questions:
            return []
        eos = self.model.config.tokens.eos
        asked = [self.question(question, form) for question in questions]
        with torch.inference_mode():
            features = self.pixels.look(images).to(self.device)
            rows = answer_rows(self.model, features, asked, self.answer_tokens if steps is None else steps)
        return [self.words.decode(_until(ids.tolist(), eos)) for ids in generate(self.model, rows, sampling)]


def _expect_texts(name: str, texts: Sequence[str]) -> None:
    """TypeError for one text alone, which is a sequence too, of its letters."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a list of texts, got {texts!r}")


def load_tokenizers(
    folder: str | Path, config: OmniMambaConfig, additions: bool = False
) -> tuple[TextTokenizer, ImageTokenizer]:
    """Both tokenizers of a checkpoint's folder; CheckpointError where one is missing, damaged, or unlike ``config``.

    ``additions``: the text tokenizer is GPT-NeoX's own, which the published model adds tokens to.
    """
    text = text_beside(Path(folder), additions)
    if text is None:
        raise CheckpointError(f"{folder} has no {TOKENIZER}; omnimamba convert puts one beside a model")
    return with_pixels(text, folder, config)


def with_pixels(text: str, folder: str | Path, config: OmniMambaConfig) -> tuple[TextTokenizer, ImageTokenizer]:
    """The text tokenizer that ``text`` holds and the image tokenizer of a folder; CheckpointError as above."""
    try:
        words = read_text_tokenizer(text)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    pixels = load_pixels(folder)
    check_together(folder, config, words, pixels)
    return words, pixels


def load_pixels(place: str | Path) -> ImageTokenizer:
    """The image tokenizer of a folder, LlamaGen's own file included, or the very one of a file, which is LlamaGen's
    where its name is none of this package's; CheckpointError where it is missing or damaged."""
    path = Path(place)
    if path.is_dir():
        path = pixels_in(path) or path / PatchTokenizer.file
    for kind in (PublishedPixels, PatchTokenizer):
        if path.name in kind.files:
            return kind.load(path.parent)
    return PublishedPixels(read_official_vq(path))


def pixels_in(folder: str | Path) -> Path | None:
    """The file that ``load_pixels`` reads of a folder."""
    files = (Path(folder) / name for name in (PublishedPixels.file, PatchTokenizer.file, OFFICIAL_VQ))
    return next((path for path in files if path.exists()), None)


def seen_through(pixels: ImageTokenizer | None, encoders: tuple[str, str], config: OmniMambaConfig) -> PublishedPixels:
    """The published image tokenizer with these encoders, DINOv2 and SigLIP, each a folder or a hub repository.

    ValueError where it is another image tokenizer, or an encoder of another kind; CheckpointError where the model takes
    other features than theirs; OSError where one is not there.
    """
    if not isinstance(pixels, PublishedPixels):
        raise ValueError(f"encoders go with the published image tokenizer, {PublishedPixels.file}")
    unfit = [
        f"{name} is {getattr(config, name)}, but the encoders give {size}"
        for name, size in feature_sizes(*encoders).items()
        if getattr(config, name) != size
    ]
    if unfit:
        raise CheckpointError(f"{' and '.join(encoders)} do not fit the model: {'; '.join(unfit)}")
    return PublishedPixels(pixels.vq, pixels.side, encoders)


def check_together(
    folder: str | Path, config: OmniMambaConfig, words: TextTokenizer | None, pixels: ImageTokenizer | None
) -> None:
    """CheckpointError that names each field of config.json in which a tokenizer disagrees with the model."""
    problems = disagreements(config, words, pixels)
    if problems:
        raise CheckpointError(f"{folder}/config.json does not fit its tokenizers: {'; '.join(problems)}")


def disagreements(config: OmniMambaConfig, words: TextTokenizer | None, pixels: ImageTokenizer | None) -> list[str]:
    """Each field of a config in which a tokenizer disagrees with it, in words."""
    problems = [
        f"{name} is {getattr(config, name)}, but {pixels.file} has {size}"
        for name, size in (pixels.sizes() if pixels else {}).items()
        if getattr(config, name) != size
    ]
    vocab = config.backbone.vocab_size
    if words and not vocab - VOCAB_PADDING < words.vocab_size <= vocab:
        problems.append(f"backbone.vocab_size is {vocab}, but {TOKENIZER} has {words.vocab_size}")
    return problems + [
        f"tokens.{name} is {i}, but {TOKENIZER} has text there"
        for name, i in dataclasses.asdict(config.tokens).items()
        if words and not words.is_special(i)
    ]


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def contact_sheet(images: Sequence[Image.Image], columns: int = 10, least: int = 128) -> Image.Image:
    """Images of one size in rows of ``columns``, each pixel enlarged so that a side has ``least`` pixels or more."""
    width, height = images[0].size
    factor = max(1, -(-least // min(width, height)))
    gap = 8 if len(images) > 1 else 0
    cell_w, cell_h = width * factor + gap, height * factor + gap
    across, down = min(columns, len(images)), -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (across * cell_w - gap, down * cell_h - gap), "white")
    for i, image in enumerate(images):
        big = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(big, (i % columns * cell_w, i // columns * cell_h))
    return sheet


def write_png(image: Image.Image, path: Path) -> None:
    """The image as a PNG file, whole or not there."""
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))
