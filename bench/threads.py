"""Threads on processors: while something is timed, each thread of this process and of its children keeps to one.

The thread that calls has the first processor. All others, in the order in which they began, have the rest in turn, so
that the threads of any pool of as many as there are processors, torch's, a compiler's or llama.cpp's, share none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


class Threads:
    """Binds and frees; does nothing where the system has no way to (anything but Linux) or there is one processor."""

    def __init__(self) -> None:
        able = hasattr(os, "sched_setaffinity") and (_PROC / "self" / "task").is_dir()
        self.processors = sorted(os.sched_getaffinity(0)) if able else []
        self.able = len(self.processors) > 1
        self._before: dict[int, set[int]] = {}
        self._known: set[int] = set()
        self._children: list[int] = []
        self.anew: set[str] = set()
        """Names of contenders whose calls begin threads of their own: such a thread begins on its caller's processor,
        so their caller is left free to move."""

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        self._children = _children() if self.able else []
        try:
            self.bind()
            yield
        finally:
            self._free()

    def bind(self) -> None:
        """All threads there are now."""
        if not self.able:
            return
        self._known = set(_of(os.getpid()))
        for process in (os.getpid(), *self._children):
            first, *others = _of(process) or [process]
            self._set(first, {self.processors[0]})
            for i, thread in enumerate(others):
                self._set(thread, {self.processors[1 + i % (len(self.processors) - 1)]})

    def take(self, name: str, measure: Callable[[], Any], undo: Callable[[], Any]) -> None:
        """``measure()`` with all threads bound; where it began new ones it is undone, and repeated with its caller
        free."""
        self.bind()
        if name in self.anew:
            self._set(os.getpid(), set(self.processors))
            measure()
            self.bind()
            return
        measure()
        if self.able and set(_of(os.getpid())) - self._known:
            self.anew.add(name)
            undo()
            self.take(name, measure, undo)

    def summary(self) -> dict[str, Any]:
        """For the record."""
        return {"bound": self.able, "processors": self.processors, "caller free, as threads begin": sorted(self.anew)}

    def _set(self, thread: int, processors: set[int]) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._before.setdefault(thread, os.sched_getaffinity(thread))
            os.sched_setaffinity(thread, processors)

    def _free(self) -> None:
        """As they were; threads that began meanwhile as this one was."""
        whole = self._before.get(os.getpid())
        for thread in _of(os.getpid()) if whole else []:
            self._before.setdefault(thread, whole)
        for thread, processors in self._before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, processors)
        self._before.clear()


def _of(process: int) -> list[int]:
    """A process' threads, the first one first."""
    try:
        return sorted(int(task.name) for task in (_PROC / str(process) / "task").iterdir())
    except OSError:
        return []


def _children() -> list[int]:
    found = []
    for stat in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]  # the name before may hold anything
            found += [int(stat.parent.name)] if int(parent) == os.getpid() else []
    return found
