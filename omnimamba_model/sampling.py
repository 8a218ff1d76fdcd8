"""How a token is picked from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
"""What logits are cut to where arguments take them further: infinities have no difference."""
COLDEST = torch.finfo(torch.float32).tiny
"""The smallest normal number of fp32: dividing by less overflows, even where the dividend is 0."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0, or too small for fp32, or ``top_k`` 1 takes the likeliest.

    ``repetition_penalty`` r divides the positive logits of tokens that a row has drawn by r and multiplies the negative
    ones (Keskar et al. 2019); then, after temperature, ``top_k`` keeps the k likeliest (0: all), ``min_p`` those at
    least that share of the likeliest as likely, ``top_p`` the fewest whose probabilities reach p together.
    ``seed`` fixes the draws; None takes them from torch's global generator.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a whole number of 64 bits, got {self.seed!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, and finite, got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number, 0 (all) or more, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST or self.top_k == 1

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


GREEDY = Sampling(temperature=0.0)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits (b, vocabulary) to what ``sampling`` draws from, in fp32, each row summing to 1."""
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0: nothing overflows
    logits = logits / min(max(sampling.temperature, COLDEST), LARGEST)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.min_p > 0:  # the likeliest has logit 0
        logits = logits.masked_fill(logits < math.log(sampling.min_p), float("-inf"))
    chances = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = chances.sort(dim=-1, descending=True)
        spare = ordered.cumsum(-1) - ordered >= sampling.top_p
        spare[:, 0] = False  # p may be 0 in fp32
        chances = torch.zeros_like(chances).scatter(-1, places, ordered.masked_fill(spare, 0.0))
        chances /= chances.sum(-1, keepdim=True)
    return chances


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row: logits (b, vocabulary) to ids (b,).

    RuntimeError where a row has NaN or infinity, on a CPU: elsewhere asking would wait for the device.
    """
    if logits.device.type == "cpu" and not bool(logits.amax(-1).isfinite().all()):
        raise RuntimeError(
            "logits are not finite: the weights or what the model was shown hold NaN or infinity, or its dtype is too "
            "narrow for them"
        )
    if sampling.greedy:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


def penalised(logits: Tensor, drawn: Tensor, penalty: float) -> Tensor:
    """``logits`` (b, vocabulary) after the repetition penalty, ``drawn`` (b, vocabulary) marking a row's tokens."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-LARGEST, LARGEST)
    return torch.where(drawn, changed, logits)
