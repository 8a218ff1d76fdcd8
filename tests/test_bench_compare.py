"""Two runs side by side: what noise does not explain is told, and how many rows could not be judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import compare, results  # noqa: E402
from bench.results import Row  # noqa: E402


def timed(seconds: float, spread: float | None = 0.02, **more) -> Row:
    return Row("op", "case", "native", seconds=seconds, spread=spread, **more)


@pytest.mark.parametrize(
    ("before", "after", "flagged"),
    [
        (timed(1.0), timed(1.05), False),  # within three spreads of both, 8.5 %
        (timed(1.0), timed(1.12), True),
        (timed(1.0), timed(0.5), False),
        (timed(1.0, 0.0), timed(1.04, 0.0), False),  # below what counts at all
        (timed(1.0, 0.10), timed(1.3, 0.10), False),  # a noisy row
        (timed(1.0, None), timed(9.0), False),
        (timed(1.0, floor="copy", floor_share=0.8), timed(2.0, floor="copy", floor_share=0.8), False),  # slower machine
        (timed(1.0, floor="copy", floor_share=0.8), timed(1.0, floor="copy", floor_share=0.6), True),
    ],
)
def test_compare_flags_what_noise_does_not_explain(before, after, flagged, tmp_path, capsys):
    paths = []
    for name, row in (("a", before), ("b", after)):
        paths.append(tmp_path / f"{name}.json")
        results.save(paths[-1], {"machine": {"device": "x"}, "rows": results.as_json([row])})
    assert compare.main([str(p) for p in paths]) == int(flagged)
    printed = capsys.readouterr().out
    assert "1 rows in both" in printed
    assert (
        f"{int(None in (before.spread, after.spread))} could not be judged: one of the runs kept fewer than 3"
        in printed
    )


def test_a_peers_drift_is_told_but_is_no_regression(tmp_path, capsys):
    paths = []
    for name, slow in (("a", 1.0), ("b", 2.0)):
        rows = [timed(1.0), Row("op", "case", "torch", seconds=slow, spread=0.02, times_ours=slow)]
        paths.append(str(tmp_path / f"{name}.json"))
        results.save(Path(paths[-1]), {"machine": {"device": "x"}, "rows": results.as_json(rows)})
    assert compare.main(paths) == 0
    printed = capsys.readouterr().out
    assert "peers', no regression" in printed and "0 of ours slower beyond their noise, 1 of peers" in printed


def test_what_is_timed_no_more_is_a_regression_of_ours_alone(tmp_path, capsys):
    gone = dict(reason="failed its check: relative error 0.5")
    before = [timed(1.0), Row("op", "case", "torch", seconds=1.0), Row("op", "left out", "native", seconds=1.0)]
    kept(tmp_path / "a.json", before)
    kept(tmp_path / "peer.json", [timed(1.0), Row("op", "case", "torch", **gone)])
    kept(tmp_path / "ours.json", [Row("op", "case", "native", **gone), Row("op", "case", "torch", seconds=1.0)])
    kept(tmp_path / "nothing.json", [Row("op", "case", "native", **gone)])
    status = lambda name: compare.main([str(tmp_path / "a.json"), str(tmp_path / name)])  # noqa: E731
    assert status("peer.json") == 0 and "no more" not in capsys.readouterr().out
    for name in ("ours.json", "nothing.json"):
        assert status(name) == 1 and "| failed its check: relative error 0.5 |" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [Row("op", "another case", "native", seconds=1.0)]])
def test_nothing_in_both_runs_is_no_success(rows, tmp_path, capsys):
    kept(tmp_path / "a.json", [timed(1.0)])
    kept(tmp_path / "b.json", rows)
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert ended.value.code == 2 and "no row in common" in capsys.readouterr().err


def test_as_many_threads_make_a_machine_alike(tmp_path, capsys):
    for name, threads, seconds in (("a", 2, 1.0), ("b", 1, 2.0), ("c", 2, 2.0)):
        rows = [Row("op", "case", "native", seconds=seconds, spread=0.01), timed(1.0, floor="copy", floor_share=0.5)]
        rows[1].case = "another"
        kept(tmp_path / f"{name}.json", rows, {"device": "x", "threads": threads})
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "two devices, x with 2 threads and x with 1 threads" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "c.json")]) == 1


def kept(path: Path, rows: list[Row], about: dict | None = None) -> None:
    results.save(path, {"machine": about or {"device": "x"}, "rows": results.as_json(rows)})
