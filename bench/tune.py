"""Finds launch settings on this GPU and writes them down: ``python -m bench.tune OP``.

At each size that a GPU is measured at, each kernel's settings are tried with one or two numbers changed: blocks, warps,
stages. A setting counts only beside a passed check; the fastest becomes a rule of the operation's launch table for this
chip and the class of its size: what is as long up to the next power of two, by which tiles are padded. Nothing is tuned
at run time: the table is data, to be looked at and committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from omnimamba_kernels import backends, triton_launch
from omnimamba_kernels.backends import OPS

from .gpu_clock import Clock
from .gpu_problems import OPERATIONS, Problem

KERNELS = Path(triton_launch.__file__).parent
Sizes = tuple[tuple[str, int], ...]
Tried = dict[tuple[str, Sizes], tuple[dict[str, int], bool]]
"""By kernel and size: the best setting, and whether it is WORTH a rule."""
OPTIONS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4)}
"""Tried as they are; any other number of a rule is also halved and doubled."""
WORTH = 0.97
"""A setting must take at most this share of the time of the one before, or the table stays as it is."""


def candidates(use: dict[str, int]) -> Iterator[dict[str, int]]:
    """A setting's neighbours: one or two of its numbers changed."""
    steps = {k: [v for v in OPTIONS.get(k, (use[k] // 2, use[k] * 2)) if v > 0 and v != use[k]] for k in use}
    for name, values in steps.items():
        yield from ({**use, name: value} for value in values)
    for first, second in itertools.combinations(steps, 2):
        yield from ({**use, first: a, second: b} for a in steps[first] for b in steps[second])


@contextmanager
def trying(op: str, kernel: str, use: dict[str, int], sizes: Sizes = ()) -> Iterator[list[Sizes]]:
    """Within the block ``kernel`` runs with ``use`` where it is asked for ``sizes``; what it is asked for is noted."""
    asked: list[Sizes] = []
    table = triton_launch._settings  # what every way of asking comes to

    def chosen(asked_op: str, asked_kernel: str, arch: str, given: Sizes) -> dict[str, int]:
        if (asked_op, asked_kernel) != (op, kernel):
            return table(asked_op, asked_kernel, arch, given)
        if given not in asked:
            asked.append(given)
        return use if use and given == sizes else table(op, kernel, arch, given)

    with mock.patch.object(triton_launch, "_settings", chosen):
        yield asked


def time_of(problem: Problem, clock: Clock) -> float | None:
    """Seconds of our call with a passed check; None where the setting does not compile, fit or compute."""
    try:
        call = problem.contenders["triton"]()
        return clock.median(call) if problem.error(call()) <= problem.bound else None
    except Exception:  # any refusal of the compiler or the device rules the setting out
        torch.cuda.empty_cache()
        return None


def tune(op: str, clock: Clock, arch: str, only: str = "") -> list[dict[str, Any]]:
    """The rules found for this chip, in the form of a launch table's, each with its kernel."""
    tried: Tried = {}
    for problem in OPERATIONS[op](clock.device):
        for kernel in (name for name in triton_launch.table(op) if only in name):
            with trying(op, kernel, {}) as asked:
                before = time_of(problem, clock)
            for sizes in asked if before is not None else ():
                best, taken = fastest(problem, clock, arch, op, kernel, sizes, before)
                print(f"{problem.group}, {problem.case}: {kernel} {before * 1e6:.1f} -> {taken * 1e6:.1f} us {best}")
                if taken <= WORTH * before:
                    tried[kernel, sizes] = best, True
                else:
                    tried.setdefault((kernel, sizes), (triton_launch._settings(op, kernel, arch, sizes), False))
    return rules(tried, arch)


def class_of(sizes: Sizes) -> dict[str, list[int]]:
    """The ranges of all sizes with the same next powers of two."""
    above = {name: 1 << (size - 1).bit_length() if size > 0 else 0 for name, size in sizes}
    return {name: [power // 2 + 1 if power else 0, power] for name, power in above.items()}


def rules(tried: Tried, arch: str) -> list[dict[str, Any]]:
    """A rule for each class in which a setting won; after them, to come before them in the table, rules of their own
    for the sizes of such a class that another setting suits."""
    winners: dict[tuple[str, str], dict[str, int]] = {}
    for (kernel, sizes), (use, won) in tried.items():
        if won:
            winners.setdefault((kernel, json.dumps(class_of(sizes))), use)
    found = [(kernel, json.loads(when), use) for (kernel, when), use in winners.items()]
    for (kernel, sizes), (use, _) in tried.items():
        if winners.get((kernel, json.dumps(class_of(sizes))), use) != use:
            found.append((kernel, {name: [size, size] for name, size in sizes}, use))
    return [{"kernel": kernel, "rule": {"arch": [arch], "when": when, "use": use}} for kernel, when, use in found]


def fastest(
    problem: Problem, clock: Clock, arch: str, op: str, kernel: str, sizes: Sizes, before: float
) -> tuple[dict[str, int], float]:
    """The best settings of a kernel for one size, and the problem's seconds with them."""
    best, best_time = triton_launch._settings(op, kernel, arch, sizes), before
    for use in candidates(best):
        with trying(op, kernel, use, sizes):
            taken = time_of(problem, clock)
        if taken is not None and taken < best_time:
            best, best_time = use, taken
    return best, best_time


def merged(table: dict[str, list], found: list[dict[str, Any]]) -> dict[str, list]:
    """The table with the new rules in front of the old ones; a rule for the same chip and sizes is replaced."""
    table = {kernel: list(rules) for kernel, rules in table.items()}
    for entry in found:
        rules, new = table[entry["kernel"]], entry["rule"]
        same = [r for r in rules if (r.get("arch"), r.get("when")) == (new["arch"], new["when"])]
        table[entry["kernel"]] = [new, *(rule for rule in rules if rule not in same)]
    return table


def written(table: dict[str, list]) -> str:
    """A launch table as its file has it: one line a rule."""
    kernels = [
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for kernel, rules in table.items()
    ]
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def whole(path: Path) -> dict[str, list]:
    """The table in a file; ValueError where it was cut short or a kernel has no last rule that always fits."""
    table = json.loads(path.read_text())  # its error is a ValueError
    for kernel, rules in table.items():
        if not rules or any("use" not in rule for rule in rules) or {"arch", "when"} & rules[-1].keys():
            raise ValueError(f"the last rule of {kernel!r} must always fit, and each must say what to use")
    return table


def save(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each setting and size (default: 0.1)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or backends()["triton"] is not None:
        print(f"bench.tune needs a GPU: {backends()['triton'] or 'torch finds none'}", file=sys.stderr)
        return 2
    path = KERNELS / options.op / "launch.json"
    try:
        table = whole(path)
    except ValueError as error:
        print(f"bench.tune: {path} is no launch table, and stays as it is: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    found = tune(options.op, Clock(device, options.seconds), triton_launch._target(device.index).arch, options.kernel)
    if found:
        save(path, written(merged(table, found)))
    print(f"{len(found)} rules written to {path}" if found else "nothing was faster: the table stays as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
