"""Everything that only a GPU can show, in one command: ``python -m bench.gpu_check --out DIR``.

Tests every kernel on the GPU for each back end that is there, bfloat16 included, the CUDA kernels once more on small
shapes under the toolkit's compute-sanitizer where that is on PATH, then times every operation against torch,
transformers' fallback and the packages that are importable (mamba_ssm, causal_conv1d, fla, flashinfer), each part
within its share of the time. Without a GPU the same parts run with what a CPU has, and say what they left out; of the
native kernels' tests, all of which are ``make test``'s, those against the definitions.
Writes results.json and report.md, after every part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from omnimamba_kernels import backends

from . import gpu_claims, machine, results
from .gpu_ops import NO_TIME
from .gpu_problems import OPERATIONS
from .tables import duration, table

PEERS = ("transformers", "mamba_ssm", "causal_conv1d", "fla", "flashinfer")
TESTS = "tests/kernels"
TESTS_SHARE = 0.5
"""Of the time for all parts: the tests'. What they leave is the benchmarks', the scan first."""
SANITIZERS, SANITIZED_SHARE = ("memcheck", "racecheck"), 0.1
"""What compute-sanitizer looks for, and of the time for all parts the share of each."""
SANITIZED = "cuda and (matches or forward_and_gradients or one_step)"
"""The tests that it looks at: the CUDA kernels against their definitions, on small shapes."""
_OF = ("ahead", "barriers", "cost", "cost_decode", "cost_scan", "launch", "offsets", "tables")
ON_THE_HOST = tuple(f"{TESTS}/test_triton_{of}.py" for of in _OF)
"""Of these a GPU shows nothing: kernels compiled for chips that are not here, read or interpreted; their starts."""
NO_EMULATOR = {"OMNIMAMBA_WITHOUT_EMULATOR": "1"}
"""Nor the CUDA kernels on a CPU, which would have to be compiled for it first: tests/emulated.py."""
ORDER = ("ssd_scan", "gated_norm", "causal_conv1d", "state_update", "lora_linear", "mamba_mixer")


@dataclass
class Part:
    """What became of one part: ok, failed, skipped or out of time, and why."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    failures: list[str] = field(default_factory=list)


def child(
    arguments: list[str], seconds: float, log: Path, under: tuple[str, ...] = (), **environment: str
) -> int | None:
    """The exit status of ``python ARGUMENTS``, ``under`` another program or none, its words in ``log``; None where the
    time was up: it and all that it started are then ended."""
    with log.open("w") as words:
        process = subprocess.Popen(
            [*under, sys.executable, *arguments], cwd=machine.ROOT, env={**os.environ, **environment}, stdout=words,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_tests(backend: str, out: Path, seconds: float, tests: str = TESTS) -> Part:
    """The kernel tests of one back end."""
    name = f"tests, {backend}"
    missing = [package for package in ("pytest", "hypothesis") if importlib.util.find_spec(package) is None]
    reason = backends()[backend] or (f"{' and '.join(missing)} not installed" if missing else None)
    if reason:
        return Part(name, "skipped", detail=reason)
    report, start = out / f"tests-{backend}.xml", time.monotonic()
    report.unlink(missing_ok=True)
    workers = min(4, (os.cpu_count() or 1) // 4)
    together = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    picked = backend if torch.cuda.is_available() else f"{backend} and matches"
    ignored = [f"--ignore={path}" for path in ON_THE_HOST] if torch.cuda.is_available() else []
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *together, *ignored, f"--junitxml={report}"]
    log = out / f"tests-{backend}.log"
    status = child([*command, "-k", picked, tests], seconds, log, **(NO_EMULATOR if torch.cuda.is_available() else {}))
    taken = time.monotonic() - start
    if status is None:
        return Part(name, "out of time", taken, f"{told(so_far(log))}; stopped after {taken:.0f} s, see {log.name}")
    if not report.exists():
        return Part(name, "failed", taken, f"pytest ended with status {status}; see {log.name}")
    counts, failures = read_tests(report)
    broken = status != 0 or not counts["passed"]
    return Part(name, "failed" if broken else "ok", taken, told(counts), failures)


def run_sanitizer(tool: str, out: Path, seconds: float, tests: str = TESTS) -> Part:
    """The CUDA kernels' tests under compute-sanitizer. Torch keeps no memory back: else it could tell no tensor from
    its neighbours."""
    name, program, start = f"compute-sanitizer, {tool}", shutil.which("compute-sanitizer"), time.monotonic()
    reason = backends()["cuda"] or (None if program else "compute-sanitizer, of the CUDA toolkit, is not on PATH")
    if reason:
        return Part(name, "skipped", detail=reason)
    log = out / f"{tool}.log"
    under = (program, f"--tool={tool}", "--error-exitcode=86", "--launch-timeout=0")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SANITIZED, tests]
    status = child(command, seconds, log, under, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **NO_EMULATOR)
    taken, said = time.monotonic() - start, log.read_text(errors="replace")
    counts, errors = so_far(log), re.findall(r"^=+ ERROR SUMMARY: (.*)$", said, re.MULTILINE)
    wrong = re.search(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY: 0)\S", said, re.MULTILINE) is not None
    broken = wrong or counts["failed"] > 0 or status not in (None, 0) or not counts["passed"]
    if status is None:
        errors.append(f"stopped after {taken:.0f} s")
    found = "failed" if broken else "ok" if status == 0 else "stopped"
    return Part(name, found, taken, "; ".join([told(counts), *errors, *[f"see {log.name}"] * broken]))


def read_tests(path: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {e.tag for e in c} & {"failure", "error"}]
    skipped = sum("skipped" in {e.tag for e in c} for c in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}, failed


def so_far(log: Path) -> dict[str, int]:
    """The same counts of tests that were stopped, from the letters that pytest had written."""
    letters = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", log.read_text(errors="replace"), re.MULTILINE))
    kinds = {"passed": ".X", "failed": "FE", "skipped": "sx"}
    return {kind: sum(letter in those for letter in letters) for kind, those in kinds.items()}


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def run_benchmark(op: str, out: Path, seconds: float) -> tuple[Part, dict[str, Any]]:
    """The timings of one operation, with an empty kernel cache, so that first calls are what a newcomer sees."""
    path, start = out / f"bench-{op}.json", time.monotonic()
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="omnimamba-") as cache:
        command = ["-m", "bench.gpu_ops", op, "--out", str(path), "--seconds", f"{0.8 * seconds:.0f}"]
        status = child(command, seconds, out / f"bench-{op}.log", TRITON_CACHE_DIR=cache)
    found = json.loads(path.read_text()) if path.exists() else {"rates": {}, "rows": []}
    wrong = [f"{row['case']}, {row['who']}: {row['reason']}" for row in found["rows"] if is_fault(row)]
    wrong += [f"a problem was lost: {why}" for why in found.get("lost", [])]
    kind = "out of time" if status is None else "failed" if status or wrong else "ok"
    detail = f"{sum('seconds' in row for row in found['rows'])} timed of {len(found['rows'])}"
    if status:
        detail += f"; ended with status {status}, see bench-{op}.log"
    return Part(f"benchmark, {op}", kind, time.monotonic() - start, detail, wrong), found


def is_fault(row: dict[str, Any]) -> bool:
    """Whether a contender should have had a time: one of ours that broke, or anyone whose result was wrong."""
    reason = row.get("reason", "")
    broke = row["ours"] and bool(reason) and reason != NO_TIME and "cannot run: " not in reason
    return broke or "failed its check" in reason


def text(content: dict[str, Any]) -> str:
    """The report: machine, parts, what must be shown, one line a contender."""
    about, parts = content["machine"], content["parts"]
    peers = ", ".join(f"{name} {'present' if there else 'absent'}" for name, there in content["peers"].items())
    rates = next((r for r in content["rates"].values() if r), {})
    said = [f"{about['device']}; torch {torch.__version__}; commit {about['commit']}; {peers}."]
    if rates:
        said.append(f"{rates['copy'] / 1e9:.0f} GB/s copied, {rates['matmul'] / 1e12:.2f} TFLOP/s of a matrix product.")
    said += [f"{name}: {reason}" for name, reason in about["backends"].items() if reason]
    lines = [[p["name"], p["status"], duration(p["seconds"]) if p["seconds"] else "", p["detail"]] for p in parts]
    failures = [f"- {p['name']}: {failure}" for p in parts for failure in p["failures"]]
    met = {True: "yes", False: "no", None: "not judged"}
    shown = [[c["what"], c["required"], c["by"], c["measured"], met[c["met"]]] for c in content["claims"]]
    return "\n\n".join([
        "# GPU check", *said, table(["part", "status", "time", "detail"], lines), *failures,
        table(["to be shown on an H200", "at least", "by", "measured", "met"], shown),
        table(
            ["operation", "case", "by", "time", "against ours", "of the floor", "first call", "as a graph", "memory",
             "SM clock", "joules"], rows(content["rows"])),
    ]) + "\n"  # fmt: skip


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for row in found:
        if "seconds" in row:
            shown = [
                duration(row["seconds"]),
                f"{row['times_ours']:.2f}x" if row.get("times_ours") else "",
                f"{row['floor_share']:.2f} ({row['limit']})",
            ]
        else:
            shown = [f"not timed: {row['reason']}", "", ""]
        first = duration(row["first_call"]) if "first_call" in row else ""
        graph = duration(row["graph_seconds"]) if "graph_seconds" in row else ""
        held = f"{row['peak_bytes'] / 1e9:.2f} GB" if row.get("peak_bytes") else ""
        clock = f"{row['clock_mhz']} MHz" if "clock_mhz" in row else ""
        clock = ", ".join(filter(None, [clock, *row.get("throttled", [])]))
        energy = f"{row['joules']:.2g}" if "joules" in row else ""
        lines.append([row["group"], row["case"], row["who"], *shown, first, graph, held, clock, energy])
    return lines


def check(
    out: Path, seconds: float, tests: str = TESTS, ops: tuple[str, ...] = ORDER, spent: float = 0.0
) -> dict[str, Any]:
    """Runs all parts and returns what was written. ``spent``: how many of the seconds the build has taken."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic() - spent
    content: dict[str, Any] = {
        "machine": machine.describe(), "parts": [], "rates": {}, "rows": [],
        "peers": {name: importlib.util.find_spec(name) is not None for name in PEERS},
    }  # fmt: skip

    def done(part: Part) -> None:
        content["parts"].append(vars(part))
        content["claims"] = [c for name in ("cuda", "triton") for c in gpu_claims.judge(content["rows"], name)]
        results.save(out / "results.json", content)
        (out / "report.md").write_text(text(content))
        print(f"[{time.monotonic() - start:4.0f} s] {part.name}: {part.status}. {part.detail}", flush=True)

    if spent:
        done(Part("build", "ok", spent))
    kinds = ("triton", "cuda") if torch.cuda.is_available() else ("triton", "cuda", "native")
    able = [name for name in kinds if backends()[name] is None]
    for name in kinds:
        left = TESTS_SHARE * (seconds - spent) - (time.monotonic() - start - spent)
        done(run_tests(name, out, left / max(1, len(able)), tests))
        able = able[1:] if name in able else able
    for tool in SANITIZERS if torch.cuda.is_available() else ():
        done(run_sanitizer(tool, out, SANITIZED_SHARE * (seconds - spent), tests))
    for i, op in enumerate(ops):
        left = seconds - (time.monotonic() - start)
        part, found = run_benchmark(op, out, left / (len(ops) - i) if i else left / 3)
        content["rates"][op] = found["rates"]
        content["rows"] += found["rows"]
        done(part)
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, report.md and the logs")
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything (default: 500)")
    parser.add_argument(
        "--started", type=float, help="when the seconds began, in seconds since 1970: a build took those until now"
    )
    parser.add_argument("--tests", default=TESTS, help=f"a file or folder of tests (default: {TESTS})")
    parser.add_argument("--op", action="append", choices=OPERATIONS, help="time only this (may be repeated)")
    options = parser.parse_args(arguments)
    spent = 0.0 if options.started is None else max(0.0, time.time() - options.started)
    content = check(options.out, options.seconds, options.tests, tuple(options.op or (*ORDER, "models")), spent)
    print(f"\n{options.out / 'report.md'}\n")
    return int(any(part["status"] in ("failed", "out of time") for part in content["parts"]))


if __name__ == "__main__":
    sys.exit(main())
