"""Whole runs: their settings, what they noted, and waiting for what they do."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from omnimamba_model.training.settings import Run, read


def written(path: Path, values: dict) -> Run:
    """Settings that were written to a file and read."""
    path.write_text(yaml.safe_dump(values))
    return read(path)


def losses(out: str | Path) -> list[dict]:
    """All that metrics.jsonl holds of each step but times and memory; last, where records were passed over, why."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "rate", "tokens", "passed over", "gradient")
    return [{k: v for k, v in line.items() if k.startswith(kept) and k != "tokens/s"} for line in lines]


def until(condition: Callable[[], object], seconds: float = 300) -> bool:
    """Wait for a condition; whether it came about in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())
