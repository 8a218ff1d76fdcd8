"""While something is timed each thread keeps to one processor; rates and dtypes that a machine is given."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_bench import Pedantic

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import bench_generation, compare, generators, measure, memory, published, rates, report, scaling  # noqa: E402
from bench.generators import PEER, UNCACHED  # noqa: E402
from bench.measure import Bench, Contender, Work  # noqa: E402
from bench.rates import Rates  # noqa: E402
from bench.results import Row  # noqa: E402
from bench.threads import Threads, _of  # noqa: E402

several = pytest.mark.skipif(not Threads().able, reason="one processor, or a system that binds no threads")


class FixedRates(Rates):
    def sample(self, kind: str, nbytes: float = 0) -> float:
        return 100.0


def where(process: int) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in _of(process)]


@pytest.fixture
def idle():
    """Three more threads, and a child."""
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(3)]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    for thread in threads:
        thread.start()
    yield child
    ended.set()
    for thread in threads:
        thread.join()
    child.kill()
    child.wait()


@several
def test_each_thread_keeps_to_one_processor_while_it_is_timed_and_no_longer(idle):
    own, seen = os.getpid(), []
    before = where(own)
    first, *others = sorted(os.sched_getaffinity(0))

    def run() -> None:
        seen.append((where(own), where(idle.pid)))

    bench = Bench(quick=True, rates=FixedRates())
    contenders = [Contender(name, run, lambda: 0.0, 1.0, expected=99.0) for name in ("native", "peer")]
    rows = bench.compare(Pedantic(), "group", "case", contenders, Work("copy", bytes=1.0))
    assert [row.rounds_taken for row in rows] == [1, 1] and len(seen) == 2
    for mine, childs in seen:
        assert mine[0] == {first} and childs[0] == {first}
        turns = [{others[i % len(others)]} for i in range(len(mine) - 1)]
        assert mine[1:] == turns and len(mine) >= 4
    assert where(own) == before and where(idle.pid) == [{first, *others}]
    assert bench.threads.summary()["bound"] and not bench.threads.anew


@several
def test_who_begins_threads_in_its_calls_is_timed_again_with_its_caller_free():
    bench, seen, ended = Bench(quick=True, rates=FixedRates()), [], threading.Event()

    def run() -> None:
        thread = threading.Thread(target=ended.wait)
        thread.start()
        seen.append((os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id)))

    contender = Contender("peer", run, lambda: 0.0, 1.0, expected=99.0)
    (row,) = bench.compare(Pedantic(), "group", "case", [contender], Work("copy", bytes=1.0))
    ended.set()
    every = os.sched_getaffinity(0)
    assert len(seen) == 2 and len(seen[0][1]) == 1  # it began on its caller's processor
    assert seen[1] == (every, every) and row.rounds_taken == 1
    assert bench.threads.summary()["caller free, as threads begin"] == ["peer"]


def test_a_system_that_binds_no_threads_measures_all_the_same(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    bench, calls = Bench(quick=True, rates=FixedRates()), []
    contender = Contender("native", lambda: calls.append(1), lambda: 0.0, 1.0, expected=99.0)
    bench.compare(Pedantic(), "group", "case", [contender], Work("copy", bytes=1.0))
    assert calls == [1] and not bench.threads.summary()["bound"]


@pytest.mark.parametrize(("narrow", "wide", "kind"), [(900.0, 300.0, "bf16 gemm"), (2.0, 300.0, "sgemm")])
def test_16_bit_products_are_held_against_the_faster_rate(narrow, wide, kind, monkeypatch):
    monkeypatch.setattr(rates, "torch_matmul_rate", lambda dtype, rows: wide if dtype == torch.float32 else narrow)
    assert rates.product(torch.bfloat16) == kind and rates.product(torch.float32) == "sgemm"
    assert Work(kind, flops=6.0, bytes=1.0).floor(3.0) == 2.0 and Work("copy", flops=6.0, bytes=1.0).floor(1.0) == 1.0


@pytest.mark.parametrize(("taken", "calls"), [(1e-3, 10), (0.4, 2)])
def test_a_products_rate_is_its_best_of_several_short_calls(taken, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(rates, "seconds", lambda run: seen.append(1) or taken * (0.5 if len(seen) == 2 else 1.0))
    rates.torch_matmul_rate.cache_clear()
    assert rates.torch_matmul_rate(torch.float32, 3) == 2 * 3 * 1024**2 / (0.5 * taken)
    rates.torch_matmul_rate.cache_clear()
    assert len(seen) == calls


def test_the_rate_of_bf16_is_that_of_bf16_operands(monkeypatch):
    seen = []
    monkeypatch.setattr(rates, "_EDGE", 8)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append({t.dtype for t in (a, b, out)}))
    taken = Rates()
    assert taken.sample("bf16 gemm") > 0 and set.union(*seen) == {torch.bfloat16}
    assert taken.sample("sgemm") > 0 and seen[-1] == {torch.float32} and taken.history.keys() == {"bf16 gemm", "sgemm"}


def test_the_reading_says_what_the_run_measured():
    content = {"rates": {}, "claims": [], "rows": [], "exponents": [], "started": "2026-01-01", "seconds": 60.0}
    content["machine"] = {"device": "A", "threads": 2, "instruction_set": "", "versions": {}, "commit": "abc"}
    assert "of bf16 products too" in report.bench(content) and "keeps to one" not in report.bench(content)
    content |= {"rates": {"bf16 gemm": {"median": 9e11}}, "threads": {"bound": True}}
    assert "its bf16 matmul where" in report.bench(content) and "keeps to one processor" in report.bench(content)
    assert "900 GFLOP/s bf16 matmul" in report.bench(content)


@pytest.mark.parametrize("noise", [(1.0,), (1.0, 3.0, 2.0), (3.0, 3.0, 1.0, 1.0, 2.0, 2.0)])
@pytest.mark.parametrize("who", [PEER, UNCACHED])
def test_a_transformers_dtype_is_the_faster_one_at_its_own_length(who, noise, monkeypatch):
    """16 bits begin slower here and grow less, and any step but one of each may be disturbed. What is drawn from
    shorter contexts says nothing of a row, but without a cache, where a step of it takes too long."""
    cost = {"float32": (1e-3, 2e-6), "bfloat16": (4e-3, 1e-6)}
    contexts, disturbed, taken = [256, 2900, 3100, 4096, 131072], itertools.cycle(noise), []
    monkeypatch.setattr(generators, "decoder", lambda who, dtype, context: (dtype, context))

    def seconds(step: tuple[str, int]) -> float:
        taken.append(step)
        return next(disturbed) * (cost[step[0]][0] + cost[step[0]][1] * step[1])

    monkeypatch.setattr(generators, "seconds", seconds)
    generators.faster.cache_clear()
    found = [generators.dtype_of(who, context) for _ in range(2) for context in contexts]
    assert found == 2 * [*2 * ["float32"], *3 * ["bfloat16"]]
    tried = contexts[:4] if who == UNCACHED else contexts
    assert taken == [(dtype, context) for context in tried for dtype in 3 * ("bfloat16", "float32")]
    assert generators.dtype_of(generators.OURS, 5) == "bfloat16"
    generators.faster.cache_clear()


def test_steps_that_take_seconds_are_tried_once(monkeypatch):
    monkeypatch.setattr(generators, "decoder", lambda who, dtype, context: dtype)
    cost, taken = {"float32": 1.5, "bfloat16": 1.4}, []
    monkeypatch.setattr(generators, "seconds", lambda step: taken.append(step) or cost[step])
    generators.faster.cache_clear()
    assert generators.dtype_of(UNCACHED, 2048.0) == "bfloat16" and taken == ["bfloat16", "float32"]
    generators.faster.cache_clear()


def test_the_cached_rate_is_of_steps_in_one_dtype():
    rows = []
    for context, note, step in ((1024, "bfloat16", 0.5), (4096, "float32", 0.02), (16384, "float32", 0.05)):
        rows.append(Row("generation", f"{context} tokens of context", PEER, 8 * step, note=note, tokens_s=1 / step))
    content = {"rows": rows, "rates": {"sgemm": {"median": 1e11}, "read": {"median": 1e10}}}
    each = (0.05 - 0.02) / (16384 - 4096)
    size = scaling.counts.cache_bytes(scaling.PEER, 1, 4)
    assert scaling.cached_rate(content, 4).bytes["cache"] == pytest.approx(size / each)
    assert "cache" not in scaling.cached_rate(content, 2).bytes


@pytest.mark.parametrize(("factor", "flagged"), [(1.0, False), (1.6, True)])
def test_two_runs_with_noise_differ_only_where_the_code_does(factor, flagged, monkeypatch):
    """Times with some 10 % of noise, drawn anew in each run, as the rounds that interleave with a peer's take them."""
    make = torch.Generator().manual_seed(3)

    def run(slower: float) -> list[Row]:
        def take(contender: Contender) -> None:
            noise = 1 + 0.10 * float(torch.randn((), generator=make))
            contender.times.append(1e-3 * noise * (slower if contender.name == "native" else 1.0))

        monkeypatch.setattr(Contender, "take", take)
        bench = Bench(rates=FixedRates())
        monkeypatch.setattr(bench, "_rounds_for", lambda taken, judged: 15)
        rows = []
        for case in map(str, range(20)):
            contenders = [Contender(name, lambda: None, lambda: 0.0, 1.0) for name in ("native", "peer")]
            rows += bench.compare(Pedantic(), "op", case, contenders, Work("copy", bytes=0.1))
        return rows

    monkeypatch.setattr(measure, "_settle", lambda contender: 1e-3)
    before, after = run(1.0), run(factor)
    found = compare.slower(compare.changes(before, after))
    for row in after:
        assert row.times_ours == 1.0 if row.who == "native" else abs(row.times_ours * factor - 1) < 0.2
    assert {row.who for row, _, _ in found} <= {"native"}
    assert len(found) == (20 if flagged else 0)


def test_threads_of_a_process_that_has_ended_are_none():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    time.sleep(0.01)
    assert _of(child.pid) == []


def test_peak_memory_is_what_a_call_adds():
    kept = torch.ones(2**23)  # 32 MiB that were there before

    def run(mebibytes: int) -> None:
        for _ in range(3):  # one after the other: none is held twice
            torch.ones(mebibytes * 2**18).add_(kept[0])

    bench = Bench(quick=True, rates=FixedRates())
    sizes = {"native": 96, "peer": 40}  # such tensors are mapped, smaller ones may stay with the allocator
    contenders = [Contender(name, lambda size=size: run(size), lambda: 0.0, 1.0) for name, size in sizes.items()]
    rows = bench.compare(Pedantic(), "group", "case", contenders, Work("copy", bytes=1.0), peaks=True)
    for row, size in zip(rows, sizes.values(), strict=True):
        assert size * 2**20 <= row.peak_bytes + 2**20 <= (size + 4) * 2**20
    assert [r.peak_bytes for r in bench.compare(Pedantic(), "g", "c", contenders, Work("copy", bytes=1.0))] == [
        None
    ] * 2


def test_a_system_that_tells_no_memory_leaves_it_out(monkeypatch):
    def refuse() -> None:
        raise PermissionError("no")

    monkeypatch.setattr(memory, "_reset_height", refuse)
    bench = Bench(quick=True, rates=FixedRates())
    contender = Contender("native", lambda: None, lambda: 0.0, 1.0)
    (row,) = bench.compare(Pedantic(), "group", "case", [contender], Work("copy", bytes=1.0), peaks=True)
    assert row.seconds and row.peak_bytes is None and row.reason is None


def test_memory_is_measured_two_children_abreast(monkeypatch):
    """One that fails stops none of the others; a peer's failure is its row's note, ours an error."""
    both, told = threading.Barrier(2), []

    def peak(task: str, who: str, context: int, steps: int) -> int:
        told.append((task, who, context, steps))
        both.wait(timeout=20)
        if who == "broken":
            raise RuntimeError("no room")
        return steps

    monkeypatch.setattr(memory, "peak", peak)
    rows = [Row("g", "c", who, 1.0) for who in ("broken", "native", "peer", "last")]
    rows.insert(1, Row("g", "c", "not timed"))
    bench = Bench(rates=FixedRates())
    bench.peaks(Pedantic(), rows, "task", lambda row: {"steps": len(row.who)}, context=7)
    assert sorted(told) == sorted(("task", row.who, 7, len(row.who)) for row in rows if row.seconds)
    assert [row.peak_bytes for row in rows] == [None, None, 6, 4, 4] and rows[0].note == "its memory: no room"
    rows[0].times_ours = 1.0
    with pytest.raises(RuntimeError, match="no room"):
        bench.peaks(Pedantic(), rows[:3], "task", lambda row: {"steps": 9}, context=7)
    assert rows[2].peak_bytes == 9


@pytest.mark.parametrize("quick", [False, True])
def test_every_memory_is_asked_for_once(quick, monkeypatch):
    monkeypatch.setattr(bench_generation, "dtype_of", lambda who, context: "float32")
    monkeypatch.setattr(memory, "whole", lambda task, tokens: tokens)
    monkeypatch.setattr(memory, "peak", lambda task, who, context, steps, dtype: context + steps)
    bench = Bench(quick=quick, rates=FixedRates())
    bench_generation.test_memory(bench)
    found = [(row.case, row.who, row.peak_bytes, row.note) for row in bench.rows]
    small, at = "Mamba-2, 2 layers of width 64", published.MEMORY_CASE
    flat = [(f"decode {tokens} tokens", small, tokens, "") for tokens in (1024, 131072)]
    dtypes = {published.OURS: "bfloat16", PEER: "bfloat16", UNCACHED: "float32"}
    steps = {published.OURS: 2, PEER: 2, UNCACHED: 1}
    own = [(at, who, 23 * 1024 - 1 + steps[who], f"{dtypes[who]} weights") for who in dtypes]
    assert found == (flat[:1] if quick else flat + own)
