"""Every size of the model, checked once, when a config is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

TASKS = ("mmu", "t2i")
"""The tasks that own an adapter, in adapter order: a task's id is its place here."""
MMU, T2I = range(len(TASKS))
LARGEST, MOST_LAYERS = 2**31, 4096
"""Bounds of every number of a config and of its layers: a damaged file is refused before it asks for the memory."""
BASE = -1
"""The task id of plain text: the backbone without any adapter."""


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba-2 language model (Dao and Gu 2024, section 7).

    One layer projects ``d_model`` to z and x (``expand * d_model`` each), B and C
    (``ngroups * d_state`` each) and dt (one value a head), in this order.
    """

    d_model: int = 2048
    n_layer: int = 48
    vocab_size: int = 50288
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    norm_eps: float = 1e-5
    dropout: float = 0.0
    """On each layer's output, in training only; the published models use none."""

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("norm_eps",), rates=("dropout",))
        _check_most("n_layer", self.n_layer, MOST_LAYERS)
        _check_most("expand * d_model + 2 * ngroups * d_state", self.conv_dim)
        if not 2 <= self.d_conv <= 4:
            raise ValueError(f"d_conv must be 2, 3 or 4, got {self.d_conv}")
        if self.d_inner % self.headdim:
            raise ValueError(
                f"expand * d_model = {self.d_inner} must be a multiple of headdim, got headdim {self.headdim}"
            )
        if self.nheads % self.ngroups:
            raise ValueError(f"the number of heads, {self.nheads}, must be a multiple of ngroups, got {self.ngroups}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def in_proj_dim(self) -> int:
        return self.d_inner + self.conv_dim + self.nheads

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MambaConfig:
        """A published shape (``130m``, ``370m``, ``1.3b``) or ``tiny``, with ``changes`` on top."""
        return cls(**{**_lookup(MAMBA_PRESETS, name), **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MambaConfig:
        return cls(**_known_fields(cls, values))


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that frame a sequence; the defaults follow the GPT-NeoX tokenizer's 50277 entries."""

    eos: int = 0
    pad: int = 50277
    soi: int = 50278
    eoi: int = 50279
    sot: int = 50280
    eot: int = 50281
    t2i: int = 50282
    mmu: int = 50283

    def __post_init__(self) -> None:
        for name, i in dataclasses.asdict(self).items():
            if type(i) is not int:
                raise ValueError(f"SpecialTokens.{name} must be a whole number, got {i!r}")


@dataclass(frozen=True)
class OmniMambaConfig:
    """Sizes of OmniMamba (arXiv 2503.08686): the backbone, both vocabularies, adapters, sequence formats."""

    backbone: MambaConfig = field(default_factory=MambaConfig)
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    image_vocab_size: int = 16384
    image_tokens: int = 256
    """Tokens of one drawn image."""
    text_slots: int = 68
    """Places for the caption of a drawing; shorter captions are padded on the left."""
    image_features: int = 729
    """Feature vectors of one image to be understood."""
    feature_dim: int = 2176
    mmu_positions: int = 1500
    """Learned positions of an understanding sequence; later tokens share the last one."""
    mlp_ratio: int = 4
    """Widening of the image-token MLP and of the projector."""
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("lora_alpha",), rates=("lora_dropout",), others=("backbone", "tokens"))
        _check_most("mlp_ratio * feature_dim", self.mlp_ratio * self.feature_dim)
        _check_most("mlp_ratio * d_model", self.mlp_ratio * self.backbone.d_model)
        ids = dataclasses.asdict(self.tokens)
        outside = {name: i for name, i in ids.items() if not 0 <= i < self.backbone.vocab_size}
        if outside:
            raise ValueError(f"special tokens must lie in 0..{self.backbone.vocab_size - 1}, got {outside}")
        if len(set(ids.values())) != len(ids):
            raise ValueError(f"special tokens must have different ids, got {ids}")
        if self.mmu_positions < self.image_features + 4:
            raise ValueError(
                f"mmu_positions must cover the {self.image_features} features and 4 frame tokens, "
                f"got {self.mmu_positions}"
            )

    @property
    def t2i_prompt(self) -> int:
        """Positions before the first image token: two frame tokens on either side of the text slots."""
        return self.text_slots + 4

    @property
    def t2i_positions(self) -> int:
        return self.t2i_prompt + self.image_tokens + 1

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @classmethod
    def preset(cls, name: str, **changes: Any) -> OmniMambaConfig:
        """``1.3b`` (the published model), ``370m`` (its small variant) or ``tiny`` (for tests)."""
        sizes: dict[str, Any] = dict(_lookup(OMNIMAMBA_PRESETS, name))
        sizes["backbone"] = MambaConfig(**sizes["backbone"])
        return cls(**{**sizes, **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniMambaConfig:
        values = dict(_known_fields(cls, values))
        if "backbone" in values:
            values["backbone"] = MambaConfig.from_dict(values["backbone"])
        if "tokens" in values:
            values["tokens"] = SpecialTokens(**_known_fields(SpecialTokens, values["tokens"]))
        return cls(**values)


_TINY: dict[str, Any] = dict(
    d_model=32, n_layer=2, vocab_size=64, d_state=16, headdim=16, chunk_size=16
)  # fmt: skip
_SMALL: dict[str, Any] = dict(d_model=1024, n_layer=48)

MAMBA_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "130m": dict(d_model=768, n_layer=24),
    "370m": _SMALL,
    "1.3b": {},
}
OMNIMAMBA_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        backbone=_TINY,
        tokens=SpecialTokens(eos=0, pad=1, soi=2, eoi=3, sot=4, eot=5, t2i=6, mmu=7),
        image_vocab_size=24,
        image_tokens=9,
        text_slots=5,
        image_features=6,
        feature_dim=12,
        mmu_positions=40,
        lora_rank=4,
    ),
    "370m": dict(backbone=_SMALL),
    "1.3b": dict(backbone={}),
}


def _lookup(presets: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(presets)}")
    return presets[name]


def _known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} must be an object of fields, got {values!r}")
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return values


def _check_numbers(
    config: Any, positive: tuple[str, ...], rates: tuple[str, ...], others: tuple[str, ...] = ()
) -> None:
    """``positive`` are numbers above 0, ``rates`` lie in [0, 1); every field but ``others`` is a size."""
    for f in dataclasses.fields(config):
        name, value = f.name, getattr(config, f.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in others:
            continue
        if name in rates:
            fits, wanted = number and 0 <= value < 1, "must lie in [0, 1)"
        elif name in positive:
            fits, wanted = number and 0 < value <= LARGEST, f"must be a positive number of at most {LARGEST}"
        else:
            fits, wanted = type(value) is int and 1 <= value <= LARGEST, f"must be a whole number in 1..{LARGEST}"
        if not fits:
            raise ValueError(f"{type(config).__name__}.{name} {wanted}, got {value!r}")


def _check_most(what: str, value: int, most: int = LARGEST) -> None:
    if value > most:
        raise ValueError(f"{what} must be at most {most}, got {value}")
