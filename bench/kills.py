"""A run that is killed again and again, and continues exactly: ``python -m bench.kills``.

A small training run is taken to its end once. The same run is then killed with SIGKILL and started again, 20 times, and
then finished. Every step's losses and every parameter must be those of the run that was left alone, bit for bit.

Every other kill comes at a random step and a random while after it. The others are aimed at a save: the process is
stopped as soon as a checkpoint that is not whole appears after a random step, with a random number of files in it, and
killed there if the checkpoint still is not whole. All that is random is drawn from ``--seed``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from omnimamba_model.demo import Settings
from omnimamba_model.demo.digits import split
from omnimamba_model.demo.experiment import prepare
from omnimamba_model.training import checkpoints
from omnimamba_model.weights import load

from . import machine, results

FILE = results.FOLDER / "kills" / "digits.json"
APART, AFTER = 8, 0.06
"""Steps from one kill to the next at most, and seconds after a step; a step and a save take less than that."""
FILES = 3
"""Whole files in a checkpoint before its last one."""
_PATIENCE = 300.0


def settings_of(work: Path, steps: int) -> dict[str, Any]:
    """A run that saves at every other step, on lessons written to ``work``."""
    small = Settings(
        d_model=16, d_state=8, headdim=16, codes=16, copies=1, batch=4, staged=False, stage0=0, stage1=0, stage2=steps
    )
    prepare(work, small, *split(), seed=0)
    (values,) = small.runs(work, seed=0).values()
    return values | {"save_every": 2, "keep": 2}


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "omnimamba_model", "train", str(path)]
    return subprocess.Popen(command, cwd=machine.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps_of(out: Path) -> list[dict[str, float]]:
    """Each step's losses; a torn last line is no step."""
    path, found = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "step" in values:
            found.append({k: v for k, v in values.items() if k in ("step", "rate") or k.startswith("loss")})
    return found


def unfinished(out: Path) -> set[Path]:
    """Checkpoints that a process is writing or that a kill left so; not those that were being removed."""
    return set((out / checkpoints.FOLDER).glob(".unfinished-step-*"))


def kill_once(path: Path, out: Path, draw: random.Random, aimed: bool = False) -> dict[str, Any] | None:
    """Start the run and kill it at a step that it has not reached before; None where it ended first.

    ``aimed``: within a save at that step or, where it could not be stopped in time, at a later one.
    """
    done = max([0, *(step for step, _ in checkpoints.kept(out)), *(int(line["step"]) for line in steps_of(out))])
    target, wait = done + draw.randint(1, APART), draw.uniform(0, AFTER)
    files, left = draw.randint(0, FILES) if aimed else 0, unfinished(out)
    process, until = start(path), time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        left &= unfinished(out)  # what an earlier kill left is gone before the same step is saved again
        reached = steps_of(out)
        if reached and reached[-1]["step"] >= target:
            break
        time.sleep(0.002)
    if aimed:
        _stop_while_saving(process, out, left, files, until)
    else:
        time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    torn = unfinished(out) - left
    return {
        "step": steps_of(out)[-1]["step"],
        "milliseconds after it": None if aimed else round(1e3 * wait),
        "while saving": bool(torn),
        "files of the torn save": sorted(file.name for folder in torn for file in folder.iterdir()),
    }


def _stop_while_saving(process: subprocess.Popen, out: Path, left: set[Path], files: int, until: float) -> None:
    """Return with the process stopped in a save that has ``files`` whole files or more, or ended."""
    while process.poll() is None and time.monotonic() < until:
        if any(_whole_files(folder) >= files for folder in unfinished(out) - left):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if unfinished(out) - left:
                return
            process.send_signal(signal.SIGCONT)  # it was whole by then
        time.sleep(0.0002)


def _whole_files(folder: Path) -> int:
    """How many there are, or -1 where the folder has just been renamed."""
    try:
        return sum(not name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return -1


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same losses at every step and the same parameters, bit for bit."""
    one, other = (load(out / "model").state_dict() for out in (a, b))
    alike = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return alike and steps_of(a) == steps_of(b)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills: got {options.kills}, expected 1 or more")
    draw, kills = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="omnimamba-kills-") as folder:
        work = Path(folder)
        values = settings_of(work, steps=(options.kills + 2) * APART)
        paths = {name: work / f"{name}.yaml" for name in ("whole", "killed")}
        for name, path in paths.items():
            path.write_text(yaml.safe_dump(values | {"out": str(work / name)}))
        assert start(paths["whole"]).wait() == 0
        while len(kills) < options.kills:
            found = kill_once(paths["killed"], work / "killed", draw, aimed=len(kills) % 2 == 1)
            assert found is not None, "the run ended before it was killed"
            kills.append(found)
            print(f"kill {len(kills)}: {found}", flush=True)
        assert start(paths["killed"]).wait() == 0
        exact = same(work / "whole", work / "killed")
    torn = sum(kill["while saving"] for kill in kills)
    results.save(options.out, {"exact": exact, "kills": kills, "seed": options.seed, "machine": machine.describe()})
    print(f"{len(kills)} kills, {torn} of them tore a save: {'the same bits' if exact else 'OTHER RESULTS'}")
    return 0 if exact and torn else 1


if __name__ == "__main__":
    sys.exit(main())
