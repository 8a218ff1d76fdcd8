"""The one way anything is timed here.

Contenders are checked first: one whose result is wrong gets a row without a time. The rest run in turn within each
round (rate, peer, peer, rate, ours, rate), so that a ratio compares neighbours in time. Rounds in which the rate itself
was slow are dropped, but never below the best three; medians are taken of what is left. What a promise is judged on
has the rate between its peers too, at least three rounds however late it is, and more where too few were quiet.
"""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnimamba_kernels.backends import NAMES

from . import memory
from .rates import PRODUCTS, Rates, seconds
from .results import Row
from .threads import Threads

SLOW_RATE = 0.85
"""A round counts if each rate in it was at least this share of the upper quartile of the case's rates."""
ENOUGH = 3
"""Rounds that are kept of each contender, where it has as many: a promise is judged on no fewer."""
_RETRIES = 20.0
"""Seconds that a case which is judged may take for rounds beyond those planned, until enough were quiet."""
_PATIENCE = 90.0
"""Seconds after whose check a peer is not timed, unless it was known to take long."""
_LOOP_FOR = 20e-3
"""Calls shorter than this many seconds are repeated within a round."""

_LONG = 3.0
_SHORT = 0.3
"""Seconds of a round below which there are ENOUGH always: fewer show no noise, and bench.compare could not judge."""
_STOPPED = "an error stopped it"
WRONG = "failed its check"
_OF_A_CHILD = (RuntimeError, subprocess.TimeoutExpired)
"""What the measurement of a peer's memory may end in, and its row still stand."""
_REFUSAL = "cannot run: "
"""What a RuntimeError says where an implementation does not cover a case; any other error is one."""


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes moved, FLOPs, and which rate the floor is taken from."""

    against: str
    bytes: float = 0.0
    flops: float = 0.0
    footprint: float = 0.0
    """Bytes that the calls cycle through, where more than one call's: the copy finds its data as far away."""

    def floor(self, rate: float) -> float:
        """Seconds at ``rate``, which is in FLOP/s for a product and in byte/s for copy and read."""
        return (self.flops if self.against in PRODUCTS else self.bytes) / rate


@dataclass
class Contender:
    """``run`` is timed; ``check`` gives the relative error of what it computes, ``bound`` the largest accepted."""

    name: str
    run: Callable[[], Any]
    check: Callable[[], float]
    bound: float
    work: Work | None = None
    """Its own floor, where it is not the case's."""
    calls: int = 1
    """Calls within one round."""
    expected: float = 0.0
    """Seconds of a run, where known beforehand."""
    checked: float = 0.0
    """Seconds of the check, which is a run at least, and often much besides: a reference, a compilation."""
    times: list[float] = field(default_factory=list)
    """Seconds a call, one entry a round."""
    around: list[float] = field(default_factory=list)
    """The rate of its floor in each of its rounds: the mean of a sample before it and of one after."""
    refused: str | None = None
    """Why it does not run, or stopped after it had passed its check."""
    once: bool = False
    """Whether one round does, whatever rests on it: it takes minutes, and no noise comes near what is promised."""
    peer: bool = False
    """Whether it is somebody else's: that may fail in any way, and its words are its row's reason."""
    after: Callable[[Any], float] | None = None
    """The error of what its last timed call returned, which ``bound`` holds for too."""
    found: Any = None
    """What that was, until it has been looked at."""

    def attempt(self, what: Callable[[], float | None]) -> float | None:
        """``what()``, or None where the contender has refused or does so now; any other error of ours is one."""
        if self.refused is None:
            try:
                return what()
            except Exception as error:
                self.refused = _reason(error, self.peer)
        return None

    def take(self) -> None:
        self.times.append(seconds(self.repeat) / self.calls)

    def repeat(self) -> None:
        self.again(self.run, self.calls)

    def again(self, run: Callable[[], Any], calls: int) -> None:
        """The call so many times; what the last of them returned is kept where ``after`` asks for it."""
        for _ in range(calls):
            self.found = None  # before the next, which may then have its memory
            found = run()
            self.found = found if self.after else None
            del found


def relative_error(got: Tensor, exact: Tensor) -> float:
    """``|got - exact| / |exact|`` in the 2-norm, in fp64; infinite if anything is not finite."""
    got, exact = got.detach().double(), exact.detach().double()
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return math.inf
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def worst_error(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    return max(relative_error(g, e) for g, e in zip(got, exact, strict=True))


class Bench:
    """A session's rates and rows."""

    def __init__(
        self, quick: bool = False, rates: Rates | None = None, limit: float = math.inf, end: float = math.inf
    ) -> None:
        self.quick = quick
        self.until = time.perf_counter() + limit
        """When time runs short: from then on what no promise rests on is timed twice, or once where it is long."""
        self.end = time.perf_counter() + end
        """From then on no round is added because others were disturbed."""
        self.rates = rates or Rates()
        self.threads = Threads()
        self.rows: list[Row] = []
        self.ours: set[str] = set(NAMES)
        """Names of contenders that are no peers."""
        self.fewest, self.most = (2, 5) if quick else (3, 15)
        self.budget = 0.6 if quick else 2.0
        """Seconds a contender may take over all its rounds, beyond the fewest."""

    def absent(self, group: str, case: str, who: str, reason: str) -> None:
        self.rows.append(Row(group, case, who, reason=reason))

    def compare(
        self, benchmark: Any, group: str, case: str, contenders: list[Contender], work: Work,
        *, tokens: int = 0, note: str = "", peaks: bool = False, judged: bool = False,
    ) -> list[Row]:  # fmt: skip
        """Times the contenders; ratios are to the first of ours that passes its check, and there are none without it.
        ``tokens`` a call give tokens/s. With ``peaks`` each is called once more, for what a call adds in memory.
        ``judged``: a promise rests on these rows.

        The contenders of a backend that cannot run, or whose result is wrong, are recorded with the reason.
        """
        benchmark.group = group
        rows = {c.name: Row(group, case, c.name, note=note, reason=_STOPPED) for c in contenders}
        for contender in contenders[1:]:
            contender.peer = contender.peer or contender.name not in NAMES
        self.ours |= {c.name for c in contenders if not c.peer}
        self.rows += rows.values()
        passed = [c for c in contenders if _admit(c, rows[c.name])]
        if not passed:
            return list(rows.values())
        alone = {c.name: c.attempt(lambda c=c: _settle(c)) for c in passed}
        wanted = {
            c.name: self._rounds_for(alone[c.name], judged and not c.once) if alone[c.name] else 0 for c in passed
        }
        subject = next((c for c in passed if not c.peer), passed[0])
        peers = [c for c in passed if c is not subject]
        probes = self._rounds(benchmark, subject, peers, wanted, work, judged)
        right = {c.name: _confirm(c, rows[c.name]) for c in passed}
        for contender in passed:
            if right[contender.name]:
                first = subject if right[subject.name] else None
                _fill(rows[contender.name], contender, first, probes, work, tokens)
                if peaks and rows[contender.name].seconds < _LONG:
                    rows[contender.name].peak_bytes = contender.attempt(lambda c=contender: memory.added(c.run)) or None
        _publish(benchmark, list(rows.values()))
        return list(rows.values())

    def _rounds_for(self, taken: float, judged: bool = False) -> int:
        """As many as the budget pays for, three at least; two of what takes over 7 s, one of what takes over 15 s.

        Once the run is short of time two, and one of what takes over 3 s. Always enough of what is judged and of what
        is short.
        """
        enough = ENOUGH if taken < _SHORT or (judged and not self.quick) else 1
        if time.perf_counter() > self.until:
            return max(enough, 2 if taken < _LONG else 1)
        fewest = max(enough, self.fewest if taken < 7 else 2 if taken < 15 else 1)
        return min(self.most, max(fewest, int(self.budget / taken)))

    def peaks(
        self, benchmark: Any, rows: list[Row], task: str,
        each: Callable[[Row], dict[str, Any]] = lambda row: {}, **arguments: Any,
    ) -> None:  # fmt: skip
        """Adds peak memory to the rows that have a time; ``task`` is one of bench.memory's, ``each`` gives a row's own
        arguments."""
        timed = [row for row in rows if row.seconds]
        wanted = [functools.partial(memory.peak, task, who=row.who, **arguments, **each(row)) for row in timed]
        failed = []
        for row, found in zip(timed, memory.abreast(wanted), strict=True):
            error = found.exception()
            if error is None:
                row.peak_bytes = found.result()
            elif row.times_ours == 1.0 or row.who in NAMES or not isinstance(error, _OF_A_CHILD):
                failed.append(error)
            else:
                row.note = f"{row.note}; its memory: {error}".lstrip("; ")
        if failed:
            raise failed[0]
        _publish(benchmark, rows)

    def against_dram(self, benchmark: Any, rows: list[Row], work: Work) -> None:
        """Adds the share of the speed of a copy far larger than the caches, where the case itself may fit in one."""
        rate = statistics.median(self.rates.sample("far copy") for _ in range(3))
        for row in rows:
            if row.seconds:
                row.far_share = work.bytes / rate / row.seconds
        _publish(benchmark, rows)

    def _rounds(
        self, benchmark: Any, subject: Contender, peers: list[Contender], wanted: dict[str, int], work: Work,
        judged: bool = False,
    ) -> list[list[float]]:  # fmt: skip
        """Times them all. The case's rates of each round, in the order in which they were taken: ours is between the
        last two; a peer with a floor of another kind has that kind's on both sides."""
        probes: list[list[float]] = []
        retries, planned = judged and not self.quick, max(wanted.values())
        ends = min(time.perf_counter() + _RETRIES, self.end)

        def sample(of: Work = work) -> float:
            return self.rates.sample(of.against, of.footprint or of.bytes)

        def take(contender: Contender) -> None:
            self.threads.take(contender.name, contender.take, contender.times.pop)

        def lacks(contender: Contender) -> bool:
            """Whether it was there so far, and too few of its rounds were quiet."""
            there = len(contender.times) == len(probes) and not contender.refused and not contender.once
            return there and len(quiet_rounds(probes, enough=0)) < ENOUGH

        def goes_on(peer: Contender) -> bool:
            return len(probes) < wanted[peer.name] or (retries and time.perf_counter() < ends and lacks(peer))

        def setup() -> None:
            rates, turns = [probes[-1][-1] if probes else sample()], []
            for peer in [peer for peer in peers if goes_on(peer)]:
                if judged and turns:
                    rates.append(sample())
                own = peer.work if peer.work and peer.work.against != work.against else None
                turns.append((peer, len(rates), own and sample(own)))
                peer.attempt(lambda peer=peer: take(peer))
                if own:
                    peer.around.append((turns[-1][2] + sample(own)) / 2)
            probes.append([*rates, sample()])
            for peer, i, apart in turns:
                if apart is None:
                    peer.around.append((probes[-1][i - 1] + probes[-1][i]) / 2)

        def teardown() -> None:
            probes[-1].append(sample())
            subject.around.append((probes[-1][-2] + probes[-1][-1]) / 2)

        with self.threads.bound():
            start = time.perf_counter()
            benchmark.pedantic(lambda: take(subject), setup=setup, teardown=teardown, rounds=planned)
            now = time.perf_counter()
            one, ends = (now - start) / planned, min(now + _RETRIES, self.end)
            while retries and time.perf_counter() + one < ends and any(lacks(c) for c in (subject, *peers)):
                setup()
                take(subject)
                teardown()
        for rates in probes[len(subject.around) :]:  # with timing disabled pytest-benchmark runs no teardown
            subject.around.append(rates[-1])
        return probes


def _publish(benchmark: Any, rows: list[Row]) -> None:
    """Hands pytest-benchmark what its own JSON should hold of each contender."""
    for row in rows:
        benchmark.extra_info[row.who] = {k: v for k, v in vars(row).items() if v not in (None, "")}


def _reason(error: Exception, peer: bool) -> str:
    """What a refusal says, or a peer's error; an error of ours that is no refusal is raised again."""
    said = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, RuntimeError) and _REFUSAL in said:
        return said.split(_REFUSAL)[-1]
    if not peer:
        raise error
    return f"{type(error).__name__}: {said}"


def _admit(contender: Contender, row: Row) -> bool:
    """Whether the contender can run and is right; fills in the error or the reason."""
    start, row.error_bound = time.perf_counter(), contender.bound
    row.error = contender.attempt(contender.check)
    if contender.refused:
        row.reason, row.error_bound = contender.refused, None
        return False
    if not _right(row):
        return False
    contender.checked = time.perf_counter() - start
    if contender.peer and contender.checked > _PATIENCE and not contender.expected:
        row.reason = contender.refused = f"its check alone took {contender.checked:.0f} s"
        return False
    return True


def _confirm(contender: Contender, row: Row) -> bool:
    """Whether nothing stopped it while it was timed, and what it then returned is right too."""
    if contender.after and contender.times:
        error = contender.attempt(lambda: contender.after(contender.found))
        row.error, contender.found = row.error if error is None else max(error, row.error), None
    row.reason = contender.refused
    return not contender.refused and _right(row)


def _right(row: Row) -> bool:
    """Whether its error is within the bound; says so where it is not."""
    if row.error <= row.error_bound:
        return True
    row.reason = f"{WRONG}: relative error {row.error:.1e}, at most {row.error_bound:.0e} accepted"
    return False


def _settle(contender: Contender) -> float:
    """Warms up, which a long run needs not, and sets how many calls a round needs for the clock. Seconds of a round."""
    if contender.expected > _LONG:
        return max(contender.expected, contender.checked)
    taken = seconds(contender.run)
    if taken < _LOOP_FOR:
        taken = min(taken, *(seconds(contender.run) for _ in range(3)))
        contender.calls = min(1000, math.ceil(_LOOP_FOR / taken))
    return taken * contender.calls


def quiet_rounds(probes: list[list[float]], taken: int | None = None, enough: int = 1) -> list[int]:
    """Of the first ``taken`` rounds those in which each rate was fast; the ``enough`` with the best rates at least."""
    rates = sorted(rate for rates in probes for rate in rates)
    worst = [min(rates) for rates in probes[:taken]]
    kept = [i for i, rate in enumerate(worst) if rate >= SLOW_RATE * rates[int(0.75 * len(rates))]]
    best = sorted(range(len(worst)), key=lambda i: -worst[i])[:enough]
    return kept if len(kept) >= enough else sorted(best)


def spread(values: list[float]) -> float | None:
    """Half the distance between the quartiles over the median; None of fewer than three values, which show no noise."""
    if len(values) < 3:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _fill(
    row: Row, contender: Contender, subject: Contender | None, probes: list[list[float]], work: Work, tokens: int
) -> None:
    work, row.reason = contender.work or work, None
    mine, rate = quiet_rounds(probes, len(contender.times), ENOUGH), contender.around
    row.seconds = statistics.median(contender.times[i] for i in mine)
    row.rounds, row.rounds_taken = len(mine), len(contender.times)
    row.gb_s = work.bytes / row.seconds / 1e9 or None
    row.gflop_s = work.flops / row.seconds / 1e9 or None
    row.floor, row.rate = work.against, statistics.median(rate[i] for i in mine)
    row.floor_share = statistics.median(work.floor(rate[i]) / contender.times[i] for i in mine)
    row.spread = spread([contender.times[i] / work.floor(rate[i]) for i in mine])
    if subject and not subject.peer:  # else none of ours has a time
        row.times_ours = statistics.median(contender.times[i] / subject.times[i] for i in mine)
    row.tokens_s = tokens / row.seconds if tokens else None
