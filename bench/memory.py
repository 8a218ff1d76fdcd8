"""Peak memory of one task, measured in a child process: ``python -m bench.memory TASK '{"argument": value}'``.

A task is a generator: it warms up and yields, prepares and yields, runs and ends. The child notes its resident memory
at the first yield, resets the kernel's high-water mark at the second, and at the end prints by how many bytes the mark
lies above the note, which leaves out Python, torch and its thread pools, and the mark itself. What was prepared is in
both. Linux only: it reads /proc/self.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from omnimamba_kernels import large_pages

from .machine import ROOT

ABREAST = 2
"""Children at a time: what one holds is no more or less for another beside it."""


def abreast(measurements: list[Callable[[], int]]) -> list[Future[int]]:
    """What each of them gives or raises, ABREAST at a time, all at an end. An interruption begins no further one."""
    with ThreadPoolExecutor(ABREAST) as pool:
        found = [pool.submit(measure) for measure in measurements]
        try:
            wait(found)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def peak(task: str, timeout: float = 300.0, **arguments: object) -> int:
    """Bytes that ``task`` adds at its height, in a fresh process. RuntimeError with its last words if it fails."""
    return _measured(task, timeout, arguments)[0]


def whole(task: str, timeout: float = 900.0, **arguments: object) -> int:
    """Bytes resident at the height of ``task``: all that the process has, Python and torch too."""
    return _measured(task, timeout, arguments)[1]


def added(run: Callable[[], object]) -> int | None:
    """Bytes that a call adds at its height in this process, its result included, its inputs not; None where the system
    does not tell. What an earlier call has left to use again is not counted."""
    try:
        _trim()
        before = _resident("VmRSS")
        _reset_height()
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _measured(task: str, timeout: float, arguments: dict[str, object]) -> list[int]:
    command = [sys.executable, "-m", "bench.memory", task, json.dumps(arguments)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    if child.returncode:
        raise RuntimeError(f"{task}: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [int(figure) for figure in child.stdout.strip().splitlines()[-1].split()]


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def _reset_height() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def scan_training(b: int, l: int, h: int, who: str) -> Iterator[None]:
    """Inputs, forward and backward of the scan; warmed up on a short sequence."""
    from . import inputs
    from .bench_ssd_scan import Problem, ours, transformers

    function = ours(who) if who in inputs.own_backends() else transformers()
    small = Problem(b, 128, h)
    inputs.gradients(function, small.leaves(), small.upstream)
    yield
    problem = Problem(b, l, h)
    yield
    inputs.gradients(function, problem.leaves(), problem.upstream)


def generation(context: int, steps: int, who: str, dtype: str) -> Iterator[None]:
    """Weights, state or cache for ``context`` tokens, and a few tokens after them."""
    from .generators import UNCACHED, decoder, ids, model

    yield
    if who == UNCACHED:  # two blocks of twelve, which are alike: the rest would take minutes and no more memory
        network, prompt = model(who, dtype), ids(context + 1)
        decode = lambda: network.last(prompt, 2)  # noqa: E731
    else:
        decode = decoder(who, dtype, context)
    yield
    for _ in range(steps):
        decode()


def official_names(size: str, kind: str, who: str) -> Iterator[None]:
    """OmniMamba from a checkpoint: its weights loaded and used."""
    from .bench_omnimamba import peak

    yield from peak(size, kind)


def decoding(tokens: int) -> Iterator[None]:
    """A small language model, and so many tokens after a short prompt."""
    import torch

    from omnimamba_model import MambaConfig, MambaLM, generate_text

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=1024, d_state=16, headdim=32)).eval()
    prompt = torch.arange(16)[None]
    generate_text(model, prompt, 64)
    yield
    yield
    generate_text(model, prompt, tokens)


TASKS = {
    "decoding": decoding,
    "scan_training": scan_training,
    "generation": generation,
    "official_names": official_names,
}


def _trim() -> None:
    """Hands freed memory back, so that what building left behind is not counted. Does nothing without glibc."""
    gc.collect()
    large_pages.release()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def main(name: str, arguments: str) -> None:
    task = TASKS[name](**json.loads(arguments))
    next(task)
    before = _resident("VmRSS")
    next(task)
    _trim()
    _reset_height()
    next(task, None)
    height = _resident("VmHWM")
    print(height - before, height)


if __name__ == "__main__":
    main(*sys.argv[1:])
