"""Instructions that small calls of native kernels execute, counted by valgrind's callgrind: noise moves them not.

    python -m bench.instructions           counts, and compares with what is kept; exits with 1 where one needs more
    python -m bench.instructions --keep    counts, and keeps the counts

The calls are those that the public functions make. One process without torch, under valgrind and on one thread, loads
the modules of the generic code and of AVX2 (valgrind knows no AVX-512) and repeats them. Counts depend on the compiler:
kept ones of another are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels import native

from . import inputs, results
from .tables import table

KEPT = results.FOLDER / "instructions" / "counts.json"
SETS = ("generic", "avx2")
HEADS = 24
MORE = 0.02
"""A kernel may need this much more than what is kept: the C library's own functions differ a little."""
Calls = list[tuple[str, dict[str, Any]]]


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    if which("valgrind") is None:
        return "valgrind is not installed"
    missing = [reason for name in SETS if (reason := native.instruction_sets().get(name))]
    return missing[0] if missing else None


def cases() -> dict[str, Callable[[], object]]:
    """Small calls of every operation, by name."""
    scan, mixer = inputs.scan(1, 70, 2), inputs.mixer(HEADS)
    inner = HEADS * inputs.HEADDIM
    row = torch.randn(1, 2 * inner + 2 * inputs.STATE + HEADS)
    states = (
        torch.zeros(1, inner + 2 * inputs.STATE, inputs.WIDTH - 1),
        torch.zeros(1, HEADS, inputs.HEADDIM, inputs.STATE),
    )
    few, many, weight = torch.randn(1, 1024), torch.randn(64, 1024), torch.randn(768, 1024)
    int8, scales = kernels.quantize_int8(weight)
    x, z = torch.randn(150, 1024), torch.randn(150, 1024)
    channels = torch.randn(1, 300, 512)
    step = mixer | {"conv_state": states[0], "ssm_state": states[1]}

    def training() -> None:
        leaves = inputs.with_gradients(scan)
        y = kernels.mamba_chunk_scan_combined(**leaves, chunk_size=64, dt_softplus=True)
        y.sum().backward()

    return {
        "scan, forward": lambda: kernels.mamba_chunk_scan_combined(**scan, chunk_size=64, dt_softplus=True),
        "scan, forward and backward": training,
        "convolution": lambda: kernels.causal_conv1d_fn(
            channels, torch.ones(300, 4), torch.ones(300), activation="silu"
        ),
        "gated norm": lambda: kernels.rmsnorm_fn(x, torch.ones(1024), None, z),
        "mixer step": lambda: kernels.mamba_mixer_step(row, **step),
        "product, 1 row": lambda: kernels.lora_linear(few, weight),
        "product, 1 row, fp16 weights": lambda: kernels.lora_linear(few, weight.half()),
        "product, 1 row, int8 weights": lambda: kernels.lora_linear(few, int8, weight_scale=scales),
        "product, 4 rows, int8 weights": lambda: kernels.lora_linear(many[:4], int8, weight_scale=scales),
        "product, 64 rows": lambda: kernels.lora_linear(many, weight[:160]),
    }


@contextmanager
def noted() -> Iterator[Calls]:
    """Within the block, what native kernels are called with, from the state before the call."""
    found, call = [], native.call

    def noting(kernel: str, **fields: Any) -> Any:
        before = {name: _packed(value) for name, value in fields.items()}
        result = call(kernel, **fields)
        if result is None:  # else it is a size that the caller asked for
            found.append((kernel, before))
        return result

    native.call = noting
    try:
        yield found
    finally:
        native.call = call


def _packed(value: Any) -> Any:
    """A tensor as (bytes of its storage, type, strides in elements, offset in bytes); anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    held = torch.empty(0, dtype=torch.uint8).set_(value.detach().untyped_storage()).numpy().tobytes()
    kind = str(value.dtype).removeprefix("torch.")
    return held, kind, tuple(value.stride()), value.storage_offset() * value.element_size()


CALLED = "*Kernel::call(*"
"""The function of csrc/bindings.h through which Python calls every kernel: each time it ends, callgrind writes what it
has counted since the last time."""
REPLAY = """
import ctypes, gc, importlib.util, pickle, sys, types

gc.disable()

torch = sys.modules["torch"] = types.ModuleType("torch")  # as much of it as the modules ask for
for kind in ("float32", "bfloat16", "float16", "int32", "int64", "int8"):
    setattr(torch, kind, kind)
torch.get_num_threads = lambda: 1

class Tensor:
    def __init__(self, held, kind, strides, offset):
        self.memory = ctypes.create_string_buffer(held, max(1, len(held)))
        self.dtype, self.strides, self.offset = getattr(torch, kind), strides, offset

    def data_ptr(self):
        return ctypes.addressof(self.memory) + self.offset

    def stride(self):
        return self.strides

def load(path):
    spec = importlib.util.spec_from_file_location(path.rsplit("/", 1)[1].split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

with open(sys.argv[1], "rb") as file:
    calls = pickle.load(file)
def own(value):
    return Tensor(*value) if isinstance(value, tuple) else value

prepared = [
    (module.kernels[kernel], {name: own(value) for name, value in fields.items()})
    for module in [load(path) for path in sys.argv[2:]]
    for kernel, fields in calls
]
prepared[0][0](**prepared[0][1])  # with it ends what is counted of all that came before
for run, fields in prepared:
    run(**fields)
"""


def count() -> dict[str, dict[str, int]]:
    """Instructions of each case, by instruction set. RuntimeError with valgrind's last words if it fails."""
    calls, owners = [], []
    with torch.random.fork_rng(), kernels.use_backend("native"), native.use_instruction_set("generic"):
        torch.manual_seed(0)
        for name, function in cases().items():
            with noted() as found:
                function()
            calls += found
            owners += [name] * len(found)
    taken = _counted(calls)
    if len(taken) != len(SETS) * len(calls):
        raise RuntimeError(f"callgrind saw {len(taken)} calls, expected {len(SETS) * len(calls)}")
    totals: dict[str, dict[str, int]] = {name: {} for name in SETS}
    for i, instructions in enumerate(taken):
        of, case = totals[SETS[i // len(calls)]], owners[i % len(calls)]
        of[case] = of.get(case, 0) + instructions
    return totals


def _counted(calls: Calls) -> list[int]:
    """Instructions of every call in turn, its arguments' way through the binding included."""
    modules = [sys.modules[f"{kernels.__name__}._native_{name}"].__file__ for name in SETS]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "calls").write_bytes(pickle.dumps(calls))
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", f"--dump-after={CALLED}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, sys.executable, "-S", "-c", REPLAY, f"{folder}/calls", *modules],
            env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"valgrind: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        files = sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:]))
        return [int(re.search(r"^totals: (\d+)", file.read_text(), re.M)[1]) for file in files[1:]]


def compiler() -> str:
    """Of the kernels, and the Python whose way to them is counted too."""
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{native.build_info().get('compiler', 'unknown')}, Python {version}"


def more(kept: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[tuple[str, str, int, int]]:
    """(instruction set, case, kept, now) of every case that needs more than is allowed."""
    return [
        (name, case, kept[name][case], instructions)
        for name, counts in now.items()
        for case, instructions in counts.items()
        if case in kept.get(name, {}) and instructions > (1 + MORE) * kept[name][case]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help=f"write {KEPT.relative_to(results.FOLDER.parent)}")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"cannot count: {reason}")
        return 0
    now = {"compiler": compiler(), "counts": count()}
    if options.keep:
        results.save(KEPT, now)
    lines = [[name, case, f"{n:,}"] for name, counts in now["counts"].items() for case, n in counts.items()]
    print(table(["instruction set", "kernel", "instructions"], lines))
    return compare(json.loads(KEPT.read_text()), now) if KEPT.exists() else 0


def compare(before: dict[str, Any], now: dict[str, Any]) -> int:
    """Prints what needs more than before; 1 where anything does. Of two compilers nothing is compared."""
    if before["compiler"] != now["compiler"]:
        print(f"not compared: counts of {before['compiler']} and of {now['compiler']}")
        return 0
    found = more(before["counts"], now["counts"])
    for name, case, old, new in found:
        print(f"{name}, {case}: {new:,} instructions, {old:,} before: {new / old - 1:+.1%}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
