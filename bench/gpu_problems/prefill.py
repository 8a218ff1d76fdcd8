"""Whole language models taking in a prompt, batch 1: ours, mamba_ssm's and transformers' on the same weights, and a
Transformer of as many parameters on torch's attention.

On a GPU the 1.3B shape in bfloat16, on a CPU a tiny one. Each gives the logits after the last token; the three Mamba-2
keep their states to go on from, the Transformer keeps nothing, which is to its advantage.
"""

from __future__ import annotations

import functools
from functools import partial

import torch

from .. import inputs, peers
from ..measure import relative_error
from . import models
from .common import Call, Parts, Problem, backends, dtype_of, sizes

PREFILL, TRANSFORMER = "prefill", "Transformer"
LENGTHS, SMALL = (2048, 16384), (100,)
LONGEST_FALLBACK = 2048
"""Tokens up to which transformers' plain torch is timed: it holds every pair of positions of a chunk for all states."""


def problems(device: torch.device) -> Parts:
    return Parts(partial(_prefill, device, length) for length in sizes(device, LENGTHS, SMALL))


@torch.inference_mode()
def _ours(device: torch.device, length: int) -> Call:
    model, ids = models.language(device), models.prompt(device, length)
    backbone = model.backbone
    return torch.inference_mode()(lambda: model.head(backbone.prefill(backbone.embedding(ids), backbone.new_state(1))))


def _mamba_ssm(device: torch.device, length: int) -> Call:
    from mamba_ssm.utils.generation import InferenceParams

    model, ids = models.mamba_ssm(device), models.prompt(device, length)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        held = InferenceParams(max_seqlen=length, max_batch_size=1)
        return model(ids, inference_params=held, num_last_tokens=1).logits[:, 0]

    return call


def _transformers(device: torch.device, length: int) -> Call:
    model, ids = models.mamba2(device), models.prompt(device, length)
    return torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1])


def _transformer(device: torch.device, length: int) -> Call:
    return models.uncached_step(device, models.transformer(device), length - 1)


def _prefill(device: torch.device, length: int) -> Problem:
    own, ids = backends(device)[0], models.prompt(device, length)
    needed = models.pass_needs(device, length)
    contenders = {own: partial(_ours, device, length)}
    if device.type == "cuda":
        contenders[models.MAMBA_SSM] = partial(_mamba_ssm, device, length)
    if length <= LONGEST_FALLBACK:
        contenders[peers.label()] = partial(_transformers, device, length)
    contenders[TRANSFORMER] = partial(_transformer, device, length)
    exact = functools.cache(lambda rounded=False: models.exact_logits(device, ids, rounded=rounded))
    errors = {
        peers.label(): lambda found: relative_error(found, exact(True)),
        models.MAMBA_SSM: lambda found: relative_error(found, exact(True)),
        TRANSFORMER: partial(models.uncached_error, device, length - 1),
    }
    return Problem(
        PREFILL, models.case(device, f"{length} tokens"), *needed[models.OURS], contenders,
        lambda found: relative_error(found, exact()), 2 * inputs.BOUND[dtype_of(device)], errors,
        {TRANSFORMER: needed[models.UNCACHED]}, energy=length == sizes(device, LENGTHS, SMALL)[0], tokens=length,
        ours=(own,),
    )  # fmt: skip
