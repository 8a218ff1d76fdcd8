"""A run of the benchmarks as a session: what it keeps when it is cut off, how it minds its time, what it says of files
that are none."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import bench_layer, compare, conftest, measure, report, results  # noqa: E402
from bench.baselines import attention  # noqa: E402
from bench.measure import Bench  # noqa: E402
from bench.results import Row  # noqa: E402


@pytest.fixture(params=[False])
def session(tmp_path, request) -> conftest.Session:
    """A whole run, or a quick one."""
    options = {"--quick": request.param, "--device": "cpu", "--results": str(tmp_path), "--minutes": None}
    found = conftest.Session(SimpleNamespace(getoption=options.get))
    found.collected = conftest.files(gpu=False)
    found.total = 2
    found.bench.rows.append(Row("op", "case", "native", 1.0, times_ours=1.0))
    return found


def kept(session) -> list[str]:
    return sorted(path.name for path in session.path(True).parent.iterdir())


def test_a_run_that_is_cut_off_leaves_what_it_had_and_a_whole_one_leaves_one_file(session):
    session.done = 1
    session.keep()
    (name,) = kept(session)
    assert name.endswith("-partial.json") and not json.loads(session.path(False).read_text())["complete"]
    session.done = 2
    session.keep()
    (name,) = kept(session)
    assert "partial" not in name and results.load(session.path(True))["rows"][0].seconds == 1.0


def test_a_disk_that_is_full_does_not_end_a_run(session, monkeypatch):
    def full(path, content):
        raise OSError("No space left on device")

    said = []
    monkeypatch.setattr(results, "save", full)
    progress = conftest._Progress.__new__(conftest._Progress)
    progress.session, progress.out = session, SimpleNamespace(write=said.append, write_line=said.append)
    report = SimpleNamespace(nodeid="a", failed=False, duration=1.0, when="teardown")
    progress.pytest_runtest_logreport(report)
    assert session.done == 1 and "not kept so far: No space left on device" in said


@pytest.mark.parametrize(
    "change", [{"chosen": True}, {"broken": True}, {"silent": True}, {"done": 1}, {"collected": {"bench_layer.py"}}]
)
def test_what_left_something_out_is_partial(session, change):
    session.done = 2
    assert session.complete()
    vars(session).update(change)
    assert not session.complete()


@pytest.mark.parametrize(
    ("session", "what", "minutes"), [(False, "a whole run", 30), (True, "a quick run", 3)], indirect=["session"]
)
def test_a_run_of_either_kind_is_held_to_its_minutes(session, what, minutes, monkeypatch):
    """Once all of it is done; before that nothing is said of it."""
    judged = lambda: [c for c in session.content()["claims"] if "run of the benchmarks" in c["what"]]  # noqa: E731
    assert judged() == []
    session.done, start = session.total, session.clock
    for over, met in ((-1, True), (1, False)):
        monkeypatch.setattr(time, "perf_counter", lambda over=over: start + 60 * minutes + over)
        (claim,) = judged()
        assert (claim["what"], claim["required"]) == (f"{what} of the benchmarks", f"at most {minutes} min")
        assert claim["passed"] is met


def test_a_run_that_is_allowed_more_is_held_to_the_same_minutes(session, monkeypatch):
    session.minutes, session.done, start = 60.0, session.total, session.clock
    monkeypatch.setattr(time, "perf_counter", lambda: start + 60 * 31)
    (claim,) = [c for c in session.content()["claims"] if "whole run" in c["what"]]
    assert claim["required"] == "at most 30 min" and claim["passed"] is False


def progress_of(session) -> conftest._Progress:
    progress = conftest._Progress.__new__(conftest._Progress)
    progress.session, progress.out = session, SimpleNamespace(write=lambda _: None, write_line=lambda _: None)
    return progress


def test_a_benchmark_without_a_row_makes_a_partial_run(session):
    """As where all are skipped by an option of pytest-benchmark's."""
    progress = progress_of(session)
    for name, rows, silent in (
        ("bench/bench_layer.py", 1, False),
        ("tests/a.py", 0, False),
        ("bench/bench_layer.py", 0, True),
    ):
        session.bench.rows += [Row("op", "another", "native")] * rows
        progress.pytest_runtest_logreport(
            SimpleNamespace(nodeid=f"{name}::a", failed=False, duration=1.0, when="teardown")
        )
        assert session.silent is silent


@pytest.mark.parametrize("broken", ["", "[]", '{"seconds": "x", "held_out_loss": 7}', '{"kills": 3, "exact": true}'])
def test_what_other_programs_left_broken_loses_no_row(session, broken, tmp_path, monkeypatch):
    for name in ("DEMO", "KILLS"):
        monkeypatch.setattr(conftest.claims, name, tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text(broken)
    session.keep()
    kept = json.loads(session.path(False).read_text())
    assert len(kept["rows"]) == 1 and kept["demo"] == {}
    said = {c["what"]: (c["measured"], c["passed"]) for c in kept["claims"]}
    assert said["make demo: seconds"] == ("no score of it in demo-out/metrics.json: run make demo", None)
    (kills,) = [found for what, found in said.items() if what.startswith("kill -9")]
    assert kills == ("KILLS.json is broken: run python -m bench.kills", None)


def test_an_error_in_judging_loses_no_row(session, monkeypatch):
    monkeypatch.setattr(conftest.claims, "judge", lambda rows, scores: {}["no such row"])
    session.keep()
    kept = json.loads(session.path(False).read_text())
    assert len(kept["rows"]) == 1
    assert [(c["measured"], c["passed"]) for c in kept["claims"]] == [("KeyError('no such row')", None)]


def configured(**options) -> conftest.Session:
    """What pytest with these options begins."""
    named = {"--quick": False, "--device": "cpu", "--results": None, "--minutes": None} | options
    config = SimpleNamespace(
        getoption=lambda name, default=None: named.get(name, default), stash=pytest.Stash(),
        pluginmanager=SimpleNamespace(hasplugin=lambda name: True), option=SimpleNamespace(collectonly=True),
    )  # fmt: skip
    conftest.pytest_configure(config)
    return config.stash[conftest._SESSION]


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf])
def test_impossible_minutes_are_refused(minutes):
    with pytest.raises(pytest.UsageError, match="--minutes: got .*, expected more than 0"):
        configured(**{"--minutes": minutes})
    assert configured(**{"--minutes": 0.5}).minutes == 0.5 and configured().minutes == 30


def test_benchmarks_are_not_timed_side_by_side():
    with pytest.raises(pytest.UsageError, match="one after the other"):
        configured(numprocesses=2)
    assert configured(numprocesses=None)


def test_a_run_that_times_nothing_is_no_whole_one():
    assert not configured().chosen
    assert configured(benchmark_disable=True).chosen and configured(benchmark_skip=True).chosen


def test_a_folder_that_takes_no_results_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pytest.UsageError, match="results cannot be kept in .*--results"):
        conftest._can_write(tmp_path / "file" / "device")
    conftest._can_write(tmp_path / "new" / "device")
    assert not list((tmp_path / "new" / "device").iterdir())


def test_only_what_is_known_to_be_long_goes_without_a_warm_up():
    """A check's time may be a reference's or a compiler's, after which the run itself is short, and cold."""
    for known, runs in (({"checked": 2 * measure._LONG}, True), ({"expected": 2 * measure._LONG}, False)):
        ran = []
        measure._settle(measure.Contender("peer", lambda ran=ran: ran.append(1), lambda: 0.0, 1.0, **known))
        assert bool(ran) == runs


def test_rounds_follow_what_a_contender_takes_and_the_time_that_is_left():
    bench = Bench(limit=60.0)
    assert [bench._rounds_for(taken) for taken in (0.01, 0.5, 6.0, 8.0, 20.0)] == [15, 4, 3, 2, 1]
    bench.until = time.perf_counter() - 1
    assert [bench._rounds_for(taken) for taken in (0.01, 0.29, 0.31, 2.9, 3.1)] == [3, 3, 2, 2, 1]
    quick = Bench(quick=True)
    assert [quick._rounds_for(taken) for taken in (0.01, 0.29, 0.31)] == [5, 3, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"rows": [', "is not JSON"),
        ("[]", "got a JSON list"),
        ('{"machine": {"device": "x"}}', "no result of pytest bench"),
        ('{"machine": {"device": "x"}, "rows": [{"group": "a", "case": "b", "who": "c", "newer": 1}]}', "newer"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_results_are_named_with_what_is_wrong(text, said, tmp_path, capsys):
    path, good = tmp_path / "bad.json", tmp_path / "good.json"
    results.save(good, {"machine": {"device": "x"}, "rows": []})
    if text is not None:
        path.write_text(text)
    for command in (lambda: compare.main([str(good), str(path)]), lambda: report.main(["--results", str(path)])):
        with pytest.raises(SystemExit) as ended:
            command()
        words = capsys.readouterr().err
        assert ended.value.code == 2 and str(path) in words and said in words


def test_two_devices_are_compared_by_their_floors_alone(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, slow in zip(paths, (1.0, 3.0), strict=True):
        rows = [
            Row("op", "case", "native", slow, spread=0.01),
            Row("op", "floored", "native", slow, spread=0.01, floor="copy", floor_share=0.5),
        ]
        results.save(path, {"machine": {"device": path.name}, "rows": results.as_json(rows)})
    assert compare.main([str(p) for p in paths]) == 0
    assert "1 rows in both, 0 of ours slower" in capsys.readouterr().out


@pytest.mark.parametrize("name", [bench_layer.OURS, bench_layer.PEER])
def test_a_layer_in_pieces_is_the_layer(name, monkeypatch):
    assert bench_layer.pieces_error(name, 64) < 1e-5
    if name == bench_layer.PEER:
        whole = bench_layer.Attention.block
        early = lambda self, u, at, keys, values: whole(self, u, max(0, at - 1), keys, values)  # noqa: E731
        monkeypatch.setattr(bench_layer.Attention, "block", early)
    else:
        monkeypatch.setattr(bench_layer, "segment", lambda u, s, fresh: bench_layer.layers()[name](u, bench_layer.BASE))
    assert bench_layer.pieces_error(name, 64) > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_attention_is_looked_at_where_it_was_timed(training):
    """At the end of the whole length: a layer that forgets its first key, or sees one too few, is found out."""
    layer, u = bench_layer.layers()[bench_layer.PEER], torch.randn(1, 300, bench_layer.WIDTH)
    timed = bench_layer.contender(bench_layer.PEER, u, training, 0.0)
    assert timed.after(timed.run()) < 1e-5

    def forgets(u):
        k_first = torch.cat([torch.zeros_like(u[:, :1]), u[:, 1:]], dim=1)
        return type(layer).forward(layer, k_first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", forgets)
        assert timed.after(timed.run()) > timed.bound


@pytest.mark.parametrize("training", [False, True])
def test_ours_is_looked_at_where_it_was_timed_too(training):
    """A layer that loses its state after the positions that are checked before is found out at the end."""
    layer, u = bench_layer.layers()[bench_layer.OURS], torch.randn(1, 300, bench_layer.WIDTH)
    timed = bench_layer.contender(bench_layer.OURS, u, training, 0.0)
    assert timed.check() < 1e-5 and timed.after(timed.run()) < 1e-5

    def forgets(u, task):
        return torch.cat([type(layer).forward(layer, part, task) for part in u.split(290, dim=1)], dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", forgets)
        assert timed.check() < 1e-5 and timed.after(timed.run()) > timed.bound


def test_a_segment_of_ours_is_looked_at_where_it_was_timed(monkeypatch):
    monkeypatch.setitem(bench_layer.PIECE, bench_layer.OURS, 100)
    timed = bench_layer.in_pieces(bench_layer.OURS, 400, 0.0)
    timed.take()
    assert timed.after(timed.found) < 1e-5
    timed.after.args[1][1].add_(1.0)  # the scan's state that it begins with
    assert timed.after(timed.found) > timed.bound


def test_a_block_of_attention_is_looked_at_where_it_was_timed(monkeypatch):
    monkeypatch.setitem(bench_layer.PIECE, bench_layer.PEER, 8)
    timed = bench_layer.in_pieces(bench_layer.PEER, 400, 0.0)
    timed.take()
    assert timed.after(timed.found) < 1e-5
    keys = timed.after.args[2]
    keys[:, :, 5] = 9.0
    assert timed.after(timed.found) > timed.bound


def test_a_query_attends_to_keys_in_pieces_as_to_all():
    q, k, v = (torch.randn(1, 1, n, 64, dtype=torch.float64) for n in (1, 50, 50))
    whole = attention.attended(q, k, v, 49)
    found = bench_layer.attended_by_last(q, (*k[:, :, :47].split(16, 2), k[:, :, 47:]), (*v.split((16, 16, 15, 3), 2),))
    assert torch.allclose(found, whole, rtol=1e-12)
    assert not torch.allclose(bench_layer.attended_by_last(q, k.split(49, 2)[:1], v.split(49, 2)[:1]), whole, rtol=1e-6)


def test_a_block_after_many_keys_is_looked_at_in_pieces_of_them(monkeypatch):
    monkeypatch.setitem(bench_layer.PIECE, bench_layer.PEER, 8)
    monkeypatch.setattr(bench_layer, "HELD", 16)
    timed = bench_layer.in_pieces(bench_layer.PEER, 400, 0.0)
    timed.take()
    assert timed.after(timed.found) < 1e-5
    timed.after.args[3][:, :, 37] = 9.0
    assert timed.after(timed.found) > timed.bound


def test_layers_go_from_512_to_a_million_tokens():
    assert (bench_layer.LENGTHS[0], bench_layer.LENGTHS[-1]) == (512, 2**20)
    assert bench_layer.refused(bench_layer.PEER, 2**20, True, None, 60.0)
    assert not bench_layer.refused(bench_layer.OURS, 2**20, False, None, 60.0)
    assert "s predicted" in bench_layer.refused(bench_layer.PEER, 32768, True, 61.0, 60.0)
