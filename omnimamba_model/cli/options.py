"""Options that several commands have, and what they name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Sampling

FORMS = ("instruct", "user", "plain")
BACKENDS = ("cuda", "triton", "native", "reference")
DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("mmu", "t2i")
LOADED = (*DTYPES, "int8")
"""What weights can be cast to as they are loaded; int8 ones are not saved."""
MOST = 10_000
"""Drawings or tokens."""


def add_place(command: argparse.ArgumentParser) -> None:
    """Which model runs, and on what."""
    command.add_argument(
        "--checkpoint", required=True, help="a folder of demo, train or convert, a hub repository, or OmniMamba*.pth"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    command.add_argument(
        "--dtype", choices=LOADED, help="cast the matrices, int8 for decode; by default they stay as they are"
    )
    command.add_argument("--backend", choices=BACKENDS, help="the kernels to run on; by default the best that can")


def add_fold(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fold", action=argparse.BooleanOptionalAction,
        help="compute every token's embedding once, at the start, or else at each step; "
        "by default once where that takes about a second or less: always on a GPU",
    )  # fmt: skip


def add_generation(command: argparse.ArgumentParser, task: str, temperature: float) -> None:
    """What every command that generates for one task takes."""
    add_place(command)
    command.set_defaults(task=task)
    command.add_argument("--merge", action="store_true", help="add the task's adapter to the weights: quicker tokens")
    if task == "t2i":
        add_fold(command)
    command.add_argument("--seed", type=seed, default=0)
    command.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
    command.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    command.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that reach p together")
    command.add_argument("--min-p", type=float, default=0.0, help="keep tokens p times as likely as the likeliest")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes drawn tokens less likely")


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text!r}")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number in 1..{MOST}, got {text!r}")
    return int(text)


@contextmanager
def loaded(arguments: argparse.Namespace) -> Iterator[Pipeline]:
    """The checkpoint on its device, within the back end that was named."""
    import torch

    from omnimamba_kernels import use_backend

    from ..pipeline import Pipeline

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with use_backend(arguments.backend):
        fold = getattr(arguments, "fold", False)  # commands that only answer have no use for it
        pipeline = Pipeline.load(arguments.checkpoint, arguments.device, dtype, fold=fold)
        if getattr(arguments, "merge", False):
            pipeline.model.merge(TASKS.index(arguments.task))
        yield pipeline


def named(checkpoint: str) -> str:
    """A checkpoint by a name that holds from any folder."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    from ..sampling import Sampling

    return Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed,
        arguments.min_p, arguments.repetition_penalty,
    )  # fmt: skip
