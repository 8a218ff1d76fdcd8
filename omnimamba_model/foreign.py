"""Checkpoints of other projects, read as models of this one; each tensor keeps its bits and its dtype.

| what is found | what it becomes |
| --- | --- |
| OmniMamba-1.3b.pth: a pickle of ``llm_backbone.mamba.*`` and ``projector.*``, or a folder with it | OmniMamba |
| a folder of mamba_ssm: config.json with ``ssm_cfg``, pytorch_model.bin | MambaLM |
| a folder of transformers: config.json with ``hidden_size``, safetensors or pytorch_model.bin | MambaLM |

Pickles are read with torch's ``weights_only``: a file that asks for any other object is refused, none of it runs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .backbone import MambaLM, cast_matrices
from .config import MambaConfig
from .files import absent
from .foreign_config import config_of, mamba_ssm_config, official_config, transformers_config
from .omnimamba import OmniMamba
from .weights import CONFIG, INDEX, WEIGHTS, CheckpointError, check_dtypes, check_fit, load, usable, weight_files

PICKLES = (".pth", ".pt", ".bin")
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ADAPTER = "adapter_config.json"
_OFFICIAL = "llm_backbone.mamba."
_IGNORED = ("vision_backbone.", "llm_backbone.vqvae.")
"""Frozen parts that the official file may carry; they have files of their own."""
_WRAPPERS = ("model", "state_dict", "module")


def is_foreign(path: Path) -> bool:
    """Whether ``read_foreign`` is the one to read ``path``."""
    if path.is_file():
        return path.suffix in PICKLES
    values = config_of(path) or {}
    return _official_file(path) is not None or "ssm_cfg" in values or "hidden_size" in values


def read_any(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> OmniMamba | MambaLM:
    """A checkpoint of this package or of another project; ``dtype`` casts the matrices."""
    if (path / _ADAPTER).exists() and not (path / CONFIG).exists():
        raise CheckpointError(
            f"{path} is a PEFT adapter, no whole model; put it on its OmniMamba first: "
            f"omnimamba convert {path} TARGET --base OMNIMAMBA --task mmu (or t2i)"
        )
    if not is_foreign(path):
        return load(path, device, dtype)
    device = usable(device)  # said before the work
    model = read_foreign(path).to(device)
    return model if dtype is None else cast_matrices(model, dtype)


def read_foreign(path: str | Path) -> OmniMamba | MambaLM:
    """The model of another project's checkpoint, in evaluation mode; CheckpointError lists all that does not fit."""
    path = Path(path)
    if path.is_file():
        return _official(read_pickle(path), path)
    values, official = config_of(path), _official_file(path)
    if official is not None:
        return _official(read_pickle(official), official, values)
    if values is None:
        raise CheckpointError(f"{path} is no checkpoint: it has neither {CONFIG} nor OmniMamba*.pth")
    tensors = _tensors_of(path)
    if "ssm_cfg" in values:
        return _language_model(mamba_ssm_config(values, tensors, path), tensors, path)
    renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in tensors.items()}
    return _language_model(transformers_config(values, path), renamed, path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote; memory is taken as they are used."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        # torch's own message begins with how to run such a file after all.
        reason = re.search(r"WeightsUnpickler error:\s*(.+?)(?: was not an allowed|$)", str(error), re.MULTILINE)
        told = f": {reason[1]}" if reason else ""
        raise CheckpointError(f"{path} holds more than tensors, or is damaged, and was not read{told}") from error
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler's own assumptions
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path} is not a whole file of torch.save: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(found).__name__}")
    odd = [str(name) for name, value in found.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path} must hold tensors by name; these are none: {', '.join(odd[:10])}")
    odd = [name for name, tensor in found.items() if tensor.layout != torch.strided or tensor.device.type != "cpu"]
    if odd:
        raise CheckpointError(f"{path} must hold dense tensors with values; these are none: {', '.join(odd[:10])}")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


# ---- OmniMamba's own file ----


def _official_file(folder: Path) -> Path | None:
    """The file, where the folder has no weights in another form; a config.json may lie beside it."""
    found = sorted(folder.glob("OmniMamba*.pth"))
    if not found or any((folder / name).exists() for name in (WEIGHTS, INDEX, _PICKLED, _PICKLED_INDEX)):
        return None
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} models; name one: {', '.join(map(str, found))}")
    return found[0]


def _official(found: Mapping[str, Tensor], path: Path, values: Mapping[str, Any] | None = None) -> OmniMamba:
    tensors = {name.removeprefix(_OFFICIAL): tensor for name, tensor in found.items() if not name.startswith(_IGNORED)}
    _drop_tied(tensors, "lm_head.weight", "backbone.embedding.weight", path)
    _drop_tied(tensors, "img_head.weight", "backbone.img_embeddings.word_embeddings.weight", path)
    return _filled(OmniMamba, official_config(tensors, values, path), tensors, path)


def _drop_tied(tensors: dict[str, Tensor], head: str, table: str, path: Path) -> None:
    """A head that repeats its table is dropped; one that differs is another model's."""
    stored = tensors.pop(head, None)
    if stored is not None and table in tensors and not torch.equal(stored, tensors[table]):
        raise CheckpointError(f"{path}: {head} differs from {table}, but this model ties them")


# ---- Mamba-2 language models ----


def _language_model(config: MambaConfig, found: dict[str, Tensor], path: Path) -> MambaLM:
    tensors = dict(found)
    _drop_tied(tensors, "lm_head.weight", "backbone.embedding.weight", path)
    return _filled(MambaLM, config, tensors, path)


# ---- both ----


def _filled(kind: type[nn.Module], config: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    with torch.device("meta"):
        model = kind(config)
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    check_dtypes({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}, path)
    model.load_state_dict(_apart({name: tensors[name] for name in model.state_dict()}), assign=True)
    return model.requires_grad_(True).eval()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, no two in the same memory, as a pickle can have them: who writes into one would change both."""
    found, end = {}, 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        tensor = tensors[name]
        steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        stretch = (steps + 1) * tensor.element_size() if tensor.numel() else 0
        alone = tensor.data_ptr() >= end and stretch >= tensor.nbytes
        found[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        end = max(end, tensor.data_ptr() + stretch)
    return found


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """A folder's weights: safetensors, else pickles, in one file or in those that an index names."""
    for whole, index, read in ((WEIGHTS, INDEX, _read_safetensors), (_PICKLED, _PICKLED_INDEX, read_pickle)):
        if not any((folder / name).exists() for name in (whole, index)):
            continue
        tensors: dict[str, Tensor] = {}
        for path in weight_files(folder, whole, index):
            found = read(path)
            if again := sorted(tensors.keys() & found.keys()):
                raise CheckpointError(f"{path} stores again what another shard has: {', '.join(again)}")
            tensors |= found
        return tensors
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {_PICKLED}, whole or with an index")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(absent(path)) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
