"""Checkpoints: a folder with model.safetensors and config.json, saved whole or not at all, loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .backbone import MambaLM
from .config import MambaConfig, OmniMambaConfig
from .files import write_whole
from .omnimamba import OmniMamba

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""What safetensors calls the dtypes that weights may have."""
_KINDS: dict[str, tuple[type, type]] = {"omnimamba": (OmniMamba, OmniMambaConfig), "mamba2": (MambaLM, MambaConfig)}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit its own config."""


def save(model: OmniMamba | MambaLM, folder: str | Path, tokenizer: str | None = None) -> None:
    """Write the model, its config and, where given, a tokenizer (tokenizer.json's text) into ``folder``.

    Each file is written under a temporary name and renamed, the weights last: an interrupted save
    leaves no torn file. Tied heads own no parameters, so their tables are stored once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, (model_type, _) in _KINDS.items() if isinstance(model, model_type))
    config = {"model_type": kind, **model.config.to_dict()}
    if tokenizer is not None:
        write_whole(folder / TOKENIZER, lambda path: path.write_text(tokenizer, encoding="utf-8"))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def load(folder: str | Path, device: str | torch.device = "cpu") -> OmniMamba | MambaLM:
    """The model of a folder that ``save`` wrote, in evaluation mode, its weights bit for bit in their own dtypes.

    Raises CheckpointError that lists every missing, unknown or mis-shaped tensor, or each of an unfit dtype.
    """
    folder = Path(folder)
    model_type, config = _read_config(folder)
    with torch.device("meta"):
        model = model_type(config)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            _check_fit(model, {name: tuple(part.get_shape()) for name, part in slices.items()}, path)
            _check_dtypes({name: part.get_dtype() for name, part in slices.items()}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_tokenizer(folder: str | Path) -> str | None:
    """The text of the folder's tokenizer.json, or None where it has none."""
    path = Path(folder) / TOKENIZER
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error


def _read_config(folder: Path) -> tuple[type[nn.Module], OmniMambaConfig | MambaConfig]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {folder} is not a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"{path} must be an object whose model_type is one of {', '.join(_KINDS)}, got {kind!r}")
    model_type, config_type = _KINDS[kind]
    try:
        return model_type, config_type.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_fit(model: nn.Module, found: dict[str, tuple[int, ...]], path: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit its config:\n  " + "\n  ".join(problems))


def _check_dtypes(found: dict[str, str], path: Path) -> None:
    unfit = [f"{name} {dtype}" for name, dtype in found.items() if dtype not in _DTYPES]
    if unfit:
        raise CheckpointError(f"{path}: weights must be {', '.join(_DTYPES.values())}, got {', '.join(unfit)}")
