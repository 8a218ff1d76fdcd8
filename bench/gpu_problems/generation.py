"""Whole generations on one device, in two protocols, at the lengths of the paper's Figure 1, batch 1.

On a GPU the 1.3B shape in bfloat16, on a CPU a tiny one at the shortest length. Three steps of each are timed and
summed (bench.integrated): ours and the Transformer with a static key-value cache as CUDA graphs, which is the fair
protocol; the one without a cache, which is the paper's, as it comes. A contender's memory is its own: weights, state
or cache, step.
"""

from __future__ import annotations

import functools
from functools import partial

import torch

from .. import inputs
from ..generators import filled
from ..integrated import POSITIONS, positions
from ..measure import relative_error
from ..published import FIGURE_1, MEMORY_AT, MEMORY_CASE, MEMORY_GROUP, WHOLE, named, whole_case
from . import models
from .common import Parts, Problem, Steps, dtype_of, sizes

NOTE = f"{POSITIONS} steps measured, summed by Gauss and Legendre's rule"


def problems(device: torch.device) -> Parts:
    parts = [
        partial(_generation, device, WHOLE, whole_case(total), total, positions(total))
        for total in sizes(device, tuple(FIGURE_1), (min(FIGURE_1),))
    ]
    held = partial(_generation, device, MEMORY_GROUP, MEMORY_CASE, MEMORY_AT, [(MEMORY_AT - 1, 1.0)])
    return Parts([*parts, partial(held, everyone=device.type == "cuda")])


def _generation(
    device: torch.device, group: str, case: str, total: int, steps: list[tuple[int, float]], everyone: bool = False
) -> Problem:
    """``everyone``: without a cache too, however long."""
    who = named(models.size(device))
    contenders = {who.ours: lambda: _ours(device, steps), who.cached: lambda: _cached(device, total, steps)}
    if device.type == "cuda":
        contenders[models.MAMBA_SSM] = lambda: _theirs(device, steps)
    if everyone or total <= models.LONGEST_UNCACHED:
        contenders[who.uncached] = lambda: _uncached(device, steps)
    needed = {kind: _summed(device, kind, steps) for kind in (models.OURS, models.CACHED, models.UNCACHED)}
    last = steps[-1][0]
    errors = {
        who.cached: functools.partial(models.cached_error, device, total, last),
        who.uncached: functools.partial(models.uncached_error, device, last),
        models.MAMBA_SSM: functools.partial(models.rounded_error, device),
    }
    return Problem(
        group, case, *needed[models.OURS], contenders,
        lambda found: relative_error(found, models.exact_step(device)), 2 * inputs.BOUND[dtype_of(device)], errors,
        {who.cached: needed[models.CACHED], who.uncached: needed[models.UNCACHED]},
        tokens=sum(count for _, count in steps), note=NOTE if len(steps) > 1 else "",
        ours=(who.ours,),
    )  # fmt: skip


def _summed(device: torch.device, kind: str, steps: list[tuple[int, float]]) -> tuple[float, float]:
    """Bytes and FLOPs of all steps."""
    each = [(count, models.needs(device, at)[kind]) for at, count in steps]
    return sum(count * moved for count, (moved, _) in each), sum(count * flops for count, (_, flops) in each)


def _ours(device: torch.device, steps: list[tuple[int, float]]) -> Steps:
    model = models.language(device)
    return Steps([(count, models.step_of_ours(device, model, at)) for at, count in steps], replayed=True)


def _theirs(device: torch.device, steps: list[tuple[int, float]]) -> Steps:
    """mamba_ssm's generation, whose step is a CUDA graph too."""
    model = models.mamba_ssm(device)
    return Steps([(count, models.step_of_theirs(device, model, at)) for at, count in steps], replayed=True)


def _cached(device: torch.device, total: int, steps: list[tuple[int, float]]) -> Steps:
    """One cache of all positions serves every step."""
    model = models.transformer(device)
    cache = filled(model.new_cache(1, total))
    parts = [(count, models.cached_step(device, model, cache, at)) for at, count in steps]
    return Steps(parts, replayed=True)


def _uncached(device: torch.device, steps: list[tuple[int, float]]) -> Steps:
    model = models.transformer(device)
    return Steps([(count, models.uncached_step(device, model, at)) for at, count in steps])
