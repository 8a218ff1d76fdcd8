"""A stand-in for ``torch.cuda.graph`` that, as torch's, restores neither stream nor generator where a capture fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def stand_in(monkeypatch: Any, here: object, **others: object) -> SimpleNamespace:
    """Tells the current ``stream``, ``here`` at first, whether random numbers can be drawn (``draws``) and on which
    streams graphs were ``captured``; ``others`` take the places of torch.cuda's functions and classes."""
    now = SimpleNamespace(stream=here, draws=True, captured=[])

    class Capturing:
        def __init__(self, graph: object, stream: object) -> None:
            self.stream = stream
            now.captured.append(stream)

        def __enter__(self) -> None:
            self.before, now.stream, now.draws = now.stream, self.stream, False

        def __exit__(self, kind: object, *_: object) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            now.stream, now.draws = self.before, True

    places = {"graph": Capturing, "current_stream": lambda device=None: now.stream}
    places["set_stream"] = lambda stream: setattr(now, "stream", stream)
    for name, place in (places | others).items():
        monkeypatch.setattr(torch.cuda, name, place)
    return now
