"""What ``omnimamba convert`` does: other projects' checkpoints into this package's, and adapters into PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .adapters import save_adapter, with_adapter
from .backbone import MambaLM, cast_matrices
from .config import MambaConfig, OmniMambaConfig
from .foreign import read_any
from .gguf import SUFFIX, save_gguf
from .hub import OFFICIAL_VQ, locate
from .image_tokenizer import PatchTokenizer
from .omnimamba import OmniMamba
from .pipeline import ImageTokenizer, check_together, disagreements, load_pixels, pixels_in, seen_through
from .places import Place
from .published import PublishedPixels
from .text_tokenizer import BpeTokenizer, TextTokenizer, read_text_tokenizer
from .weights import TOKENIZER, CheckpointError, read_tokenizer, save


def convert(
    source: str,
    target: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    image_tokenizer: str | Path | None = None,
    encoders: Sequence[str] | None = None,
    base: str | None = None,
    task: str | None = None,
    as_omnimamba: bool = False,
) -> str:
    """Write ``source`` into the folder ``target``, or into the file ``target`` where its name ends in .gguf, and say in
    a line what it holds. All is read and checked before the first file is written. Tokenizers that the folder held and
    that do not fit what is now written there are removed, those that lie beside a source that is a file and do not fit
    it are left out: the line names them.

    ``base`` and ``task``: source is a PEFT adapter, target becomes ``base`` with it in the task's place. ``task``
    alone: target becomes source's adapter for PEFT. ``as_omnimamba``: source is a Mamba-2, what it lacks is fresh.
    ``encoders``: where DINOv2 and SigLIP are found, noted beside the published image tokenizer.
    """
    _check_arguments(base, task, as_omnimamba, (dtype, tokenizer, image_tokenizer, encoders))
    if Path(target).suffix == SUFFIX:
        if (tokenizer, image_tokenizer, encoders, base, task, as_omnimamba) != (None,) * 5 + (False,):
            raise ValueError(f"a {SUFFIX} holds a plain Mamba-2 alone: of the options only --dtype goes with it")
        return _to_gguf(source, Path(target), dtype or "float32")
    if dtype == "q8_0":
        raise ValueError(f"q8_0 is a type of {SUFFIX} files; name the target so")
    place = Place.at(locate(source if base is None else base))
    model = read_any(place.model)
    if base is not None:
        _expect_omnimamba(model, base)
        model = with_adapter(model, task, locate(source))
    elif task is not None:
        _expect_omnimamba(model, source)
        save_adapter(model, task, target)
        return f"{target}: the {task} adapter for PEFT"
    if as_omnimamba:
        model = grown(model, source)
    if dtype is not None:
        model = cast_matrices(model, getattr(torch, dtype))
    pixels = _pixels(place, model, image_tokenizer)
    text, added = _text(place, model, tokenizer, as_omnimamba)
    left = _left_out(place, model, text, pixels)
    if isinstance(model, OmniMamba):
        words = None if text is None else _words(text, source)
        check_together(target, model.config, words if added else None, None if image_tokenizer is None else pixels)
        if encoders is not None:
            pixels = seen_through(pixels, tuple(encoders), model.config)
    elif pixels is not None or encoders is not None:
        raise ValueError(
            f"{source} holds a {type(model).__name__}, which has no use for an image tokenizer or encoders"
        )
    return _write(model, Path(target), text, pixels) + left


def _write(model: OmniMamba | MambaLM, target: Path, text: str | None, pixels: ImageTokenizer | None) -> str:
    """Write all parts into ``target``, remove the tokenizers there that do not fit, and say so in a line."""
    unfit = _misfits(target, model.config, text, pixels)
    save(model, target, text)
    for name in unfit:
        (target / name).unlink(missing_ok=True)
    if pixels is not None:
        pixels.save(target)
    count = sum(parameter.numel() for parameter in model.parameters())
    said = f"{target}: {type(model).__name__}, {count:,} parameters"
    if unfit:
        said += f"; removed {', '.join(unfit)}, which did not fit"
    found = pixels_in(target)  # what did not fit is gone by now, but for LlamaGen's file, which is not ours to remove
    drawn = found is not None and (pixels is not None or _fits(model.config, lambda: (None, load_pixels(found))))
    there = {"--tokenizer": (target / TOKENIZER).exists(), "--image-tokenizer": drawn}
    if isinstance(model, OmniMamba) and not all(there.values()):
        said += f"; to draw and answer it needs {' and '.join(name for name, held in there.items() if not held)}"
    return said


def _misfits(
    folder: Path, config: OmniMambaConfig | MambaConfig, text: str | None, pixels: ImageTokenizer | None
) -> list[str]:
    """The tokenizer files in a folder that cannot stay once a model of this ``config`` is written into it.

    A file that ``text`` or ``pixels`` will overwrite is not among them, nor one that cannot be read; an image tokenizer
    of another kind than ``pixels`` is, and else what does not fit the config.
    """
    names = []
    if text is None and not _fits(config, lambda: (_words_in(folder), None)):
        names.append(TOKENIZER)
    for kind in (PublishedPixels, PatchTokenizer):
        if isinstance(pixels, kind) or not (folder / kind.file).exists():
            continue
        if pixels is not None or not _fits(config, lambda kind=kind: (None, kind.load(folder))):
            names += [name for name in kind.files if (folder / name).exists()]
    return names


def _words_in(folder: Path) -> TextTokenizer | None:
    text = read_tokenizer(folder)
    return None if text is None else read_text_tokenizer(text)


def _fits(
    config: OmniMambaConfig | MambaConfig, read: Callable[[], tuple[TextTokenizer | None, ImageTokenizer | None]]
) -> bool:
    """Whether what ``read`` gives fits a model; yes, where nothing can be said of it."""
    try:
        words, pixels = read()
    except (ImportError, OSError, ValueError):
        return True
    if isinstance(config, MambaConfig):
        return words is None or words.vocab_size <= config.vocab_size
    return not disagreements(config, words, pixels)


def _to_gguf(source: str, target: Path, dtype: str) -> str:
    model = read_any(locate(source))
    if not isinstance(model, MambaLM):
        raise CheckpointError(f"{source} holds a {type(model).__name__}; llama.cpp knows the plain Mamba-2 alone")
    save_gguf(model, target, dtype)
    return f"{target}: MambaLM as GGUF, matrices in {dtype}"


def grown(model: OmniMamba | MambaLM, source: object = "this") -> OmniMamba:
    """A new OmniMamba of the published formats around a Mamba-2's weights: what training starts from."""
    if not isinstance(model, MambaLM):
        raise CheckpointError(f"{source} holds a {type(model).__name__}; an OmniMamba grows from a plain Mamba-2")
    published = OmniMambaConfig()
    sizes = model.config.to_dict()
    rows = max(sizes["vocab_size"], published.backbone.vocab_size)
    out = OmniMamba(OmniMambaConfig(backbone=MambaConfig(**{**sizes, "vocab_size": rows})))
    known = model.backbone.state_dict()
    table = known.pop("embedding.weight")
    with torch.no_grad():
        out.backbone.embedding.weight[: len(table)] = table
    out.backbone.load_state_dict(known, strict=False)
    return out.eval()


def _pixels(place: Place, model: OmniMamba | MambaLM, official: str | Path | None) -> ImageTokenizer | None:
    """The image tokenizer of LlamaGen's file, alone, in a folder or on the hub; or the one beside an OmniMamba, or what
    becomes one; not one that lies beside a file and does not fit."""
    if official is not None:
        found = locate(official, wanted=(OFFICIAL_VQ,))
        return load_pixels(found / OFFICIAL_VQ if found.is_dir() else found)
    if not isinstance(model, OmniMamba) or pixels_in(place.tokenizers) is None:
        return None
    try:
        pixels = load_pixels(place.tokenizers)
    except (CheckpointError, OSError):
        if not place.loose:
            raise
        return None
    return None if place.loose and disagreements(model.config, None, pixels) else pixels


def _words(text: str, source: str) -> TextTokenizer:
    try:
        return read_text_tokenizer(text)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _text(place: Place, model: OmniMamba | MambaLM, tokenizer: str | None, grown: bool) -> tuple[str | None, bool]:
    """tokenizer.json's text, and whether it got the published additions: from ``tokenizer``, or from beside the source
    where that is another project's or this OmniMamba is new; what lies beside this package's own goes along as it is.
    """
    if tokenizer is not None:
        return BpeTokenizer.published(tokenizer).to_json(), True
    additions = isinstance(model, OmniMamba) and (grown or place.additions)
    text = place.text(additions)
    if place.loose and text is not None and disagreements(model.config, read_text_tokenizer(text), None):
        return None, False
    return text, additions


def _left_out(place: Place, model: OmniMamba | MambaLM, text: str | None, pixels: ImageTokenizer | None) -> str:
    """What lies beside an OmniMamba's source, or what becomes one, and is in neither place, in words."""
    names = [TOKENIZER] if text is None and (place.tokenizers / TOKENIZER).exists() else []
    found = pixels_in(place.tokenizers)
    if pixels is None and found is not None and isinstance(model, OmniMamba):
        names.append(found.name)
    return f"; left out {', '.join(names)}, found beside it, which did not fit" if names else ""


def _expect_omnimamba(model: OmniMamba | MambaLM, source: str) -> None:
    if not isinstance(model, OmniMamba):
        raise CheckpointError(f"{source} holds a {type(model).__name__}; adapters belong on an OmniMamba")


def _check_arguments(base: str | None, task: str | None, as_omnimamba: bool, others: tuple) -> None:
    if base is not None and task is None:
        raise ValueError("--base needs --task, the adapter's own")
    if task is not None and as_omnimamba:
        raise ValueError("--task writes or reads an adapter and --as-omnimamba starts from a Mamba-2: choose one")
    if task is not None and base is None and any(other is not None for other in others):
        raise ValueError("--task without --base writes an adapter as it is: no other option goes with it")
