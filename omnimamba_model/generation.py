"""Generation: the prompt goes in by one scan, then one step a token, on a state of constant size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import MambaBackbone, MambaLM
from .config import BASE, MMU, T2I
from .layers import Task
from .omnimamba import OmniMamba

COLDEST = torch.finfo(torch.float32).tiny
"""The smallest normal number of fp32: dividing by less overflows, even where the dividend is 0."""


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from logits.

    ``temperature`` 0, or too small for fp32, or ``top_k`` 1 takes the likeliest. ``top_k`` keeps the k
    likeliest (0: all); ``top_p`` then keeps the fewest whose probabilities, after temperature, reach p together.
    ``seed`` fixes the draws; None takes them from torch's global generator.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, and finite, got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number, 0 (all) or more, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

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
    logits = logits / max(sampling.temperature, COLDEST)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    chances = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = chances.sort(dim=-1, descending=True)
        spare = ordered.cumsum(-1) - ordered >= sampling.top_p
        chances = torch.zeros_like(chances).scatter(-1, places, ordered.masked_fill(spare, 0.0))
        chances /= chances.sum(-1, keepdim=True)
    return chances


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row: logits (b, vocabulary) to ids (b,)."""
    if sampling.greedy:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate_text(
    model: MambaLM | OmniMamba, ids: Tensor, steps: int, sampling: Sampling = GREEDY, stop: int | None = None
) -> Tensor:
    """Continue plain text ids (b, l), l at least 1, by at most ``steps`` tokens: (b, at most steps).

    A row that has drawn ``stop`` is filled with it; the loop ends when every row has.
    """
    _check_ids("ids", ids, model.backbone.config.vocab_size, least=1)
    embedding = model.backbone.embedding
    head = model.head if isinstance(model, MambaLM) else model.text_head
    return _decode(model.backbone, embedding(ids), BASE, head, lambda t, _: embedding(t), steps, sampling, stop)


@torch.inference_mode()
def draw(model: OmniMamba, caption: Tensor, sampling: Sampling = GREEDY, guidance: float = 1.0) -> Tensor:
    """Captions (b, text_slots), padded on the left, to image tokens (b, image_tokens).

    ``guidance`` g other than 1 draws from ``empty + g (asked - empty)``, logits of the caption and of
    an empty one (classifier-free guidance); it doubles the work, and needs a model trained on both.
    """
    cfg = model.config
    _check_ids("caption", caption, cfg.backbone.vocab_size, least=cfg.text_slots)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    rows = caption.shape[0]
    guided = guidance != 1.0
    if guided:
        caption = torch.cat([caption, torch.full_like(caption, cfg.tokens.pad)])

    def head(hidden: Tensor) -> Tensor:
        logits = model.image_head(hidden)
        return logits[rows:].lerp(logits[:rows], guidance) if guided else logits

    def embed(tokens: Tensor, position: int) -> Tensor:
        tokens = torch.cat([tokens, tokens]) if guided else tokens
        return model.backbone.embed_image(tokens[:, None], position)[:, 0]

    return _decode(model.backbone, model.t2i_opening(caption), T2I, head, embed, cfg.image_tokens, sampling, None)


@torch.inference_mode()
def answer(
    model: OmniMamba,
    features: Tensor,
    question: Tensor,
    steps: int,
    sampling: Sampling = GREEDY,
    stop: int | None = None,
) -> Tensor:
    """Image features (b, image_features, feature_dim) and question ids (b, l) to answer ids (b, at most steps).

    ``stop`` ends a row and defaults to the end-of-text token.
    """
    backbone = model.backbone
    _check_ids("question", question, backbone.config.vocab_size)
    if features.shape[:1] != question.shape[:1]:
        raise ValueError(f"features must have a row a question, {len(question)}, got shape {tuple(features.shape)}")

    def embed(ids: Tensor, position: int) -> Tensor:
        return backbone.embed_understanding(backbone.embedding(ids[:, None]), position)[:, 0]

    opening = model.mmu_opening(features)
    asked = backbone.embed_understanding(backbone.embedding(question), opening.shape[1])
    prompt = torch.cat([opening, asked], dim=1)
    stop = model.config.tokens.eos if stop is None else stop
    return _decode(backbone, prompt, MMU, model.text_head, embed, steps, sampling, stop)


def _check_ids(name: str, ids: Tensor, vocab_size: int, least: int = 0) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < least:
        raise ValueError(f"{name} must have shape (b, l), b at least 1, l at least {least}, got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name} must lie in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")


def _decode(
    backbone: MambaBackbone,
    prompt: Tensor,
    task: Task,
    head: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor, int], Tensor],
    steps: int,
    sampling: Sampling,
    stop: int | None,
) -> Tensor:
    """The one loop: tokens are kept, logits are not, so that memory does not grow by a vocabulary a token."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    state = backbone.new_state(prompt.shape[0])
    hidden = backbone.prefill(prompt, state, task)
    step = backbone.bind_step(state, task)
    generator = sampling.generator(prompt.device)
    logits = head(hidden)
    tokens = torch.empty(logits.shape[0], steps, dtype=torch.long, device=prompt.device)
    done = torch.zeros(logits.shape[0], dtype=torch.bool, device=prompt.device)
    for i in range(steps):
        token = sample(logits, sampling, generator)
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        tokens[:, i] = token
        if stop is not None and bool(done.all()):
            return tokens[:, : i + 1]
        if i + 1 < steps:
            logits = head(step(embed(token, state.position)))
    return tokens
