"""Generation in the three ways of the model: text, drawings, answers. The loop is engine.py's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import MambaLM
from .config import BASE, MMU, T2I
from .engine import Row, generate
from .omnimamba import OmniMamba
from .sampling import GREEDY, LARGEST, Sampling

Stop = int | Sequence[int] | None


@torch.inference_mode()
def generate_text(
    model: MambaLM | OmniMamba, ids: Tensor, steps: int, sampling: Sampling = GREEDY, stop: Stop = None
) -> Tensor:
    """Continue plain text ids (b, l), l at least 1, by at most ``steps`` tokens: (b, at most steps).

    A row ends with the first of its tokens that ``stop`` names and is filled up with it.
    """
    _check_ids("ids", ids, model.backbone.config.vocab_size, least=1)
    check_steps(steps)
    prompts = model.backbone.embedding(ids)
    return _square(generate(model, [Row(BASE, prompt, steps, _stops(stop)) for prompt in prompts], sampling))


@torch.inference_mode()
def draw(
    model: OmniMamba,
    caption: Tensor,
    sampling: Sampling = GREEDY,
    guidance: float = 1.0,
    copies: int = 1,
    exact: bool = False,
) -> Tensor:
    """Captions (b, text_slots), padded on the left, to image tokens (b copies, image_tokens).

    ``guidance`` g other than 1 draws from ``empty + g (asked - empty)``, logits of the caption and of an empty one
    (classifier-free guidance); it doubles the work, and needs a model trained on both. ``copies`` drawings of a caption
    share its prefill. ``exact`` keeps the padding out of the states, every token at its place; the official format,
    which models are trained in, has it there.
    """
    rows = drawing_rows(model, caption, guidance, copies, exact)
    return torch.stack(generate(model, rows, sampling))


@torch.inference_mode()
def answer(
    model: OmniMamba,
    features: Tensor,
    question: Tensor,
    steps: int,
    sampling: Sampling = GREEDY,
    stop: Stop = None,
) -> Tensor:
    """Image features (b, image_features, feature_dim) and question ids (b, l) to answer ids (b, at most steps).

    ``stop`` ends a row and defaults to the end-of-text token.
    """
    _check_ids("question", question, model.backbone.config.vocab_size)
    if features.shape[:1] != question.shape[:1]:
        raise ValueError(f"features must have a row a question, {len(question)}, got shape {tuple(features.shape)}")
    return _square(generate(model, answer_rows(model, features, list(question), steps, stop), sampling))


def drawing_rows(
    model: OmniMamba, caption: Tensor, guidance: float = 1.0, copies: int = 1, exact: bool = False
) -> list[Row]:
    """What ``engine.generate`` takes to draw captions (b, text_slots)."""
    cfg = model.config
    _check_ids("caption", caption, cfg.backbone.vocab_size, least=cfg.text_slots)
    if not abs(guidance) <= LARGEST:
        raise ValueError(f"guidance must be finite in fp32, got {guidance}")
    if type(copies) is not int or copies < 1:
        raise ValueError(f"copies must be a whole number of at least 1, got {copies!r}")
    null = None
    if guidance != 1.0:
        (null,) = _openings(model, torch.full_like(caption[:1], cfg.tokens.pad), exact)
    shared = dict(steps=cfg.image_tokens, null=null, guidance=guidance, copies=copies, place=cfg.t2i_prompt)
    return [Row(T2I, prompt, **shared) for prompt in _openings(model, caption, exact)]


def _openings(model: OmniMamba, caption: Tensor, exact: bool) -> list[Tensor]:
    """Embedded prompts of captions (b, text_slots), each (t2i_prompt, d_model), or without its padding."""
    openings = model.t2i_opening(caption)
    if not exact:
        return list(openings)
    said = F.pad(caption != model.config.tokens.pad, (2, 2), value=True)  # the frame tokens stay
    return [opening[kept] for opening, kept in zip(openings, said, strict=True)]


def answer_rows(
    model: OmniMamba, features: Tensor, questions: Sequence[Tensor], steps: int, stop: Stop = None
) -> list[Row]:
    """What ``engine.generate`` takes to answer questions, ids (l_i,) of any lengths, about features (b, ..)."""
    check_steps(steps)
    backbone = model.backbone
    stops = (model.config.tokens.eos,) if stop is None else _stops(stop)
    openings = model.mmu_opening(features)
    asked = [backbone.embed_understanding(backbone.embedding(ids[None]), openings.shape[1])[0] for ids in questions]
    return [
        Row(MMU, torch.cat([opening, question]), steps, stops)
        for opening, question in zip(openings, asked, strict=True)
    ]


def _square(rows: list[Tensor]) -> Tensor:
    """Rows as (b, the longest), each filled up with its last token. One alone is not copied: it may be long."""
    if len(rows) == 1:
        return rows[0][None]
    square = rows[0].new_empty(len(rows), max(map(len, rows)))
    for to, row in zip(square, rows, strict=True):
        to[: len(row)] = row
        to[len(row) :] = row[-1]
    return square


def _stops(stop: Stop) -> tuple[int, ...]:
    return () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)


def check_steps(steps: int) -> None:
    if type(steps) is not int:
        raise ValueError(f"steps must be a whole number, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")


def _check_ids(name: str, ids: Tensor, vocab_size: int, least: int = 0) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < least:
        raise ValueError(f"{name} must have shape (b, l), b at least 1, l at least {least}, got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name} must lie in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
