"""Peak memory of one task, measured in a child process: ``python -m bench.memory TASK '{"argument": value}'``.

A task is a function that prepares nothing at import and returns what to run. The child warms up on a small size,
notes its resident memory, resets the kernel's high-water mark, runs the task at its true size and prints the growth
in bytes. Inputs, outputs and gradients are in it; Python, torch and its thread pools are not.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .machine import ROOT


def peak(task: str, timeout: float = 300.0, **arguments: object) -> int:
    """Bytes that ``task`` adds at its height, in a fresh process. RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "bench.memory", task, json.dumps(arguments)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    if child.returncode:
        raise RuntimeError(f"{task}: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(child.stdout.strip().splitlines()[-1])


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def _growth(run: Callable[[], object]) -> int:
    try:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    run()
    return _resident("VmHWM") - before


def scan_training(b: int, l: int, h: int, who: str) -> object:
    """Forward and backward of the scan."""
    from . import inputs
    from .bench_ssd_scan import Problem, ours, transformers

    problem = Problem(b, l, h)
    function = ours(who) if who in inputs.own_backends() else transformers()
    return inputs.gradients(function, problem.leaves(), problem.upstream)


def generation(context: int, steps: int, who: str, dtype: str) -> object:
    """Weights, state or cache for ``context`` tokens, and a few tokens after them."""
    from .bench_generation import decoder

    decode = decoder(who, dtype, context)
    for _ in range(steps):
        decode()
    return decode


TASKS = {
    "scan_training": (scan_training, {"l": 128}),
    "generation": (generation, {"context": 64}),
}
"""Each task and the arguments of its warm-up."""


def main(name: str, arguments: str) -> None:
    task, small = TASKS[name]
    true = json.loads(arguments)
    task(**{**true, **small})
    print(_growth(lambda: task(**true)))


if __name__ == "__main__":
    main(*sys.argv[1:])
