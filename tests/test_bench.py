"""The benchmarks' harness: no time without a passed check, an exact fit, tables that agree with the results."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import ablation, claims, machine, measure, report, results  # noqa: E402
from bench.baselines import attention  # noqa: E402
from bench.baselines.attention import Attention  # noqa: E402
from bench.baselines.transformer import Transformer  # noqa: E402
from bench.measure import Bench, Contender, Work  # noqa: E402
from bench.results import Row  # noqa: E402

MARKED = (
    "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbetween\n<!-- demo:begin -->\n<!-- demo:end -->\nafter\n"
)


class FixedRates:
    """Rates that answer from a list, then stay at 100."""

    def __init__(self, *samples: float) -> None:
        self.samples = list(samples)

    def sample(self, kind: str, nbytes: float = 0) -> float:
        return self.samples.pop(0) if self.samples else 100.0


class Pedantic:
    """pytest-benchmark's fixture as far as it is used."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.group = None

    def pedantic(self, target, setup, teardown, rounds) -> None:
        for _ in range(rounds):
            setup()
            target()
            teardown()


def contender(name: str, error: float = 0.0, log: list | None = None) -> Contender:
    return Contender(name, lambda: log.append(name) if log is not None else None, lambda: error, 1e-3)


def content(rows: list[Row]) -> dict:
    return {
        "started": "2026-11-23T10:00:00+00:00",
        "seconds": 60.0,
        "quick": False,
        "complete": True,
        "machine": {"device": "A (R) CPU", "threads": 2, "instruction_set": "avx2", "versions": {}, "commit": "abc"},
        "rates": {"sgemm": {"median": 1e11, "best": 1e11, "samples": 1}},
        "demo": {"t2i_accuracy": 0.9412},
        "claims": claims.judge(rows, {}),
        "exponents": claims.exponents(rows),
        "rows": results.as_json(rows),
    }


def layer_rows() -> list[Row]:
    rows = []
    for length in (1024, 2048, 4096, 32768):
        ours, theirs = dict(times_ours=1.0, rounds=3), dict(times_ours=1e-3 * length, rounds=3)
        rows.append(Row("layer forward", f"1 x {length}", "Mamba-2", 1e-6 * length, **ours))
        rows.append(Row("layer forward", f"1 x {length}", "attention", 1e-9 * length**2, **theirs))
    return rows


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_exponent_of_an_exact_power(power):
    lengths = [1024, 2048, 4096, 65536]
    assert claims.growth_exponent(lengths, [3.0 * n**power for n in lengths]) == pytest.approx(power, abs=1e-9)


def test_growth_exponent_needs_two_points():
    with pytest.raises(ValueError, match="2 or more"):
        claims.growth_exponent([1024], [1.0])


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_a_wrong_result_gets_a_reason_and_no_time(error):
    bench, log = Bench(quick=True, rates=FixedRates()), []
    wrong, right = bench.compare(
        Pedantic(), "g", "c", [contender("wrong", error, log), contender("right")], Work("sgemm", flops=1.0)
    )
    assert wrong.seconds is None and wrong.reason.startswith("failed its check") and not log
    assert right.seconds > 0 and right.reason is None


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_what_is_wrong_while_it_is_timed_has_no_time_either(error):
    """And nothing is so many times as fast as ours where ours was wrong."""
    for wrong in (0, 1):
        found = [contender("ours"), contender("peer")]
        found[wrong].run, looked = itertools.count().__next__, []
        found[wrong].after = lambda last, looked=looked: looked.append(last) or error
        rows = Bench(quick=True, rates=FixedRates()).compare(Pedantic(), "g", "c", found, Work("sgemm", flops=1.0))
        assert rows[wrong].seconds is None and rows[wrong].reason.startswith(measure.WRONG)
        assert rows[1 - wrong].seconds > 0 and rows[1 - wrong].times_ours == (1.0 if wrong else None)
        assert looked == [found[wrong].run() - 1] and found[wrong].found is None


def test_a_backend_that_cannot_run_gets_its_reason_and_other_errors_are_raised():
    def refusing(message):
        def check():
            raise RuntimeError(message)

        return [Contender("one", lambda: None, check, 1e-3)]

    bench = Bench(quick=True, rates=FixedRates())
    (row,) = bench.compare(Pedantic(), "g", "c", refusing("op: backend 'x' cannot run: no device"), Work("copy"))
    assert (row.seconds, row.reason) == (None, "no device")
    with pytest.raises(RuntimeError, match="broken"):
        bench.compare(Pedantic(), "g", "c", refusing("broken"), Work("copy"))
    assert bench.rows[-1].seconds is None and bench.rows[-1].reason


def test_peers_and_ours_take_turns():
    log = []
    found = [contender(name, log=log) for name in ("ours", "peer", "other")]
    probes = Bench(quick=True, rates=FixedRates())._rounds(
        Pedantic(), found[0], found[1:], {"ours": 3, "peer": 3, "other": 1}, Work("sgemm", flops=1.0)
    )
    assert log == ["peer", "other", "ours", "peer", "ours", "peer", "ours"]
    assert [len(rates) for rates in probes] == [3, 3, 3]


def test_the_rate_of_a_promise_is_taken_right_around_each_contender():
    found = [contender(name) for name in ("ours", "peer", "other")]
    found[2].work = Work("read", bytes=1.0)
    samples = FixedRates(10, 20, 1, 3, 40, 80, 90, 100, 5, 7, 200)
    probes = Bench(quick=True, rates=samples)._rounds(
        Pedantic(), found[0], found[1:], {"ours": 2, "peer": 2, "other": 2}, Work("sgemm", flops=1.0), judged=True
    )
    assert probes == [[10, 20, 40, 80], [80, 90, 7, 200]]
    assert [c.around for c in found] == [[60, 103.5], [15, 85], [2, 52.5]]


def test_no_peer_takes_our_place():
    """Ours cannot run: a peer has its time, and nothing that it is so many times of."""

    def refuse():
        raise RuntimeError("cannot run: no compiler")

    found = [Contender("native", lambda: None, refuse, 1.0), contender("peer"), contender("reference")]
    bench = Bench(quick=True, rates=FixedRates())
    rows = bench.compare(Pedantic(), "g", "c", found[:2], Work("sgemm", flops=1.0))
    assert rows[0].reason == "no compiler" and rows[1].seconds > 0 and rows[1].times_ours is None
    rows = bench.compare(Pedantic(), "g", "c", found, Work("sgemm", flops=1.0))
    assert rows[2].times_ours == 1.0 and rows[1].times_ours > 0


def test_rounds_with_a_slow_machine_are_dropped_but_for_the_best():
    rounds = [[100, 100], [50, 100], [99, 98], [100, 60], [40, 100]]
    assert measure.quiet_rounds(rounds) == [0, 2] and measure.quiet_rounds(rounds, 1) == [0]
    assert measure.quiet_rounds(rounds, enough=3) == [0, 2, 3] and measure.quiet_rounds(rounds, 2, 3) == [0, 1]
    assert measure.quiet_rounds([[10, 100]]) == [0] and measure.quiet_rounds([[10, 100]], enough=0) == []


def test_a_promise_gets_three_rounds_however_late_and_more_where_too_few_were_quiet():
    """Six rounds of which the machine is slow in the first three: as many are added as are quiet."""
    late = Bench(rates=FixedRates(), limit=-1.0)
    assert [late._rounds_for(taken, judged=True) for taken in (0.01, 60.0)] == [3, 3]
    log: list[str] = []
    found = [contender(name, log=log) for name in ("ours", "peer")]
    late.rates = FixedRates(*[100, 10] * 3)
    rows = late.compare(Pedantic(), "g", "c", found, Work("sgemm", flops=1.0), judged=True)
    assert [(row.rounds, row.rounds_taken) for row in rows] == [(3, 6), (3, 6)] and rows[0].rate == 100
    over = Bench(rates=FixedRates(*[100, 10] * 3), limit=-1.0, end=-1.0)
    (row,) = over.compare(Pedantic(), "g", "c", [contender("ours")], Work("sgemm", flops=1.0), judged=True)
    assert (row.rounds, row.rounds_taken) == (3, 3)


def test_what_takes_minutes_is_timed_once_and_disturbed_rounds_are_not_made_good_for_ever():
    late = Bench(rates=FixedRates(*[100, 10] * 3), limit=-1.0)
    found = [contender("ours"), contender("minutes")]
    found[1].once, found[1].expected = True, 60.0
    rows = late.compare(Pedantic(), "g", "c", found, Work("sgemm", flops=1.0), judged=True)
    assert rows[0].rounds_taken >= 3 and rows[1].rounds_taken == 1
    over = Bench(rates=FixedRates(*[100, 10] * 9), limit=-1.0, end=-1.0)
    found = [contender("ours"), contender("peer")]
    over._rounds(Pedantic(), found[0], found[1:], {"ours": 9, "peer": 3}, Work("sgemm", flops=1.0), judged=True)
    assert len(found[0].times) == 9 and len(found[1].times) == 3


def test_a_peer_whose_check_takes_too_long_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "_PATIENCE", 0.01)
    slow, known = contender("peer"), contender("known")
    for one in (slow, known):
        one.check = lambda: time.sleep(0.02) or 0.0
    known.expected = 60.0
    found = [contender("ours"), slow, known]
    rows = Bench(quick=True, rates=FixedRates()).compare(Pedantic(), "g", "c", found, Work("sgemm", flops=1.0))
    assert rows[1].seconds is None and "its check alone took" in rows[1].reason and rows[2].seconds is not None


def test_relative_error_sees_what_is_not_finite():
    ones = torch.ones(4)
    assert measure.relative_error(1.01 * ones, ones) == pytest.approx(0.01, rel=1e-4)
    assert measure.relative_error(ones * float("nan"), ones) == float("inf")
    assert measure.relative_error(ones[:2], ones) == float("inf")


def test_claims_judge_both_ways_and_admit_what_is_missing():
    rows = layer_rows()
    for share, passed in ((0.71, True), (0.69, False)):
        row = Row("causal_conv1d forward", "1 x 4096 x 1792", "native", 1e-3, 3, far_share=share, times_ours=1.0)
        verdicts = {c["what"]: c for c in claims.judge([*rows, row], {"t2i_accuracy": share})}
        assert verdicts["conv1d with SiLU, 1 x 4096 x 1792, share of the copy speed"]["passed"] is passed
        assert verdicts["make demo: t2i_accuracy"]["passed"] is False
        assert verdicts["make demo: mmu_accuracy"]["passed"] is None
        layer = verdicts["Mamba-2 layer at 32K tokens, against SDPA attention"]
        assert layer["passed"] is True and "Mamba-2 1.00, attention 2.00" in layer["measured"]


def test_the_demos_losses_stand_beside_its_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "DEMO", tmp_path / "metrics.json")
    assert claims.demo_scores() == {}
    found = {"mmu_accuracy": 0.9, "held_out_loss": {"t2i": 1.6, "mmu": 0.02}, "steps": {}}
    claims.DEMO.write_text(json.dumps(found))
    assert claims.demo_scores() == {
        "mmu_accuracy": 0.9,
        "held_out_loss t2i, nats a token": 1.6,
        "held_out_loss mmu, nats a token": 0.02,
    }


def test_readme_parts_are_replaced_and_the_rest_is_kept(tmp_path):
    readme, result = tmp_path / "README.md", tmp_path / "result.json"
    readme.write_text(MARKED)
    results.save(result, content(layer_rows()))
    arguments = ["--readme", str(readme), "--results", str(result)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nbetween\n" in text
    assert "old" not in text and "| 32768 " in text and "0.9412" in text
    assert report.main([*arguments, "--check"]) == 0
    with pytest.raises(ValueError, match="not closed"):
        report.filled("<!-- bench:begin -->\n", results.load(result))
    with pytest.raises(ValueError, match="expected one of"):
        report.filled("<!-- other:begin -->\n", results.load(result))


def test_the_readme_shows_the_latest_results():
    latest = results.latest()
    if latest is None:
        pytest.skip("no whole run is kept yet")
    readme = (ROOT / "README.md").read_text()
    assert report.filled(readme, *report.both(latest, results.load(latest))) == readme, "run python -m bench.report"


def test_the_ablation_is_told_by_mean_spread_and_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "FILE", tmp_path / "ablation.json")
    assert "has not run" in report.ablations({})
    scores = {"OmniMamba": (0.9, 0.8), "no adapters": (0.7, 0.4), "one stage": (0.5,)}
    runs = [
        {"arm": arm, "seed": seed, "t2i_accuracy": score, "mmu_accuracy": 0.5, "t2i_loss": 1.5, "mmu_loss": 0.25}
        for arm, found in scores.items()
        for seed, score in enumerate(found)
    ]
    results.save(ablation.FILE, {"runs": runs})
    _, _, whole, without = report.ablations({}).splitlines()  # one seed has no spread, so "one stage" is left out
    assert [cell.strip() for cell in whole.split("|")[1:4]] == ["OmniMamba", "2", "0.850 ± 0.071"]
    assert [cell.strip() for cell in without.split("|")[1:4]] == ["no adapters", "2", "0.550 ± 0.212"]
    assert [cell.strip() for cell in without.split("|")[7:9]] == ["-0.300 ± 0.100", "+0.000 ± 0.000"]


def test_only_whole_runs_become_the_latest(tmp_path):
    for name, started, changes in (
        ("a.json", "2026-01-01", {}),
        ("b.json", "2026-01-02", {"quick": True}),
        ("c.json", "2026-01-03", {"complete": False}),
    ):
        results.save(tmp_path / "device" / name, {**content([]), "started": started, **changes})
    (tmp_path / "device" / "other.json").write_text("{}")
    assert results.latest(tmp_path) == tmp_path / "device" / "a.json"
    assert results.file_name("2026-01-02", "abc", quick=True, complete=False) == "2026-01-02-abc-quick-partial.json"


def test_saving_leaves_the_old_file_where_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "result.json"
    results.save(path, {"kept": 1})
    with pytest.raises(TypeError):
        results.save(path, {"lost": object()})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_device_slug():
    assert machine.slug("Intel(R) Xeon(R) Platinum 8488C @ 2.4GHz") == "intel-xeon-platinum-8488c-2-4ghz"


def test_quick_leaves_long_cases_out_and_keeps_every_file():
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = [line for line in listed.splitlines() if "::" in line]
    every = {f"bench/{path.name}" for path in (ROOT / "bench").glob("bench_*.py")} - {"bench/bench_gpu.py"}
    assert {line.split("::")[0] for line in cases} == every
    assert not [line for line in cases if "65536" in line or "4096, 64" in line]


def test_attention_equals_its_definition(monkeypatch):
    torch.manual_seed(0)
    layer = Attention(128).double()
    u = torch.randn(2, 37, 128, dtype=torch.float64)
    assert torch.allclose(layer(u), layer.plain(u), atol=1e-12)
    monkeypatch.setattr(attention, "QUERIES", 5)
    assert torch.allclose(layer(u), layer.plain(u), atol=1e-12)
    assert torch.allclose(layer(u)[:, -7:], layer.plain(u, 7), atol=1e-12)


@torch.inference_mode()
def test_the_cached_transformer_equals_the_whole_pass():
    torch.manual_seed(0)
    model = Transformer(width=128, layers=2, hidden=64, vocab=50).double()
    ids = torch.randint(50, (2, 9))
    cache = model.new_cache(2, 9)
    steps = [model.step(ids[:, i], cache, i) for i in range(9)]
    assert torch.allclose(torch.stack(steps, 1), model(ids), atol=1e-10)
    cache, before = cache.float(), cache.clone().float()  # of fp32 as its norms' eps
    assert torch.allclose(model.float().plain_last(ids), model(ids)[:, -1], atol=1e-5)
    assert torch.allclose(model.plain_step(ids[:, 4], cache, 4), model.step(ids[:, 4], before.clone(), 4), atol=1e-5)
    assert torch.equal(cache, before)


def test_spread_is_half_the_quartiles_distance():
    assert measure.spread([1.0, 2.0]) is None
    assert measure.spread([3.0, 3.0, 3.0]) == 0
    assert measure.spread([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.1)


def test_the_bar_fills_and_tells_the_rest():
    from bench.conftest import bar

    assert bar(0, 4, 0.0, 4) == "[....] 0/4, 0:00 gone, about 0:00 left"
    assert bar(1, 4, 61.0, 4) == "[#...] 1/4, 1:01 gone, about 3:03 left"
    assert bar(4, 4, 200.0, 4) == "[####] 4/4, 3:20 gone, about 0:00 left"


def test_ratios_are_never_powers_of_ten():
    assert [results.ratio_text(r) for r in (0.512, 5.05, 999.4, 999.6, 1955.0, 123456.0)] == [
        "0.512x", "5.05x", "999x", "1,000x", "1,960x", "123,000x",
    ]  # fmt: skip
