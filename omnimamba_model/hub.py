"""Models by name: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

OFFICIAL_VQ = "vq_ds16_t2i.pt"
"""LlamaGen's image tokenizer, as it is published."""
WANTED = ("*.json", "*.safetensors", "OmniMamba*.pth", OFFICIAL_VQ, "pytorch_model*.bin", "adapter_model.bin")


class Pretrained:
    """``from_pretrained`` and ``save_pretrained``, as people know them from other libraries."""

    tokenizer: str | None = None
    """The text of the tokenizer.json that lay beside the weights; ``save_pretrained`` puts it beside them again."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
    ) -> Any:
        """The model of a local checkpoint or of a hub repository, in evaluation mode.

        Reads what ``save_pretrained`` wrote and what ``omnimamba convert`` reads; strict: CheckpointError lists every
        tensor that is missing, unknown or mis-shaped. ``dtype`` casts the matrices; ``torch.int8`` quantizes them, for
        decode. Pickles are read as tensors only. GPT-NeoX's tokenizer.json beside the official OmniMamba gets the
        published model's additions; another one beside a file is not the model's, whose ``tokenizer`` is None then.
        """
        from .foreign import read_any
        from .omnimamba import OmniMamba
        from .places import Place
        from .weights import CheckpointError

        place = Place.at(locate(name_or_path, revision, local_files_only))
        model = read_any(place.model, device, dtype)
        if not isinstance(model, cls):
            raise CheckpointError(f"{name_or_path} holds a {type(model).__name__}, not a {cls.__name__}")
        model.tokenizer = place.text(place.additions and isinstance(model, OmniMamba))
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model into ``folder``: ``weights.save`` with its options (tokenizer, max_shard_bytes).

        The tokenizer is the one that ``from_pretrained`` found, where no other is given.
        """
        from .weights import save

        save(self, folder, **{"tokenizer": self.tokenizer, **options})


def locate(
    name_or_path: str | Path,
    revision: str | None = None,
    local_files_only: bool = False,
    wanted: Sequence[str] = WANTED,
) -> Path:
    """A local path as it is; a hub repository's name as the folder to which its ``wanted`` files were downloaded.

    FileNotFoundError where it is neither, or the hub cannot be asked; ImportError where that needs huggingface_hub.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} does not exist: it is not a checkpoint here, nor OWNER/NAME on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{name} is no folder or file here; to download it: pip install huggingface_hub") from None
    options = dict(revision=revision, allow_patterns=list(wanted), local_files_only=local_files_only)
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the library's own, its HTTP client's and the system's have no base in common
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise FileNotFoundError(
            f"{name} is no folder or file here, and the hub does not give it: {reason}; "
            "is the name right, and what makes it (omnimamba train, convert) done?"
        ) from error
