"""Lessons side by side on a CPU: every lesson but the first has a process of its own.

Tensors too small to be worth a second thread still leave cores idle; the lessons of a step, however, have nothing to do
with one another until their gradients meet. Parameters and gradients lie in a file that the processes map. A step:

    the trainer says which        it computes its own lesson         it adds the others' gradients, and updates
                      each other process computes its lesson's gradients

Without accumulation the sums are those of one process, in the same order: the same bits.
"""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .records import NoneUsable

if TYPE_CHECKING:
    from .loop import Trainer

_ALIGNED = 64


class Beside:
    """One lesson's process, as the trainer sees it."""

    def __init__(self, name: str, trainer: Trainer, file: int, at: int) -> None:
        """``file`` is the open file of the parameters; this lesson's gradients begin at byte ``at``."""
        self.name, self.lesson, self.parameters = name, trainer.lessons[name], _learning(trainer.model)
        self.gradients = _views(file, self.parameters, at)
        self.tokens = 0
        """Of the last step, without padding."""
        self.link, theirs = Pipe()
        told = f"{theirs.fileno()}, {name!r}, {file}, {at}"
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import learn; learn({told})"
        self.process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno(), file])
        theirs.close()

    def give(self, packed: bytes) -> None:
        """What ``_packed`` made, which the process waits for."""
        with suppress(BrokenPipeError):  # add_gradients will say why
            self.link.send_bytes(packed)

    def begin(self, step: int) -> None:
        with suppress(BrokenPipeError):
            self.link.send(step)

    def add_gradients(self) -> float:
        """Wait for the lesson's gradients, which ``begin`` asked for, and add them; its mean loss."""
        try:
            answer = self.link.recv()
        except (EOFError, ConnectionResetError):
            code = self.process.wait()
            raise RuntimeError(f"the process that learns {self.name!r} ended with status {code}") from None
        if isinstance(answer, NoneUsable):
            self.lesson.passed_over.update(answer.passed_over)
        if isinstance(answer, Exception):
            raise answer
        loss, self.tokens, reached, passed_over = answer
        for i in reached:
            parameter, gradient = self.parameters[i], self.gradients[i]
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)
        if passed_over is not None:
            self.lesson.passed_over = passed_over
        return loss

    def end(self) -> None:
        self.link.close()  # which it hears once its step is done
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def side_by_side(trainer: Trainer, threads: int | None = None) -> Iterator[None]:
    """Give every lesson of the trainer but the first a process, for as long as the context lasts.

    Each process has ``threads``; None deals out evenly those that torch has here, one each at least. ValueError where
    the trainer is not the only one of its run, or not on a CPU; OSError where the temporary folder has no room.
    """
    ranks = trainer.ranks
    if ranks.world > 1 or ranks.device.type != "cpu":
        raise ValueError(f"side_by_side is for one process on a CPU, got {ranks.world} on {ranks.device.type}")
    parameters, others, had = _learning(trainer.model), list(trainer.lessons)[1:], torch.get_num_threads()
    threads = threads or max(1, had // len(trainer.lessons))
    packed = _packed(trainer, others, threads)  # first: what cannot be packed leaves no process behind
    with tempfile.TemporaryFile(prefix="omnimamba-") as opened:  # has no name, so that a kill leaves nothing
        file, size = opened.fileno(), _bytes(parameters)
        _reserve(file, size * len(trainer.lessons))  # torch.from_file overwrites the first byte of what it makes longer
        for parameter, shared in zip(parameters, _views(file, parameters, 0), strict=True):
            parameter.data = shared.copy_(parameter.data)
        started: dict[str, Beside] = {}
        try:
            torch.set_num_threads(threads)
            for i, name in enumerate(others, 1):
                started[name] = Beside(name, trainer, file, i * size)
            for other in started.values():
                other.give(packed)
            del packed
            trainer.beside = started
            yield
        finally:
            trainer.beside = {}
            torch.set_num_threads(had)
            for other in started.values():
                other.end()
            for parameter in parameters:
                parameter.data = parameter.data.clone()


def learn(descriptor: int, name: str, file: int, at: int) -> None:
    """What a lesson's process does, until the trainer is gone."""
    from .ahead import ahead
    from .loop import Trainer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides
    link = Connection(descriptor)
    with suppress(EOFError, OSError):  # the trainer is gone
        given = torch.load(io.BytesIO(link.recv_bytes()), weights_only=False)
        model, phase, lessons, autocast, seed, prefetch, threads = given
        torch.set_num_threads(threads)
        lesson = lessons[name]
        phase = dataclasses.replace(phase, lessons=(name,))
        trainer = Trainer(model, phase, {name: lesson}, autocast=autocast, seed=seed, prefetch=prefetch)
        parameters = _learning(model)
        for parameter, shared in zip(parameters, _views(file, parameters, 0), strict=True):
            parameter.data = shared
        gradients = _views(file, parameters, at)
        with ahead(trainer):
            while True:
                trainer.done = link.recv()
                link.send(_answer(trainer, parameters, gradients, lesson))


def _packed(trainer: Trainer, names: list[str], threads: int) -> bytes:
    """What the processes are given. torch.save writes a storage once, a pickle again for each tensor that is in it."""
    lessons, written = {name: trainer.lessons[name] for name in names}, io.BytesIO()
    given = trainer.model, trainer.phase, lessons, trainer.autocast, trainer.seed, trainer.prefetch, threads
    torch.save(given, written)
    return written.getvalue()


def _answer(trainer: Trainer, parameters: list[nn.Parameter], gradients: list[Tensor], lesson: object) -> object:
    """A step's loss and tokens, the parameters that its gradients reach, what was passed over; or what went wrong."""
    try:
        (loss,) = trainer.learn().values()
    except Exception as error:
        return error
    reached = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
    for i in reached:
        gradients[i].copy_(parameters[i].grad)
    trainer.optimizer.zero_grad()
    return loss, trainer.tokens, reached, getattr(lesson, "passed_over", None)


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(-(-parameter.nbytes // _ALIGNED) * _ALIGNED for parameter in parameters)


def _reserve(file: int, size: int) -> None:
    """Make an open file ``size`` bytes long; on a full disk that is an OSError now rather than SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _views(file: int, parameters: list[nn.Parameter], at: int) -> list[Tensor]:
    """Tensors like the parameters, one behind the other in an open file from byte ``at`` on."""
    whole = torch.from_file(f"/dev/fd/{file}", shared=True, size=at + _bytes(parameters), dtype=torch.uint8)
    found = []
    for parameter in parameters:
        found.append(whole[at : at + parameter.nbytes].view(parameter.dtype).view(parameter.shape))
        at += _bytes([parameter])
    return found
