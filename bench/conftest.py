"""``pytest bench/``: options, the session's rows, progress, the tables at the end, the file that keeps them."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from . import claims, machine, results, scaling, tables
from .gpu_run import GpuRun
from .measure import WRONG, Bench

HERE = Path(__file__).resolve().parent
_SESSION = pytest.StashKey["Session"]()
_LEFT_OUT = pytest.StashKey[bool]()
WHOLE, QUICK, ON_GPU = 30, 3, 9
"""Minutes that a run should end in: on a CPU, with --quick, on a GPU."""
GPU_FILE = "bench_gpu.py"
"""All that a run on a GPU has, and the only file that one on a CPU has not."""
ORDER = (
    "bench_ssd_scan.py", "bench_transformers.py", "bench_lora_linear.py", "bench_generation.py",
    "bench_causal_conv1d.py", "bench_gated_norm.py", "bench_state_update.py", "bench_mamba_mixer.py", "bench_layer.py",
    "bench_omnimamba.py",
)  # fmt: skip
"""What promises rest on first, but for what takes long."""
FULL_ROUNDS, ADDED_ROUNDS = 0.15, 0.6
"""Shares of them in which contenders are timed in as many rounds as their own budget pays for, then in few; and in
which rounds are added where promises rest on too few quiet ones."""


class Session:
    """What one run of pytest gathers."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick = config.getoption("--quick")
        self.gpu = {"cpu": False, "gpu": True}.get(config.getoption("--device"), torch.cuda.is_available())
        self.folder = Path(config.getoption("--results") or results.FOLDER)
        self.started, self.clock = datetime.now(timezone.utc), time.perf_counter()
        self.promised = QUICK if self.quick else ON_GPU if self.gpu else WHOLE
        """Minutes, whatever ``--minutes`` allows."""
        self.minutes = config.getoption("--minutes") or self.promised
        allowed = 60 * self.minutes
        self.bench = Bench(self.quick, limit=FULL_ROUNDS * allowed, end=ADDED_ROUNDS * allowed)
        self.on_gpu = GpuRun(self.bench, 60 * self.minutes)
        self.machine = machine.describe(gpu=self.gpu)
        self.collected: set[str] = set()
        self.chosen = False
        """Whether some benchmarks were left out by -k, -m or --deselect, or are not timed, by options."""
        self.silent = False
        """Whether a benchmark has left no row at all."""
        self.done = 0
        self.broken = False
        self.total = 0
        self.shown = 0
        self.durations: dict[str, float] = {}
        """Seconds of each benchmark, its preparation and checks included."""

    def complete(self) -> bool:
        """Whether every benchmark took part, everything ran, in time, and nothing broke."""
        return (
            not (self.broken or self.silent)
            and self.on_gpu.whole()
            and not self.chosen
            and self.done == self.total
            and self.collected == files(self.gpu)
            and (not self.gpu or torch.cuda.is_available())
        )

    def path(self, complete: bool) -> Path:
        date, commit = self.started.strftime("%Y-%m-%d"), self.machine["commit"]
        name = results.file_name(date, commit, quick=self.quick, complete=complete)
        return self.folder / machine.slug(self.machine["device"]) / name

    def keep(self) -> dict:
        """Writes what there is so far: a run that is killed leaves what it had, under the name of a partial one."""
        content = self.content()
        results.save(self.path(content["complete"]), content)
        if content["complete"]:
            self.path(False).unlink(missing_ok=True)
        return content

    def content(self) -> dict:
        rows, scores, rates = self.bench.rows, claims.demo_scores(), self.bench.rates.summary()
        judged = self._judged(scores, rates)
        if self.complete():
            judged.append(asdict(claims.in_time(time.perf_counter() - self.clock, self.promised, self.quick)))
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.clock, 1),
            "quick": self.quick,
            "gpu": self.gpu,
            "complete": self.complete(),
            "minutes_allowed": self.minutes,
            "machine": self.machine,
            "threads": self.bench.threads.summary(),
            "rates": rates,
            "demo": scores,
            "claims": judged,
            "exponents": claims.exponents(rows),
            "durations": self.durations,
            "parts": [asdict(part) for part in self.on_gpu.parts],
            "rows": results.as_json(rows),
        }

    def _judged(self, scores: dict[str, float], rates: dict[str, dict[str, float]]) -> list[dict]:
        """What is promised. Where it cannot be judged for an error, that is said in its place, and the rows are kept
        all the same."""
        rows = self.bench.rows
        try:
            if self.gpu:
                return self.on_gpu.claims()
            return [*claims.judge(rows, scores), asdict(scaling.claim({"rows": rows, "rates": rates}))]
        except Exception as error:
            return [asdict(claims.Claim("all that is promised", "to be judged", repr(error), None))]


def files(gpu: bool) -> set[str]:
    """Those that a whole run has."""
    return {path.name for path in HERE.glob("bench_*.py") if (path.name == GPU_FILE) == gpu}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("omnimamba benchmarks")
    group.addoption("--quick", action="store_true", help="a few small cases with few rounds: ends in 3 minutes")
    group.addoption(
        "--device", choices=("cpu", "gpu"), help="what is measured (default: a GPU where there is one). A GPU's rows "
        "without a GPU are small ones, and no whole run",
    )  # fmt: skip
    group.addoption("--results", metavar="DIR", help="where results are kept (default: bench/results)")
    group.addoption(
        "--minutes", type=float, metavar="M",
        help=f"what a run should end in (default: {WHOLE}, quick: {QUICK}, on a GPU: {ON_GPU}): once "
        f"{FULL_ROUNDS:.0%} of it is gone, all but what promises rest on is timed once or twice",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'omnimamba[bench]'")
    minutes = config.getoption("--minutes")
    if minutes is not None and not 0 < minutes < math.inf:
        raise pytest.UsageError(f"--minutes: got {minutes:g}, expected more than 0")
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("the benchmarks run one after the other: leave out -n, which times them side by side")
    session = config.stash[_SESSION] = Session(config)
    session.chosen = any(config.getoption(name, False) for name in ("benchmark_disable", "benchmark_skip"))
    if not config.option.collectonly:
        _can_write(session.path(False).parent)


def _can_write(folder: Path) -> None:
    """Says at the beginning, not after half an hour, where nothing can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(f"results cannot be kept in {folder}: {error.strerror}; see --results") from error


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not item.stash.get(_LEFT_OUT, False):
            item.config.stash[_SESSION].chosen = True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    session, quick = config.stash[_SESSION], config.getoption("--quick")
    wanted = files(session.gpu)
    dropped = [i for i in mine if i.path.name not in wanted or (quick and i.get_closest_marker("full"))]
    for item in dropped:
        item.stash[_LEFT_OUT] = True
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
    mine.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER))
    items[:] = [item for item in items if item not in mine] + [item for item in mine if item in items]
    session.collected = {item.path.name for item in mine if item not in dropped}
    session.total = len(items)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """The session's measurements. A wrong result of ours makes the test fail once its row is recorded; a peer's has no
    time, and its row says why."""
    found = request.config.stash[_SESSION].bench
    first = len(found.rows)
    yield found
    wrong = [row for row in found.rows[first:] if row.who in found.ours and (row.reason or "").startswith(WRONG)]
    assert not wrong, "; ".join(f"{row.group}, {row.case}, {row.who}: {row.reason}" for row in wrong)


@pytest.fixture
def gpu_run(request: pytest.FixtureRequest) -> GpuRun:
    return request.config.stash[_SESSION].on_gpu


def bar(done: int, total: int, seconds: float, width: int = 30) -> str:
    """How far a run is, and how long the rest takes if a benchmark takes as long as those that are done."""
    full = width * done // max(total, 1)
    left = seconds / done * (total - done) if done else 0.0
    clock = lambda s: f"{int(s) // 60}:{int(s) % 60:02}"  # noqa: E731
    return f"[{'#' * full}{'.' * (width - full)}] {done}/{total}, {clock(seconds)} gone, about {clock(left)} left"


class _Progress:
    """Prints each row as soon as it is there, then how far the run is."""

    def __init__(self, config: pytest.Config) -> None:
        self.session = config.stash[_SESSION]
        self.out = config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self, report) -> None:
        session = self.session
        session.broken |= report.failed
        spent = session.durations.get(report.nodeid, 0.0) + report.duration
        session.durations[report.nodeid] = round(spent, 2)
        if report.when != "teardown":
            return
        session.done += 1
        mine = Path(report.nodeid.partition("::")[0]).name in session.collected
        session.silent |= mine and not session.gpu and len(session.bench.rows) == session.shown
        self.out.write("\n")
        for row in session.bench.rows[session.shown :]:
            self.out.write_line(_line(row))
        session.shown = len(session.bench.rows)
        if session.bench.rows:
            self._keep()
        self.out.write_line(bar(session.done, session.total, time.perf_counter() - session.clock))

    def _keep(self) -> None:
        """Neither a disk that is full for a while nor half the rows that a claim wants must end a run."""
        try:
            self.session.keep()
        except Exception as error:
            self.out.write_line(f"not kept so far: {error if isinstance(error, OSError) else repr(error)}")


def _line(row: results.Row) -> str:
    shown = tables.explained(row), tables.floor_of(row), tables.ratio_of(row)
    return f"{row.group}, {row.case}: {row.who}: " + ", ".join(filter(None, shown))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Progress(session.config), "omnimamba-progress")
    torch.set_num_threads(torch.get_num_threads())


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["omnimamba"] = machine.describe(gpu=False)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not session.bench.rows:
        return
    try:
        content = session.keep()
        said = f"kept in {session.path(content['complete'])}"
    except OSError as error:
        content, said = session.content(), f"NOT kept: {error}"
    content["rows"] = session.bench.rows
    for title, text in tables.sections(content).items():
        terminalreporter.section(title)
        terminalreporter.write_line(text)
    terminalreporter.write_line(f"\n{said}")
