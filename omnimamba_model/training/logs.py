"""What a run tells of itself: a line a step in metrics.jsonl, TensorBoard, and Weights & Biases where asked for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..files import write_whole

FILE = "metrics.jsonl"
NO_TENSORBOARD = f"TensorBoard is not installed (pip install tensorboard): {FILE} alone has the curves"


class Logs:
    """``done`` steps have been taken: what a killed process wrote beyond them is dropped, they will be taken again."""

    def __init__(self, out: Path, done: int, tensorboard: bool, wandb: str | None) -> None:
        self._drop_after(out / FILE, done)
        self._file = open(out / FILE, "a", encoding="utf-8")
        self._board = _tensorboard(out, done) if tensorboard else None
        self.lacks = NO_TENSORBOARD if tensorboard and self._board is None else ""
        """What was asked for and is not there, in a line for people."""
        self._wandb = _wandb(out, wandb) if wandb else None

    def add(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name.replace(" ", "/"), value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self, passed_over: Counter[str]) -> None:
        """End, with the reasons why records were passed over."""
        if passed_over:
            self._file.write(json.dumps({"passed over": dict(passed_over.most_common(100))}) + "\n")
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @staticmethod
    def _drop_after(path: Path, done: int) -> None:
        if not path.exists():
            return
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) in range(1, done + 1)]
        write_whole(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines)))


def _step(line: str) -> int:
    """A line's step; 0 for a torn line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _tensorboard(out: Path, done: int) -> Any:
    """A writer, or None where TensorBoard is not installed: metrics.jsonl has everything."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)


def _wandb(out: Path, project: str) -> Any:
    """The run of this folder: the same however the folder is named, and no other folder's."""
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb was asked for: pip install wandb") from None
    place = out.resolve()
    name = "/".join(place.parts[-2:])
    mark = hashlib.sha256(str(place).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return wandb.init(project=project, dir=str(out), id=mark, name=name, resume="allow")
