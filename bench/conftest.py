"""``pytest bench/``: options, the session's rows, progress, the tables at the end, the file that keeps them."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from . import claims, machine, results, tables
from .measure import Bench

HERE = Path(__file__).resolve().parent
_SESSION = pytest.StashKey["Session"]()


class Session:
    """What one run of pytest gathers."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick = config.getoption("--quick")
        self.folder = Path(config.getoption("--results") or results.FOLDER)
        self.started, self.clock = datetime.now(timezone.utc), time.perf_counter()
        self.bench = Bench(self.quick)
        self.collected: set[str] = set()
        self.done = 0
        self.broken = False
        self.total = 0
        self.shown = 0

    def complete(self) -> bool:
        """Whether every benchmark file took part, everything ran and nothing broke."""
        return (
            not self.broken
            and self.done == self.total
            and self.collected == {path.name for path in HERE.glob("bench_*.py")}
        )

    def content(self) -> dict:
        rows, scores = self.bench.rows, claims.demo_scores()
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.clock, 1),
            "quick": self.quick,
            "complete": self.complete(),
            "machine": machine.describe(),
            "rates": self.bench.rates.summary(),
            "demo": scores,
            "claims": claims.judge(rows, scores),
            "exponents": claims.exponents(rows),
            "rows": results.as_json(rows),
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("omnimamba benchmarks")
    group.addoption("--quick", action="store_true", help="a few small cases with few rounds: ends in 3 minutes")
    group.addoption("--results", metavar="DIR", help="where results are kept (default: bench/results)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out by --quick")
    config.stash[_SESSION] = Session(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if config.getoption("--quick"):
        dropped = [item for item in mine if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    session = config.stash[_SESSION]
    session.collected = {item.path.name for item in mine}
    session.total = len(items)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """The session's measurements. A wrong result, ours or a peer's, makes the test fail once its row is recorded."""
    found = request.config.stash[_SESSION].bench
    first = len(found.rows)
    yield found
    wrong = [row for row in found.rows[first:] if row.reason and row.reason.startswith("failed its check")]
    assert not wrong, "; ".join(f"{row.group}, {row.case}, {row.who}: {row.reason}" for row in wrong)


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
        if report.when != "teardown":
            return
        session.done += 1
        self.out.write("\n")
        for row in session.bench.rows[session.shown :]:
            self.out.write_line(_line(row))
        session.shown = len(session.bench.rows)
        self.out.write_line(bar(session.done, session.total, time.perf_counter() - session.clock))


def _line(row: results.Row) -> str:
    shown = tables.time_of(row), tables.floor_of(row), tables.ratio_of(row)
    return f"{row.group}, {row.case}: {row.who}: " + ", ".join(filter(None, shown))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Progress(session.config), "omnimamba-progress")
    torch.set_num_threads(torch.get_num_threads())


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["omnimamba"] = machine.describe()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not session.bench.rows:
        return
    content = session.content()
    date = session.started.strftime("%Y-%m-%d")
    name = results.file_name(date, content["machine"]["commit"], quick=session.quick, complete=content["complete"])
    path = session.folder / machine.slug(content["machine"]["device"]) / name
    results.save(path, content)
    content["rows"] = session.bench.rows
    for title, text in tables.sections(content).items():
        terminalreporter.section(title)
        terminalreporter.write_line(text)
    terminalreporter.write_line(f"\nkept in {path}")
