"""How drawings and answers are scored: a classifier of real scans, and measures of mere repetition."""

from __future__ import annotations

import torch
from torch import Tensor

from .digits import Scans


class Judge:
    """An RBF support vector machine fitted to real training scans only."""

    def __init__(self, training: Scans) -> None:
        from sklearn.svm import SVC

        self._machine = SVC(C=10.0, gamma="scale").fit(training.images.flatten(1).numpy(), training.labels.numpy())

    def read(self, images: Tensor) -> Tensor:
        """The digit it sees in each image (n, height, width): (n,)."""
        return torch.from_numpy(self._machine.predict(images.flatten(1).numpy()))

    def accuracy(self, images: Tensor, digits: Tensor) -> float:
        return (self.read(images) == digits).double().mean().item()


def copied_fraction(tokens: Tensor, training: Tensor) -> float:
    """The share of images (n, tokens) that are, token for token, one of ``training`` (m, tokens)."""
    seen = {tuple(row) for row in training.tolist()}
    return sum(tuple(row) in seen for row in tokens.tolist()) / len(tokens)


def nearest_distance(images: Tensor, training: Tensor) -> float:
    """The mean Euclidean distance of images to the nearest of ``training``, both (n, height, width)."""
    return torch.cdist(images.flatten(1).double(), training.flatten(1).double()).amin(1).mean().item()


def nearest_ratio(drawn: Tensor, scored: Tensor, training: Tensor) -> float:
    """How near drawings come to a training scan, against how near other real scans do: 1 is as a new scan would."""
    return nearest_distance(drawn, training) / nearest_distance(scored, training)
