"""OmniMamba: one Mamba-2 backbone that draws what words ask for and answers questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MMU, T2I, OmniMambaConfig
from .embeddings import OmniBackbone, Projector
from .hub import Pretrained

IGNORE = -100
"""The label of a position that carries no loss."""

_DRAWING = ("backbone.embedding.", "backbone.img_embeddings.", "backbone.caption_embed.", "backbone.pos_embed")
STAGES = ("base", "mmu", "t2i", "joint")
"""What ``train_only`` knows; "mmu" and "t2i" are the paper's first stage, "joint" its second."""


class Prediction(NamedTuple):
    """``logits`` (b, l, vocabulary) for each target of a sequence, and their mean cross-entropy.

    ``loss`` is None where no targets were given.
    """

    logits: Tensor
    loss: Tensor | None


class OmniMamba(Pretrained, nn.Module):
    """The model of arXiv 2503.08686. A task picks the embedding path, the head and the adapters.

    Drawing (T2I): ``[t2i][sot]`` caption, padded on its left, ``[eot][soi]`` image tokens ``[eoi]``.
    Understanding (MMU): ``[mmu][soi]`` image features ``[eoi][sot]`` text. Plain text: the base alone.
    Both heads are tied to the raw token tables, so they own no parameters.
    """

    def __init__(self, config: OmniMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = OmniBackbone(config)
        width = config.backbone.d_model
        self.projector = Projector(config.feature_dim, config.mlp_ratio * config.feature_dim, width)

    def forward(self, task: str, **batch: Tensor) -> Prediction:
        """One task's training pass: ``task`` is "text", "t2i" or "mmu", ``batch`` that method's arguments."""
        passes = {"text": self.text, "t2i": self.t2i, "mmu": self.mmu}
        if task not in passes:
            raise ValueError(f"task must be one of {', '.join(passes)}, got {task!r}")
        return passes[task](**batch)

    def text(self, ids: Tensor, labels: Tensor | None = None) -> Prediction:
        """Plain text (b, l): logits for the token after each; ``labels`` (b, l) are those tokens."""
        logits = self.text_head(self.backbone(self.backbone.embedding(ids)))
        return Prediction(logits, None if labels is None else _cross_entropy(logits, labels))

    def t2i(self, caption: Tensor, image: Tensor) -> Prediction:
        """Captions (b, text_slots), padded on the left, and image tokens (b, image_tokens), which are the targets.

        The last image token and ``[eoi]`` predict nothing and come last, so they are not computed.
        """
        cfg = self.config
        _expect("image", image, (caption.shape[0], cfg.image_tokens))
        opening = self.t2i_opening(caption)
        drawn = self.backbone.embed_image(image[:, :-1], cfg.t2i_prompt)
        hidden = self.backbone(torch.cat([opening, drawn], dim=1), T2I)
        logits = self.image_head(hidden[:, cfg.t2i_prompt - 1 :])
        return Prediction(logits, _cross_entropy(logits, image))

    def mmu(self, features: Tensor, text: Tensor, labels: Tensor | None = None) -> Prediction:
        """Features (b, image_features, feature_dim) and text (b, l), padded on the right.

        ``labels`` (b, l) default to the text itself without its padding; put -100 where a token is
        not to be learned (the question, say). The last text token predicts nothing and is not computed.
        """
        opening = self.mmu_opening(features)
        said = self.backbone.embed_understanding(self.backbone.embedding(text[:, :-1]), opening.shape[1])
        hidden = self.backbone(torch.cat([opening, said], dim=1), MMU)
        logits = self.text_head(hidden[:, opening.shape[1] - 1 :])
        if labels is None:
            labels = text.masked_fill(text == self.config.tokens.pad, IGNORE)
        return Prediction(logits, _cross_entropy(logits, labels))

    def t2i_opening(self, caption: Tensor) -> Tensor:
        """``[t2i][sot]`` caption ``[eot][soi]`` embedded: (b, t2i_prompt, d_model)."""
        ids = self.config.tokens
        _expect("caption", caption, (caption.shape[0], self.config.text_slots))
        return self.backbone.embed_caption(
            torch.cat([_frame(caption, ids.t2i, ids.sot), caption, _frame(caption, ids.eot, ids.soi)], dim=1)
        )

    def mmu_opening(self, features: Tensor) -> Tensor:
        """``[mmu][soi]`` projected features ``[eoi][sot]``: (b, image_features + 4, d_model)."""
        cfg, ids = self.config, self.config.tokens
        _expect("features", features, (features.shape[0], cfg.image_features, cfg.feature_dim))
        before = self.backbone.embedding(_frame(features, ids.mmu, ids.soi))
        after = self.backbone.embedding(_frame(features, ids.eoi, ids.sot))
        seen = self.projector(features.to(self.backbone.dtype))
        return self.backbone.embed_understanding(torch.cat([before, seen, after], dim=1), 0)

    def text_head(self, hidden: Tensor) -> Tensor:
        return self.backbone.embedding.head(hidden)

    def image_head(self, hidden: Tensor) -> Tensor:
        return self.backbone.img_embeddings.word_embeddings.head(hidden)

    def pad_captions(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Lists of token ids to (b, text_slots), padded on the left; of a longer caption the beginning is kept."""
        slots, pad = self.config.text_slots, self.config.tokens.pad
        rows = [[pad] * (slots - len(ids)) + list(ids[:slots]) for ids in captions]
        return torch.tensor(rows, dtype=torch.long, device=self.backbone.pos_embed.device)

    def fold(self) -> None:
        """For drawing: look up what image MLP and caption_embed make of every token (``OmniBackbone.fold``), until a
        pass with gradients, ``train``, or a weight changes."""
        self.backbone.fold()

    def merge(self, task: int) -> None:
        """For one task's latency: add its adapters (MMU or T2I) to the weights, in place; the model then serves it
        alone, with the same outputs up to rounding, and can no longer be saved. ValueError where one was merged before.
        """
        for layer in self.backbone.layers:
            layer.mixer.in_proj.merge(task)

    @property
    def merged(self) -> int | None:
        """The task whose adapters are in the weights."""
        return self.backbone.layers[0].mixer.in_proj.merged

    def train_only(self, stage: str) -> list[str]:
        """Let gradients reach one stage's parameters alone; returns their names.

        base: all but adapters and projector, the stand-in for a pre-trained backbone. mmu: projector
        and mmu adapters. t2i: both token tables, the image MLP, caption_embed, drawing positions and
        t2i adapters. joint: everything.
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        trained = []
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained_in(stage, name))
            if parameter.requires_grad:
                trained.append(name)
        return trained


def trained_in(stage: str, name: str) -> bool:
    """Whether ``stage`` trains the parameter of that name."""
    projector, adapter = name.startswith("projector."), "_lora_" in name
    if stage == "joint":
        return True
    if stage == "base":
        return not (projector or adapter)
    if stage == "mmu":
        return projector or ".mmu_lora_" in name
    return ".t2i_lora_" in name or name.startswith(_DRAWING)


def _frame(like: Tensor, *ids: int) -> Tensor:
    """The frame tokens ``ids`` for each row of ``like``: (b, len(ids))."""
    return torch.tensor(ids, device=like.device).expand(like.shape[0], -1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    _expect("labels", labels, tuple(logits.shape[:2]))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
