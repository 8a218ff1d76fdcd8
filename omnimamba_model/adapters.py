"""One task's adapters as a folder of PEFT's: adapter_config.json and adapter_model.safetensors.

PEFT adds ``lora_alpha / r * B A x`` to each target module, as this model does to each layer's in_proj.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import TASKS
from .files import absent, write_whole
from .foreign import read_pickle
from .omnimamba import OmniMamba
from .weights import CheckpointError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TARGET = "backbone.layers.{}.mixer.in_proj"
_NAME = re.compile(
    r"(?:base_model\.model\.)?backbone\.layers\.(\d+)\.mixer\.in_proj\.lora_([AB])(?:\.default)?\.weight"
)
_PLAIN = {"use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False}
"""Options of PEFT that change the maths, and the values under which it is ours."""
_EMPTY = (
    "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
"""Others, which are ours where they are empty."""
_BEGUN = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin the adapters that leave the weights under them as they are."""


def save_adapter(model: OmniMamba, task: str, folder: str | Path) -> None:
    """Write ``task``'s adapters for PEFT: ``PeftModel.from_pretrained(mamba2, folder)`` loads them on its backbone."""
    _check_task(task)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = model.config
    values = {
        "peft_type": "LORA", "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout,
        "target_modules": ["in_proj"], "inference_mode": True, "base_model_name_or_path": None, **_PLAIN,
    }  # fmt: skip
    tensors = {}
    for i, layer in enumerate(model.backbone.layers):
        for side, tensor in zip("AB", layer.mixer.in_proj.adapter(TASKS.index(task)), strict=True):
            tensors[f"base_model.model.{_TARGET.format(i)}.lora_{side}.weight"] = tensor.detach().contiguous().cpu()
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))
    write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


@torch.no_grad()
def load_adapter(model: OmniMamba, task: str, folder: str | Path) -> None:
    """Put a PEFT folder's adapters in the place of ``task``'s; CheckpointError lists all that does not fit, and
    then nothing has changed. A smaller rank than the model's is filled up with zeros, a scale unlike it goes into B.
    """
    _check_task(task)
    folder = Path(folder)
    rank, scale = _read_config(folder, model.config.lora_rank)
    found, unknown = _read_weights(folder)
    slots: dict[tuple[int, str], Tensor] = {}
    for i, layer in enumerate(model.backbone.layers):
        down, up = layer.mixer.in_proj.adapter(TASKS.index(task))
        slots |= {(i, "A"): down, (i, "B"): up}
    problems = [f"unknown {name}" for name in unknown]
    problems += [f"unknown {_TARGET.format(i)} lora_{side}" for i, side in found.keys() - slots.keys()]
    for (i, side), slot in slots.items():
        wanted = (rank, slot.shape[1]) if side == "A" else (slot.shape[0], rank)
        has = found.get((i, side))
        if has is None or tuple(has.shape) != wanted:
            shape = None if has is None else tuple(has.shape)
            problems.append(f"{_TARGET.format(i)} lora_{side} has shape {shape}, expected {wanted}")
    if problems:
        raise CheckpointError(f"{folder} does not fit this model:\n  " + "\n  ".join(problems))
    for (i, side), slot in slots.items():
        tensor = found[i, side] if side == "A" else found[i, side] * (scale / model.config.lora_scale)
        slot.zero_()
        slot[: tensor.shape[0], : tensor.shape[1]] = tensor


def with_adapter(model: OmniMamba, task: str, folder: str | Path) -> OmniMamba:
    """The model with a PEFT folder's adapters in the place of ``task``'s, all adapters as wide as theirs where they are
    wider than its own; CheckpointError as ``load_adapter``."""
    rank, _ = _read_config(Path(folder), model.config.backbone.d_model)
    found, _ = _read_weights(Path(folder))
    if any(side == "A" and tensor.shape[:1] == (rank,) for (_, side), tensor in found.items()):
        model = _widened(model, rank)
    load_adapter(model, task, folder)
    return model


def _widened(model: OmniMamba, rank: int) -> OmniMamba:
    """The same model with adapters of at least that rank: zeros beside what was there, under the same scale."""
    cfg = model.config
    if rank <= cfg.lora_rank:
        return model
    alpha = cfg.lora_alpha * rank / cfg.lora_rank
    with torch.device("meta"):
        out = OmniMamba(dataclasses.replace(cfg, lora_rank=rank, lora_alpha=alpha))
    tensors = model.state_dict()
    for name, wanted in out.state_dict().items():
        if (stored := tensors[name]).shape != wanted.shape:
            tensors[name] = stored.new_zeros(wanted.shape)
            tensors[name][: stored.shape[0], : stored.shape[1]] = stored
    out.load_state_dict(tensors, assign=True)
    return out.requires_grad_(True).eval()


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def _read_config(folder: Path, most: int) -> tuple[int, float]:
    """The adapter's rank and scale."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = values["r"], float(values["lora_alpha"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {folder} is no PEFT adapter") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must be an object with r and lora_alpha: {error!r}") from error
    other = [f"{name} = {values[name]!r}" for name, plain in _PLAIN.items() if values.get(name, plain) != plain]
    other += [f"{name} = {values[name]!r}" for name in _EMPTY if values.get(name)]
    if (begun := values.get("init_lora_weights")) not in _BEGUN:
        other.append(f"init_lora_weights = {begun!r}")
    if values.get("peft_type", "LORA") != "LORA" or other:
        raise CheckpointError(f"{path} describes no plain LoRA: {', '.join(other) or values['peft_type']}")
    if type(rank) is not int or not 1 <= rank <= most:
        raise CheckpointError(f"{path}: r must lie in 1..{most}, the model's own rank, got {rank!r}")
    if not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha must be finite, got {alpha}")
    return rank, alpha / rank


def _read_weights(folder: Path) -> tuple[dict[tuple[int, str], Tensor], list[str]]:
    """Tensors by layer and side, and the names that are neither."""
    path = folder / WEIGHTS
    try:
        pickled = folder / PICKLED
        tensors = read_pickle(pickled) if pickled.exists() and not path.exists() else load_file(path)
    except FileNotFoundError:
        raise CheckpointError(absent(path)) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    matched = {name: _NAME.fullmatch(name) for name in tensors}
    known = {(int(m[1]), m[2]): tensors[name] for name, m in matched.items() if m}
    return known, [name for name, m in matched.items() if not m]
