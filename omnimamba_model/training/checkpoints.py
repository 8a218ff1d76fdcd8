"""A run at a step: model, optimizer, what was passed over. A folder is filled under a temporary name and renamed.

    OUT/checkpoints/step-00001000/   config.json, model*.safetensors    what `load` reads
                                     trainer.pt                         what `resume` reads besides

What is removed is renamed first. A process killed at any moment leaves the folders that were whole, and perhaps one
with a temporary name, which the next start removes. Parameters and moments are stored whole and by name, however many
processes share them.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..weights import CheckpointError, load, write
from .lessons import Lesson
from .loop import Trainer

FOLDER, EXTRA = "checkpoints", "trainer.pt"
_NAME, _TEMPORARY = re.compile(r"step-(\d{8})"), ".unfinished-"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def keep(trainer: Trainer, out: Path, count: int, tokenizer: str | None = None) -> None:
    """Write the run's present step; of all kept ones the last ``count`` stay. Every process must call it."""
    tensors = get_model_state_dict(trainer.model, options=_WHOLE)
    moments = get_optimizer_state_dict(trainer.model, trainer.optimizer, options=_WHOLE)
    counted = {name: dict(trainer.ranks.add(lesson.passed_over)) for name, lesson in _counting(trainer)}
    if trainer.ranks.first:
        name = f"step-{trainer.done:08d}"
        temporary = out / FOLDER / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        extra = {"done": trainer.done, "optimizer": moments, "passed over": counted, "records": _records(trainer)}
        try:
            write(trainer.model, tensors, temporary, tokenizer)
            torch.save(extra, temporary / EXTRA)
        except (OSError, RuntimeError) as error:  # torch's own on a full disk speaks of positions
            free = shutil.disk_usage(out).free / 2**20
            shutil.rmtree(temporary, ignore_errors=True)
            told = f"step {trainer.done} cannot be kept in {out / FOLDER}, where {free:,.0f} MiB were free: {error}"
            raise OSError(told) from error
        _remove(out / FOLDER / name)
        temporary.rename(out / FOLDER / name)
        for _, folder in kept(out)[:-count]:
            _remove(folder)
    trainer.ranks.wait()


def kept(out: Path) -> list[tuple[int, Path]]:
    """The steps of a run that can be taken up again, and their folders, the last one last."""
    found = [(path, _NAME.fullmatch(path.name)) for path in (out / FOLDER).glob("step-*")]
    return sorted((int(m[1]), path) for path, m in found if m and (path / EXTRA).exists())


def _remove(folder: Path) -> None:
    """Under a temporary name, so that no step is ever half there."""
    if folder.exists():
        gone = folder.with_name(f"{_TEMPORARY}removal-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def clear_unfinished(out: Path) -> None:
    """Remove what a killed process was writing."""
    for path in (out / FOLDER).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def resume(trainer: Trainer, out: Path) -> dict[str, tuple[int, int]] | None:
    """Take the run up at the last step kept; None where there is none. Every process must call it.

    Of many processes the first reads, the file of moments mapped rather than copied, and hands out one tensor at a
    time, of which each process keeps its shard: none holds the whole. The lessons that no longer have as many records
    as then, and so another order of them: how many then, and now.
    """
    found = kept(out)
    if not found:
        return None
    (_, folder), ranks, state, moments = found[-1], trainer.ranks, {}, {}
    told: Exception | tuple = ()
    if ranks.first:
        try:
            done, moments, *counts = _read(folder, mapped=ranks.world > 1)
            state, told = load(folder).state_dict(), (done, *counts)
        except (CheckpointError, OSError) as error:
            told = error
    told = ranks.hear(told)
    if isinstance(told, Exception):
        raise told
    trainer.done, counted, had = told
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.world > 1)
    set_model_state_dict(trainer.model, state, options=options)
    some = dataclasses.replace(options, strict=False)  # a parameter that no lesson has reached yet has no moments
    set_optimizer_state_dict(trainer.model, trainer.optimizer, moments, options=some)
    for name, lesson in _counting(trainer) if ranks.first else ():  # the counts of all processes
        lesson.passed_over.update(counted.get(name, {}))
    return {name: (had[name], now) for name, now in _records(trainer).items() if had.get(name, now) != now}


def _read(folder: Path, mapped: bool) -> tuple[int, dict[str, Any], dict[str, dict[str, int]], dict[str, int]]:
    """Steps done, moments, what was passed over and how many records there were, by lesson; CheckpointError."""
    try:
        extra = torch.load(folder / EXTRA, map_location="cpu", weights_only=True, mmap=mapped)
        return extra["done"], extra["optimizer"], extra["passed over"], extra.get("records", {})
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler's own assumptions
        told = f"{folder / EXTRA} is damaged: {error!r}; remove {folder} to go on from before"
        raise CheckpointError(told) from error


def _records(trainer: Trainer) -> dict[str, int]:
    return {name: len(lesson.records) for name, lesson in _counting(trainer)}


def _counting(trainer: Trainer) -> list[tuple[str, Lesson]]:
    return [(name, lesson) for name, lesson in trainer.lessons.items() if isinstance(lesson, Lesson)]
