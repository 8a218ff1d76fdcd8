"""What the operations are timed on, and by whom: ours first, then torch, transformers' fallback and other packages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import conv, generation, lora, mixer, models, norm, prefill, scan, update
from .common import Parts, Problem

__all__ = ["OPERATIONS", "Problem"]

OPERATIONS: dict[str, Callable[[torch.device], Parts]] = {
    "causal_conv1d": conv.problems,
    "ssd_scan": scan.problems,
    "state_update": update.problems,
    "gated_norm": norm.problems,
    "lora_linear": lora.problems,
    "mamba_mixer": mixer.problems,
    "models": models.problems,
    "prefill": prefill.problems,
    "generation": generation.problems,
}
