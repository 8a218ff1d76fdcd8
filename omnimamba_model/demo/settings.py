"""The demo's sizes and schedule, chosen on the validation part of the training split."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MambaConfig, OmniMambaConfig
from ..image_tokenizer import PatchTokenizer
from ..text_tokenizer import SPECIAL, WordTokenizer
from ..training import Phase

_ALIKE = dict(learning_rate=4e-3, weight_decay=0.3)
PHASES = (
    Phase("stage 0: language and image tokens", "base", ("sentences", "images"), steps=200, **_ALIKE),
    Phase("stage 1: understanding", "mmu", ("mmu",), steps=200, **_ALIKE),
    Phase("stage 1: drawing", "t2i", ("t2i",), steps=200, **_ALIKE),
    Phase("stage 2: both", "joint", ("t2i", "mmu"), steps=3400, **_ALIKE),
)
"""Stage 0 stands in for the paper's pre-trained Mamba-2; stages 1 and 2 are the paper's."""

ONE_STAGE = (Phase("one stage: both", "joint", ("t2i", "mmu"), steps=sum(p.steps for p in PHASES), **_ALIKE),)
"""The control: as many steps, everything learning both tasks from the start."""


@dataclass(frozen=True)
class Settings:
    d_model: int = 64
    n_layer: int = 2
    d_state: int = 16
    headdim: int = 32
    mlp_ratio: int = 2
    lora_rank: int = 8
    dropout: float = 0.1
    patch: int = 2
    codes: int = 64
    batch: int = 32
    noise: float = 0.05
    """Standard deviation of the noise on training pixels, whose range is 1."""
    phases: tuple[Phase, ...] = PHASES
    drawings: int = 200
    """Drawings asked for when scoring, spread over digits and phrasings."""
    temperature: float = 0.7

    @property
    def schedule(self) -> str:
        """What metrics.json calls the phases."""
        return "one stage (control)" if self.phases == ONE_STAGE else "staged"

    def model(self, words: WordTokenizer, pixels: PatchTokenizer, text_slots: int) -> OmniMambaConfig:
        """The model's config between these two tokenizers."""
        return OmniMambaConfig(
            backbone=MambaConfig(
                d_model=self.d_model, n_layer=self.n_layer, vocab_size=words.vocab_size,
                d_state=self.d_state, headdim=self.headdim, chunk_size=32, dropout=self.dropout,
            ),
            tokens=SPECIAL, image_vocab_size=self.codes, image_tokens=pixels.tokens, text_slots=text_slots,
            image_features=pixels.tokens, feature_dim=pixels.feature_dim, mmu_positions=pixels.tokens + 16,
            mlp_ratio=self.mlp_ratio, lora_rank=self.lora_rank, lora_alpha=4.0 * self.lora_rank,
        )  # fmt: skip
