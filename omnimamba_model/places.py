"""Where the parts of a checkpoint lie; every command finds them so."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .foreign import is_foreign
from .text_tokenizer import BpeTokenizer
from .weights import CheckpointError, read_tokenizer


class Place(NamedTuple):
    """A folder, or a file with its tokenizers beside it."""

    model: Path
    """What ``read_any`` reads."""
    tokenizers: Path
    """The folder with both tokenizers."""
    additions: bool
    """Whether another project wrote it: tokenizer.json is GPT-NeoX's own, which the published OmniMamba adds to."""

    loose: bool
    """Whether the model is a file: what lies beside it may be anybody's."""

    @classmethod
    def at(cls, path: Path) -> Place:
        return cls(path, folder_of(path), is_foreign(path), path.is_file())

    def text(self, additions: bool) -> str | None:
        """``text_beside``; None too where the model is a file and what lies beside it does not fit."""
        try:
            return text_beside(self.tokenizers, additions)
        except (CheckpointError, OSError):
            if not self.loose:
                raise
            return None


def folder_of(path: Path) -> Path:
    """A folder as it is; the one in which a file lies."""
    return path.parent if path.is_file() else path


def text_beside(folder: Path, additions: bool) -> str | None:
    """The text of a folder's tokenizer.json, the published ``additions`` in it where they are asked for; None where
    the folder has none. CheckpointError where it is damaged, or they do not fit into it."""
    text = read_tokenizer(folder)
    if text is None or not additions:
        return text
    try:
        return BpeTokenizer.published(folder).to_json()
    except ValueError as error:
        raise CheckpointError(str(error)) from error
