"""The sizes of other projects' checkpoints: from their tensors' shapes, or from config.json.

What a config asks for that changes the maths but no shape has one supported value; any other is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import MambaConfig, OmniMambaConfig, SpecialTokens
from .weights import CONFIG, CheckpointError

Supported = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Options by name: the supported value in words, and whether a value is it."""


def _unlimited(limit: Any) -> bool:
    """Whether steps may lie anywhere from 0 to infinity, which JSON writes in several ways."""
    infinite = (float("inf"), "inf", "Infinity", {"__float__": "Infinity"})
    return isinstance(limit, (list, tuple)) and len(limit) == 2 and limit[0] == 0 and limit[1] in infinite


_NONE = ("none", lambda value: not value)
_OFF = ("false", lambda value: not value)
_ON = ("true", lambda value: value is True)
_SILU = ("silu", lambda value: value in ("silu", "swish"))
_ANY_STEP = ("0 to infinity", _unlimited)
_MODEL: Supported = {"rms_norm": _ON, "attn_layer_idx": _NONE, "d_intermediate": _NONE}
"""Of mamba_ssm's config.json."""
_MIXER: Supported = {
    "layer": ("Mamba2", lambda value: value == "Mamba2"),
    "norm_before_gate": _OFF, "rmsnorm": _ON, "D_has_hdim": _OFF, "dt_limit": _ANY_STEP, "bias": _OFF,
    "conv_bias": _ON, "activation": _SILU,
}  # fmt: skip
"""Of its ssm_cfg; what is left out there has the supported value, but for the layer."""
_SIZES = ("d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "chunk_size")
_ELSEWHERE = (
    "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path", "process_group",
    "sequence_parallel", "device", "dtype",
)  # fmt: skip
"""What says how weights begin or where they are computed."""
_TRANSFORMERS: Supported = {
    "model_type": ("mamba2", lambda value: value == "mamba2"),
    "use_bias": _OFF, "use_conv_bias": _ON, "hidden_act": _SILU, "rms_norm": _ON, "time_step_limit": _ANY_STEP,
}  # fmt: skip
_LAYER = "backbone.layers.0.mixer."
_BACKBONE = {
    "backbone.embedding.weight": 2, _LAYER + "A_log": 1, _LAYER + "conv1d.weight": 3, _LAYER + "out_proj.weight": 2,
}  # fmt: skip
"""The tensors that tell a Mamba-2's sizes, and how many sizes each has."""
_OMNIMAMBA = {
    **_BACKBONE, _LAYER + "in_proj.t2i_lora_A0.weight": 2, "backbone.img_embeddings.word_embeddings.weight": 2,
    "projector.projector.0.weight": 2, "backbone.pos_embed": 3, "backbone.mmu_pos_embed": 3,
}  # fmt: skip


def official_config(tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None, path: Path) -> OmniMambaConfig:
    """Every size from the shapes; what no shape tells (tokens an image, special ids) is the published model's.

    ``values`` are those of a config.json beside the file, where there is one: this package's or mamba_ssm's.
    """
    values = dict(values or {})
    if "backbone" in values and values.keys() <= {"model_type", *(f.name for f in dataclasses.fields(OmniMambaConfig))}:
        return _made(OmniMambaConfig.from_dict, {k: v for k, v in values.items() if k != "model_type"}, path)
    shapes = _shapes(tensors, _OMNIMAMBA, path)
    known = _known(values, path.parent) if "ssm_cfg" in values else {}
    backbone = _backbone_config(tensors, path, **known)
    hidden, feature_dim = shapes["projector.projector.0.weight"]
    sizes = dict(
        backbone=backbone, tokens=SpecialTokens(),
        image_vocab_size=shapes["backbone.img_embeddings.word_embeddings.weight"][0],
        text_slots=shapes["backbone.pos_embed"][1] - 5 - OmniMambaConfig().image_tokens, feature_dim=feature_dim,
        mmu_positions=shapes["backbone.mmu_pos_embed"][1], mlp_ratio=hidden // feature_dim,
        lora_rank=shapes[_LAYER + "in_proj.t2i_lora_A0.weight"][0],
    )  # fmt: skip
    return _made(lambda given: OmniMambaConfig(**given), sizes, path)


def _backbone_config(tensors: Mapping[str, Tensor], path: Path, **known: Any) -> MambaConfig:
    """A Mamba-2's sizes from its tensors; one group unless ``known`` says otherwise."""
    (vocab, d_model), (heads,), (conv_dim, _, d_conv), (_, inner) = _shapes(tensors, _BACKBONE, path).values()
    groups = known.get("ngroups", 1)
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f"{path}: ngroups must be a whole number of at least 1, got {groups!r}")
    layers = [int(m[1]) for m in (re.match(r"backbone\.layers\.(\d+)\.", name) for name in tensors) if m]
    sizes = dict(
        d_model=d_model, n_layer=max(layers) + 1, vocab_size=vocab, d_state=(conv_dim - inner) // (2 * groups),
        d_conv=d_conv, expand=inner // d_model, headdim=inner // heads, ngroups=groups,
    )  # fmt: skip
    stored = {**sizes, "d_ssm": inner}
    unlike = [
        f"{name} = {known[name]!r}, but the tensors have {stored[name]}"
        for name in stored
        if name in known and known[name] != stored[name]
    ]
    if unlike:
        raise CheckpointError(f"{path}: its config says {'; '.join(unlike)}")
    chunk = {name: known[name] for name in ("chunk_size",) if name in known}
    return _made(lambda given: MambaConfig(**given), {**sizes, **chunk}, path)


def _shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, int], path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the ``wanted`` tensors, in their order; CheckpointError names all that are missing or do not have
    as many sizes as wanted, each at least 1."""
    shapes = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
    missing = [name for name in wanted if name not in shapes]
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    problems += [
        f"{name} has shape {shape}, expected {wanted[name]} sizes of at least 1"
        for name, shape in shapes.items()
        if len(shape) != wanted[name] or 0 in shape
    ]
    if problems:
        raise CheckpointError(f"{path} is no checkpoint of this model: {'; '.join(problems)}")
    return shapes


def mamba_ssm_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> MambaConfig:
    return _backbone_config(tensors, path, **_known(values, path))


def _known(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What mamba_ssm's config.json says of a Mamba-2's sizes; CheckpointError where it asks for other maths."""
    ssm = values["ssm_cfg"] if isinstance(values["ssm_cfg"], Mapping) else {}
    problems = _unfit(_MODEL, values) + _unfit(_MIXER, {"layer": "Mamba1", **ssm}, "ssm_cfg.")
    known = {name: values[name] for name in ("d_model", "n_layer") if name in values}
    known |= {name: ssm[name] for name in _SIZES if name in ssm and (name, ssm[name]) != ("d_ssm", None)}
    names = {*_MIXER, *_SIZES, *_ELSEWHERE}
    problems += [f"ssm_cfg.{name} = {ssm[name]!r} (unknown)" for name in ssm if name not in names]
    _refuse(problems, path)
    return known


def transformers_config(values: Mapping[str, Any], path: Path) -> MambaConfig:
    _refuse(_unfit(_TRANSFORMERS, {"model_type": None, **values}), path)
    names = dict(
        d_model="hidden_size", n_layer="num_hidden_layers", vocab_size="vocab_size", d_state="state_size",
        d_conv="conv_kernel", expand="expand", headdim="head_dim", ngroups="n_groups", chunk_size="chunk_size",
        norm_eps="layer_norm_epsilon",
    )  # fmt: skip
    missing = [theirs for theirs in names.values() if theirs not in values]
    if missing:
        raise CheckpointError(f"{path / CONFIG} lacks {', '.join(missing)}")
    return _made(lambda given: MambaConfig(**given), {ours: values[theirs] for ours, theirs in names.items()}, path)


def _made(kind: Callable[[dict[str, Any]], Any], values: dict[str, Any], path: Path) -> Any:
    try:
        return kind(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _unfit(supported: Supported, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{name} = {values[name]!r} (supported: {words})"
        for name, (words, fits) in supported.items()
        if name in values and not fits(values[name])
    ]


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        told = ", ".join(problems)
        raise CheckpointError(f"{path / CONFIG} describes another architecture than this package's Mamba-2: {told}")


def config_of(folder: Path) -> dict[str, Any] | None:
    """A folder's config.json, None where it has none; CheckpointError where that is no object."""
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
