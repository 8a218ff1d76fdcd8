"""Generation in two protocols: sums over sampled steps, no cache, the paper's figures beside ours."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import bench_generation, bench_omnimamba, claims, generators, integrated, published, tables  # noqa: E402
from bench.baselines.transformer import Transformer  # noqa: E402
from bench.results import Row  # noqa: E402
from omnimamba_model import OmniMamba, OmniMambaConfig  # noqa: E402


@pytest.mark.parametrize("total", [1024, 131072])
def test_three_steps_give_the_time_of_all(total):
    cost = lambda s: 3.0 + 2e-3 * s + 5e-6 * s * s  # noqa: E731
    summed = sum(steps * cost(at) for at, steps in integrated.positions(total))
    assert summed == pytest.approx(sum(map(cost, range(total))), rel=2e-3)
    assert all(0 <= at < total for at, _ in integrated.positions(total))


def test_a_round_weighs_each_sampled_step(monkeypatch):
    clock, calls = [0.0], []
    step = lambda took: lambda: (calls.append(took), clock.__setitem__(0, clock[0] + took))  # noqa: E731

    def seconds(function):
        before = clock[0]
        function()
        return clock[0] - before

    monkeypatch.setattr(integrated, "seconds", seconds)
    found = integrated.sampled("who", [(10.0, step(2.0)), (30.0, step(0.5))], lambda: 0.0, 1.0, each=4)
    found.take()
    assert found.times == [10 * 2.0 + 30 * 0.5] and calls == 4 * [2.0] + 4 * [0.5]
    found.run()
    assert len(calls) == 16


@torch.inference_mode()
def test_without_a_cache_the_transformer_says_the_same():
    torch.manual_seed(0)
    model = Transformer(width=128, layers=2, hidden=64, vocab=50).double()
    ids = torch.randint(50, (2, 9))
    cache = model.new_cache(2, 9)
    steps = [model.step(ids[:, i], cache, i) for i in range(9)]
    assert torch.allclose(model.last(ids), steps[-1], atol=1e-10)
    assert torch.allclose(model.last(ids), model(ids)[:, -1], atol=1e-10)


def rows(cached: float, uncached: float, peaks: tuple[int, int, int]) -> list[Row]:
    who = (published.OURS, published.CACHED, published.UNCACHED)
    times = [
        Row("whole generation", published.whole_case(16384), name, 100.0 * ratio, 3, times_ours=ratio)
        for name, ratio in zip(who, (1.0, cached, uncached), strict=True)
    ]
    memory = [
        Row("memory", published.MEMORY_CASE, name, peak_bytes=peak, reason="its memory alone counts")
        for name, peak in zip(who, peaks, strict=True)
    ]
    return times + memory


@pytest.mark.parametrize(
    ("found", "verdicts"),
    [
        (rows(5.0, 120.0, (30, 100, 60)), [True, True, True]),
        (rows(0.9, 99.0, (38, 100, 60)), [False, False, False]),
        (rows(5.0, 120.0, (30, 100, 60))[:2], [True, None, None]),
        ([], [None, None, None]),
    ],
)
def test_the_generation_claims(found, verdicts):
    judged = [c for c in claims.judge(found, {}) if c["what"].startswith(("130M, generation", "130M, memory"))]
    assert [c["passed"] for c in judged] == verdicts


def test_the_papers_figures_stand_beside_ours():
    speed, memory = published.beside(rows(5.0, 120.0, (30, 100, 60)))
    assert (speed.claimed, speed.without_cache, speed.with_cache) == ("119.2x", "120x", "5x")
    assert (memory.claimed, memory.without_cache, memory.with_cache) == ("63.0% less", "50.0% less", "70.0% less")
    shown = tables.paper({"rows": rows(5.0, 120.0, (30, 100, 60))})
    assert "1.2e+04 s" in shown and "| 16K " in shown and "8000 s, 11.86 GB" in shown
    times = [r for r in rows(5.0, 120.0, (30, 100, 60)) if r.seconds]
    for row, dtype in zip(times, ("bfloat16", "bfloat16", "float32"), strict=True):
        row.note = f"{dtype} weights; 3 steps measured"
    assert "~100 s, bf16" in (typed := tables.paper({"rows": times})) and "~1.2e+04 s, fp32" in typed
    assert "Images a second" not in shown and tables.paper({"rows": []}) == ""
    drawn = Row("OmniMamba", published.at_once_case("1.3B"), "OmniMamba", 64.0)
    shown = tables.paper({"rows": [*rows(5.0, 120.0, (30, 100, 60)), drawn]})
    assert "Images a second, 16 at once, 1.3B: 0.25 here; the paper's: OmniMamba 5.68" in shown
    drawn.note = "0.25 images/s; the captions and 17 of 256 tokens measured"
    assert "1.3B: ~0.25 here" in tables.paper({"rows": [*rows(5.0, 120.0, (30, 100, 60)), drawn]})


def test_a_time_of_some_parts_is_marked_among_the_operations_too():
    part = "the captions and 17 of 256 tokens measured"
    summed = Row("OmniMamba", "draws", "OmniMamba", 64.0, note=f"0.25 images/s; {part}")
    whole = Row("OmniMamba", "answers", "OmniMamba", 32.0, note="the floor is the tokens' reads alone")
    shown = tables.ops({"rows": [summed, whole]})
    assert f"| ~64 s ({part}) |" in shown and "| 32 s " in shown and shown.count("~") == 1


@pytest.fixture
def small(monkeypatch) -> Transformer:
    """Every model of the generators' is this Transformer."""
    torch.manual_seed(0)
    network = Transformer(width=128, layers=2, hidden=64, vocab=50288).eval()
    monkeypatch.setattr(generators, "model", lambda who, dtype: network)
    monkeypatch.setattr(generators, "dtype_of", lambda who, context: "float32")
    return network


@torch.inference_mode()
def test_a_step_with_a_cache_is_looked_at_where_it_was_timed(small, monkeypatch):
    bench = SimpleNamespace(rates=SimpleNamespace(sample=lambda kind: 1e9))
    timed = [generators.contender(generators.PEER, 90), generators.generating(bench, generators.PEER, 100)]
    for one in timed:
        one.take()
        assert one.after(one.found) < 1e-5
    whole = torch.nn.functional.scaled_dot_product_attention
    fewer = lambda q, k, v: whole(q, k[:, :, 1:], v[:, :, 1:])  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fewer)
    for one in timed:
        one.take()
        assert one.after(one.found) > one.bound


@torch.inference_mode()
def test_without_a_cache_hundreds_of_tokens_are_checked(small, monkeypatch):
    generators.step_error.cache_clear()
    assert generators.step_error(generators.UNCACHED, "float32") < 1e-5
    generators.step_error.cache_clear()
    asked = []
    monkeypatch.setattr(small, "last", lambda ids: asked.append(ids.shape[1]) or small.plain_last(ids[:, 1:]))
    assert generators.step_error(generators.UNCACHED, "float32") > 1e-3 and asked == [512]
    generators.step_error.cache_clear()


@pytest.mark.parametrize("quick", [False, True])
def test_every_generation_that_is_timed_has_its_memory(quick, monkeypatch):
    """Without a cache too, where one pass over all the tokens is the whole of it."""
    who, asked = list(published.names([])), []
    bench = SimpleNamespace(
        quick=quick,
        compare=lambda *_, **__: [Row("whole generation", "4096 tokens in all", name, 1.0) for name in who],
        peaks=lambda _, rows, task, own, context: asked.extend((r.who, task, context, *own(r).values()) for r in rows),
    )
    for name in ("generating", "work"):
        monkeypatch.setattr(bench_generation, name, lambda *_: None)
    monkeypatch.setattr(bench_generation, "model", lambda *_: Transformer(width=128, layers=2, hidden=64, vocab=50))
    monkeypatch.setattr(bench_generation, "dtype_of", lambda name, context: f"{name} at {context:.0f}")
    bench_generation.test_whole(bench, None, 4096)
    wanted = [(name, "generation", 4095, steps, f"{name} at 2048") for name, steps in zip(who, (2, 2, 1), strict=True)]
    assert asked == ([] if quick else wanted)


def test_a_cache_is_filled_to_its_end():
    cache = generators.filled(torch.zeros(3, 2, 1, 2, 2**17, 1, dtype=torch.bfloat16))
    assert (cache != 0).float().mean() > 0.99 and (cache[-1, -1, 0, -1, -9:] != 0).all()


def omnimamba_rows(
    share: float | None, peaks: tuple[float | None, float | None], spoken: float | None = 0.61
) -> list[Row]:
    """At the published size, peaks as shares of the weights; and two rows that no claim is about. ``spoken``: the share
    of an answer's tokens alone."""
    drawn, answered = (None if peak is None else int(peak * claims.OMNIMAMBA_BYTES) for peak in peaks)
    cases = [
        ("1.3B: draws an image of 256 tokens", share, drawn),
        ("1.3B: answers 16 tokens about an image in 32", 0.2, answered),
        ("1.3B: decodes 16 tokens of an answer", spoken, None),
        ("two layers of width 64: draws an image of 256 tokens", 0.1, 10**11),
        (published.at_once_case("1.3B"), 0.1, 10**11),
    ]
    who = "OmniMamba, bf16 weights"
    return [
        Row("OmniMamba", case, who, 20.0, 3, times_ours=1.0, floor_share=floor, peak_bytes=peak)
        for case, floor, peak in cases
    ]


@pytest.mark.parametrize(
    ("found", "verdicts"),
    [
        (omnimamba_rows(0.61, (1.0, 1.29)), [True, True, True]),
        (omnimamba_rows(0.59, (1.31, 1.0)), [False, True, False]),
        (omnimamba_rows(0.61, (1.0, 1.31)), [True, True, False]),
        (omnimamba_rows(0.61, (1.0, 1.0), 0.59), [True, False, True]),
        (omnimamba_rows(0.61, (1.0, 1.0), None), [True, None, True]),
        (omnimamba_rows(None, (1.0, None)), [None, True, None]),
        (omnimamba_rows(0.61, (None, 1.0)), [True, True, None]),
        (omnimamba_rows(0.61, (1.0, 1.0))[3:], [None, None, None]),
    ],
)
def test_the_claims_at_the_published_size(found, verdicts):
    assert [c["passed"] for c in claims.judge(found, {}) if c["what"].startswith("1.3B, ")] == verdicts


def test_the_weights_of_the_claims_are_the_published_models():
    with torch.device("meta"):
        model = OmniMamba(OmniMambaConfig()).bfloat16()
    assert sum(p.nbytes for p in model.parameters()) == claims.OMNIMAMBA_BYTES


def test_a_checkpoints_noise_goes_round_and_is_the_same_nowhere(monkeypatch):
    store, into = torch.arange(7.0), torch.full((11,), -1.0)
    assert bench_omnimamba.stored(store, 5, into) == 2
    assert into.tolist() == [5.0, 6.0, *range(7), 0.0, 1.0]
    assert bench_omnimamba.stored(store, 9, into[:3]) == 5 and into[:3].tolist() == [2.0, 3.0, 4.0]
    torch.manual_seed(0)
    monkeypatch.setattr(bench_omnimamba, "STORE", 2**20 - 3)  # a prime too, gone through several times
    found = bench_omnimamba.official_tensors(bench_omnimamba.SMALL)
    noise = [t for name, t in found.items() if t.ndim == 2 and name not in bench_omnimamba.TIED]
    assert sum(t.numel() for t in noise) > 4 * 2**20
    for t in noise:  # no two of its rows are the same
        assert len({bytes(row[:16].view(torch.uint8).numpy()) for row in t}) == len(t)
    for t in noise:
        assert 0.8 * 0.5 < float(t.float().std()) * t.shape[-1] ** 0.5 < 1.2 * 0.5
