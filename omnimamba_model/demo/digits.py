"""scikit-learn's handwritten digits, split once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT, SPLIT_SEED = 450, 0
"""Scans held out of 1,797, and the seed of the split: the same in every run."""


@dataclass(frozen=True)
class Scans:
    """images (n, 8, 8), grey levels in [0, 1], white on black; labels (n,), the digits 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def split(validate: bool = False) -> tuple[Scans, Scans]:
    """Training scans and the scans to score: 1,347 and 450, every digit in proportion.

    With ``validate`` the 450 stay out of it: 1,010 training scans and 337 to score, both from the 1,347.
    Settings are chosen there.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    everything = Scans(torch.from_numpy(images).float().view(-1, 8, 8) / 16, torch.from_numpy(labels))
    training, scored = _divide(everything, HELD_OUT)
    return _divide(training, len(training) // 4 + 1) if validate else (training, scored)


def _divide(scans: Scans, held_out: int) -> tuple[Scans, Scans]:
    from sklearn.model_selection import train_test_split

    parts = train_test_split(range(len(scans)), test_size=held_out, random_state=SPLIT_SEED, stratify=scans.labels)
    kept, out = (Scans(scans.images[rows], scans.labels[rows]) for rows in map(torch.tensor, parts))
    return kept, out
