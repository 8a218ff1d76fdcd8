"""Batches made ready while the step before them is taken: a lesson's records are read, its pictures decoded and its
texts tokenized in a thread of its own.

A batch is a function of its place, so that it does not matter when it is made: order, place and losses are those of a
run that makes each within its step. What was passed over is counted when the batch is taken, so that a checkpoint never
counts ahead; an error waits for the step that it belongs to. What must be loaded first, such as the encoders, the main
thread loads once a batch needs it: Ctrl-C ends that at once, and no step is taken meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from .lessons import Lesson, Made, Unprepared
from .phase import Batch

if TYPE_CHECKING:
    from .loop import Trainer


class Ahead:
    """A lesson whose next ``depth`` batches are made beforehand, none of place ``end`` or later."""

    def __init__(self, lesson: Lesson, depth: int, end: int) -> None:
        self.lesson, self.depth, self.end = lesson, depth, end
        lesson.threaded, self._over = True, Event()
        self._thread = ThreadPoolExecutor(1, "batches")  # started by the first batch
        self._waiting: deque[tuple[int, Future[Made]]] = deque()

    def __call__(self, place: int) -> Batch:
        try:
            return self._take(place)
        except Unprepared:
            wait(self._forget())  # what the thread is about is no batch of anybody's, and nothing runs beside a load
        self.lesson.prepare()
        return self._take(place)

    def _take(self, place: int) -> Batch:
        if self._waiting and self._waiting[0][0] != place:
            self._forget()
        last = max(place, min(place + self.depth, self.end - 1))
        for following in range(place + len(self._waiting), last + 1):
            made = self._thread.submit(self.lesson.make, following, self._over.is_set)
            self._waiting.append((following, made))
        _, made = self._waiting.popleft()
        return self.lesson.take(made.result)

    def stop(self) -> None:
        """Let the thread end at the next record."""
        self._over.set()
        self._forget()

    def close(self) -> None:
        """``stop``, and wait until the thread has ended."""
        self.stop()
        self._thread.shutdown()
        self.lesson.threaded = False

    def _forget(self) -> list[Future[Made]]:
        """Let no batch wait; the one that the thread is making just now, which cannot be called off."""
        running = [made for _, made in self._waiting if not made.cancel()]
        self._waiting.clear()
        return running


@contextmanager
def ahead(trainer: Trainer) -> Iterator[None]:
    """Have the trainer's lessons make ``trainer.prefetch`` batches each beforehand, for as long as the context lasts.

    Lessons that are plain functions stay as they are: what they do may hang on when they are called.
    """
    end = trainer.phase.steps * trainer.phase.accumulate
    lessons = {name: lesson for name, lesson in trainer.lessons.items() if isinstance(lesson, Lesson)}
    made = {name: Ahead(lesson, trainer.prefetch, end) for name, lesson in lessons.items() if trainer.prefetch}
    try:
        trainer.ahead = made
        yield
    finally:
        trainer.ahead = {}
        for lesson in made.values():
            lesson.stop()  # all, before one is waited for
        for lesson in made.values():
            lesson.close()
