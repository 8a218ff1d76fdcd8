"""Checkpoints of other projects, read as models of this one; each tensor keeps its bits and its dtype.

| what is found | what it becomes |
| --- | --- |
| OmniMamba-1.3b.pth: a pickle of ``llm_backbone.mamba.*`` and ``projector.*`` | OmniMamba |
| a folder of mamba_ssm: config.json with ``ssm_cfg``, pytorch_model.bin | MambaLM |
| a folder of transformers: config.json with ``hidden_size``, safetensors or pytorch_model.bin | MambaLM |

Pickles are read with torch's ``weights_only``: a file that asks for any other object is refused, none of it runs.
"""

from __future__ import annotations

import json
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
from .config import MambaConfig, OmniMambaConfig, SpecialTokens
from .files import absent
from .omnimamba import OmniMamba
from .weights import CONFIG, CheckpointError, check_dtypes, check_fit, load, usable, weight_files

PICKLES = (".pth", ".pt", ".bin")
_OFFICIAL = "llm_backbone.mamba."
_IGNORED = ("vision_backbone.", "llm_backbone.vqvae.")
"""Frozen parts that the official file may carry; they have files of their own."""
_WRAPPERS = ("model", "state_dict", "module")


def is_foreign(path: Path) -> bool:
    """Whether ``read_foreign`` is the one to read ``path``."""
    if path.is_file():
        return path.suffix in PICKLES
    values = _config_of(path)
    return bool(_official_file(path)) if values is None else "ssm_cfg" in values or "hidden_size" in values


def read_any(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> OmniMamba | MambaLM:
    """A checkpoint of this package or of another project; ``dtype`` casts the matrices."""
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
    values, official = _config_of(path), _official_file(path)
    if values is None:
        if official is None:
            raise CheckpointError(f"{path} is no checkpoint: it has neither {CONFIG} nor OmniMamba*.pth")
        return _official(read_pickle(official), official)
    tensors = _tensors_of(path)
    if "ssm_cfg" in values:
        return _language_model(_config_of_mamba_ssm(values, tensors, path), tensors, path)
    renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in tensors.items()}
    return _language_model(_config_of_transformers(values, path), renamed, path)


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
    return next(iter(sorted(folder.glob("OmniMamba*.pth"))), None)


def _official(found: Mapping[str, Tensor], path: Path) -> OmniMamba:
    tensors = {name.removeprefix(_OFFICIAL): tensor for name, tensor in found.items() if not name.startswith(_IGNORED)}
    _drop_tied(tensors, "lm_head.weight", "backbone.embedding.weight", path)
    _drop_tied(tensors, "img_head.weight", "backbone.img_embeddings.word_embeddings.weight", path)
    return _filled(OmniMamba, _official_config(tensors, path), tensors, path)


def _drop_tied(tensors: dict[str, Tensor], head: str, table: str, path: Path) -> None:
    """A head that repeats its table is dropped; one that differs is another model's."""
    stored = tensors.pop(head, None)
    if stored is not None and table in tensors and not torch.equal(stored, tensors[table]):
        raise CheckpointError(f"{path}: {head} differs from {table}, but this model ties them")


def _official_config(tensors: Mapping[str, Tensor], path: Path) -> OmniMambaConfig:
    """Every size from the shapes; what no shape tells (tokens an image, special ids) is the published model's."""
    layer = "backbone.layers.0.mixer."
    rank, _ = _shape(tensors, layer + "in_proj.t2i_lora_A0.weight", path, 2)
    backbone = _backbone_config(tensors, path)
    vocab_image, _ = _shape(tensors, "backbone.img_embeddings.word_embeddings.weight", path, 2)
    hidden, feature_dim = _shape(tensors, "projector.projector.0.weight", path, 2)
    defaults = OmniMambaConfig()
    slots = _shape(tensors, "backbone.pos_embed", path, 3)[1] - 5 - defaults.image_tokens
    try:
        return OmniMambaConfig(
            backbone=backbone, tokens=SpecialTokens(), image_vocab_size=vocab_image, text_slots=slots,
            feature_dim=feature_dim, mmu_positions=_shape(tensors, "backbone.mmu_pos_embed", path, 3)[1],
            mlp_ratio=hidden // feature_dim, lora_rank=rank,
        )  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _backbone_config(tensors: Mapping[str, Tensor], path: Path, **known: Any) -> MambaConfig:
    """A Mamba-2's sizes from its tensors; one group unless ``known`` says otherwise."""
    vocab, d_model = _shape(tensors, "backbone.embedding.weight", path, 2)
    layer = "backbone.layers.0.mixer."
    (heads,) = _shape(tensors, layer + "A_log", path, 1)
    conv_dim, _, d_conv = _shape(tensors, layer + "conv1d.weight", path, 3)
    inner = _shape(tensors, layer + "out_proj.weight", path, 2)[1]
    groups = known.get("ngroups", 1)
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f"{path}: ngroups must be a whole number of at least 1, got {groups!r}")
    layers = [int(m[1]) for m in (re.match(r"backbone\.layers\.(\d+)\.", name) for name in tensors) if m]
    sizes = dict(
        d_model=d_model, n_layer=max(layers) + 1, vocab_size=vocab, d_state=(conv_dim - inner) // (2 * groups),
        d_conv=d_conv, expand=inner // d_model, headdim=inner // heads, ngroups=groups,
    )  # fmt: skip
    try:
        return MambaConfig(**{**sizes, **known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _shape(tensors: Mapping[str, Tensor], name: str, path: Path, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{path} is no checkpoint of this model: it lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{path}: {name} has shape {shape}, expected {rank} sizes of at least 1")
    return shape


# ---- Mamba-2 language models ----


def _language_model(config: MambaConfig, found: dict[str, Tensor], path: Path) -> MambaLM:
    tensors = dict(found)
    _drop_tied(tensors, "lm_head.weight", "backbone.embedding.weight", path)
    return _filled(MambaLM, config, tensors, path)


def _config_of_mamba_ssm(values: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> MambaConfig:
    ssm = values["ssm_cfg"] if isinstance(values["ssm_cfg"], Mapping) else {}
    unfit = {"layer": ssm.get("layer", "Mamba1") != "Mamba2", "rms_norm": not values.get("rms_norm", True)}
    unfit |= {
        "attn_layer_idx": bool(values.get("attn_layer_idx")),
        "d_intermediate": bool(values.get("d_intermediate")),
    }
    _refuse(unfit, {**values, **ssm}, path)
    known = {name: ssm[name] for name in ("ngroups", "chunk_size") if name in ssm}
    return _backbone_config(tensors, path, **known)


def _config_of_transformers(values: Mapping[str, Any], path: Path) -> MambaConfig:
    unfit = {
        "model_type": values.get("model_type") != "mamba2",
        "use_bias": values.get("use_bias", False),
        "use_conv_bias": not values.get("use_conv_bias", True),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "time_step_limit": not _unlimited(values.get("time_step_limit", (0.0, float("inf")))),
    }
    _refuse(unfit, values, path)
    names = dict(
        d_model="hidden_size", n_layer="num_hidden_layers", vocab_size="vocab_size", d_state="state_size",
        d_conv="conv_kernel", expand="expand", headdim="head_dim", ngroups="n_groups", chunk_size="chunk_size",
        norm_eps="layer_norm_epsilon",
    )  # fmt: skip
    missing = [theirs for theirs in names.values() if theirs not in values]
    if missing:
        raise CheckpointError(f"{path / CONFIG} lacks {', '.join(missing)}")
    try:
        return MambaConfig(**{ours: values[theirs] for ours, theirs in names.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error


def _unlimited(limit: Any) -> bool:
    """Whether steps may lie anywhere from 0 to infinity, which JSON writes in several ways."""
    infinite = (float("inf"), "inf", "Infinity", {"__float__": "Infinity"})
    return isinstance(limit, (list, tuple)) and len(limit) == 2 and limit[0] == 0 and limit[1] in infinite


def _refuse(unfit: Mapping[str, bool], values: Mapping[str, Any], path: Path) -> None:
    found = [f"{name} = {values.get(name)!r}" for name, wrong in unfit.items() if wrong]
    if found:
        raise CheckpointError(f"{path / CONFIG} describes another architecture than Mamba-2's: {', '.join(found)}")


# ---- both ----


def _filled(kind: type[nn.Module], config: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    with torch.device("meta"):
        model = kind(config)
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    check_dtypes({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}, path)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()}, assign=True)
    return model.requires_grad_(True).eval()


def _config_of(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must be an object, got {type(values).__name__}")
    return values


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """A folder's weights: safetensors in any number of shards, else its pickle."""
    if list(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for path in weight_files(folder):
            try:
                tensors |= load_file(path)
            except FileNotFoundError:
                raise CheckpointError(absent(path)) from None
            except SafetensorError as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
        return tensors
    pickled = folder / "pytorch_model.bin"
    if not pickled.exists():
        raise CheckpointError(f"{folder} has neither safetensors nor {pickled.name}")
    return read_pickle(pickled)
