"""The demo's sizes and schedule, chosen on the validation part of the training split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MambaConfig, OmniMambaConfig
from ..image_tokenizer import PatchTokenizer
from ..sampling import Sampling
from ..text_tokenizer import SPECIAL, TextTokenizer
from .data import DRAWING, IMAGES, TEXT, UNDERSTANDING
from .words import captions

DATA, START, MERGED = "data", "start", "stage1"
"""Folders besides those of the runs: the lessons, the model to begin with, the two halves of stage 1 as one."""


def _worth_a_process(run: dict[str, Any]) -> bool:
    """Whether a run has two tasks, and steps enough to make up for the start of a second process."""
    return "t2i" in run and "mmu" in run and run["steps"] >= 100


@dataclass(frozen=True)
class Settings:
    d_model: int = 64
    n_layer: int = 2
    d_state: int = 16
    headdim: int = 32
    mlp_ratio: int = 2
    lora_rank: int = 8
    dropout: float = 0.0
    patch: int = 2
    codes: int = 64
    copies: int = 12
    """Of every scan, each varied in its own way."""
    noise: float = 0.05
    """Standard deviation of the noise on training pixels, whose range is 1."""
    batch: int = 32
    """Of each task."""
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    caption_dropout: float = 0.1
    """The share of captions left empty, which teaches the null prompt of guidance."""
    stage0: int = 150
    stage1: int = 100
    """Steps of each half."""
    stage2: int = 3400
    staged: bool = True
    """False is the control: as many steps, everything learning both tasks from the start."""
    drawings: int = 1000
    """Drawings asked for when scoring, spread over digits and phrasings."""
    temperature: float = 0.8
    guidance: float = 2.0

    @property
    def schedule(self) -> str:
        """What metrics.json calls the stages."""
        return "staged" if self.staged else "one stage (control)"

    def sampling(self, seed: int) -> Sampling:
        return Sampling(self.temperature, seed=seed)

    def model(self, words: TextTokenizer, pixels: PatchTokenizer) -> OmniMambaConfig:
        """The model's config between these two tokenizers."""
        slots = max(len(words.encode(said)) for digit in range(10) for said in captions(digit))
        return OmniMambaConfig(
            backbone=MambaConfig(
                d_model=self.d_model, n_layer=self.n_layer, vocab_size=words.vocab_size,
                d_state=self.d_state, headdim=self.headdim, chunk_size=32, dropout=self.dropout,
            ),
            tokens=SPECIAL, image_vocab_size=self.codes, image_tokens=pixels.tokens, text_slots=slots,
            image_features=pixels.tokens, feature_dim=pixels.feature_dim, mmu_positions=pixels.tokens + 24,
            mlp_ratio=self.mlp_ratio, lora_rank=self.lora_rank, lora_alpha=4.0 * self.lora_rank,
        )  # fmt: skip

    def runs(self, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
        """What the trainer is told of each run, by name and in order; everything lies in ``folder``."""
        text = {"files": [str(folder / DATA / TEXT)], "batch": self.batch, "length": 16}
        t2i = {"files": [str(folder / DATA / DRAWING)], "batch": self.batch, "caption_dropout": self.caption_dropout}
        mmu = {"files": [str(folder / DATA / UNDERSTANDING)], "images": str(folder / DATA / IMAGES)}
        mmu |= {"batch": self.batch, "text_length": 20}
        start, base, merged = str(folder / START), str(folder / "stage0" / "model"), str(folder / MERGED)
        steps = self.stage0 + 2 * self.stage1 + self.stage2
        staged = {
            "stage0": dict(stage="base", steps=self.stage0, model=start, text=text, t2i=t2i | {"caption_dropout": 1.0}),
            "stage1-mmu": dict(stage="mmu", steps=self.stage1, model=base, mmu=mmu),
            "stage1-t2i": dict(stage="t2i", steps=self.stage1, model=base, t2i=t2i),
            "stage2": dict(stage="joint", steps=self.stage2, model=merged, t2i=t2i, mmu=mmu),
        }
        control = {"one-stage": dict(stage="joint", steps=steps, model=start, t2i=t2i, mmu=mmu)}
        shared = dict(
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, warmup=50, seed=seed,
            device="cpu", threads=1, save_every=500, keep=1, tensorboard=False,
            prefetch=0,  # pictures this small are soon read, and two processes leave no core to a thread beside them
        )  # fmt: skip
        return {
            name: {"out": str(folder / name), **values, **shared, "side_by_side": _worth_a_process(values)}
            for name, values in (staged if self.staged else control).items()
        }
