"""The scaling model: counts held against real models, its check against rows it must and must not explain."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import chips, counts, inputs, results, scaling  # noqa: E402
from bench.baselines.transformer import Transformer  # noqa: E402
from bench.published import CACHED, OURS, UNCACHED  # noqa: E402
from bench.results import Row  # noqa: E402
from omnimamba_model import MambaConfig, MambaLM  # noqa: E402

TINY = MambaConfig(d_model=64, n_layer=3, vocab_size=96, d_state=16, headdim=32)
SMALL = counts.Decoder(width=128, layers=2, hidden=192, vocab=50)


def test_counts_are_those_of_the_models():
    model = MambaLM(TINY)
    assert counts.weight_count(TINY) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert counts.state_bytes(TINY) == model.backbone.new_state(1).nbytes
    peer = Transformer(SMALL.width, SMALL.layers, SMALL.hidden, SMALL.vocab).bfloat16()
    assert counts.cache_bytes(SMALL, 37, 2) == peer.new_cache(1, 37).nbytes
    matrices = sum(p.nbytes for p in peer.parameters() if p.ndim == 2)
    assert counts.decoder_step(SMALL, 1, 0, 2)[0].bytes == matrices


def test_products_are_those_that_torch_counts():
    peer, ids = Transformer(SMALL.width, SMALL.layers, SMALL.hidden, SMALL.vocab), torch.zeros(1, 37, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        peer.last(ids)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    parts = counts.decoder_pass(SMALL, 1, 37)
    assert sum(p.flops for p in parts if p.kind != "scores") == products


def test_the_scan_is_counted_as_where_it_is_timed():
    config = MambaConfig.preset("130m")
    assert counts.scan_flops(config, 4096) == inputs.scan_flops(1, 4096, config.nheads)


def whole_run(slower: float = 1.0) -> dict:
    """A run on a machine that computes as the model says, or, beyond what rates are taken from, ``slower``."""
    product, scan, stream, weights, cache, scores = 2e11, 1e11, 1e10, 2e10, 5e9, 1.5e11
    ours = scaling.Rates({"*": 3e11, "product": product, "scan": scan}, {"*": stream, "weights": weights})
    torchs = scaling.Rates({"*": scores}, ours.bytes | {"cache": cache, "weights": weights / 2})
    config, rows = scaling.SMALL, []
    own = dict(times_ours=1.0, seconds=1.0)
    rows += [
        Row("lora_linear", "512 x 2048 to 8512, fp32 weights", "native", gflop_s=product / 1e9, **own),
        Row("lora_linear", "1 x 2048 to 8512, bf16 weights", "native", gb_s=weights / 1e9, **own),
        Row("causal_conv1d forward", "1 x 4096 x 1792", "native", gb_s=stream / 1e9, **own),
        Row("gated_norm forward", "1 x 4096 x 1536", "native", gb_s=stream / 1e9, **own),
        Row("ssd_scan forward", "1 x 1024, 24 heads", "native", gflop_s=scan / 1e9, **own),
    ]
    for l in (1024, 8192):
        seconds = slower * ours.seconds(counts.mamba_layer(config, 1, l))
        rows.append(Row("layer forward", f"1 x {l}", "Mamba-2", seconds, times_ours=1.0))
        seconds = (slower if l > 4096 else 1) * torchs.seconds(counts.attention_layer(config.d_model, 1, l))
        rows.append(Row("layer forward", f"1 x {l}", "attention", seconds))
    for c in (1024, 4096, 16384):
        step = torchs.seconds(counts.decoder_step(scaling.PEER, 1, c, 2)) * (slower if c > 4096 else 1)
        rows.append(Row("generation", f"{c} tokens of context", CACHED, 8 * step, tokens_s=1 / step, note="bfloat16"))
    for l in (1024, 8192):
        step = slower * ours.seconds(counts.mamba_step(config, 1, 2))
        rows.append(Row("whole generation", f"{l} tokens in all", OURS, l * step, times_ours=1.0, note="bfloat16"))
        passes = [(n, counts.decoder_pass(scaling.PEER, 1, at + 1, 2)) for at, n in scaling.positions(l)]
        alone = scaling.Rates({"*": scores}, ours.bytes)
        seconds = sum(n * alone.seconds(parts) for n, parts in passes)
        reached = sum(n * p.flops for n, parts in passes for p in parts) / seconds
        seconds *= slower if l > 1024 else 1
        rows.append(
            Row("whole generation", f"{l} tokens in all", UNCACHED, seconds, gflop_s=reached / 1e9, note="bfloat16")
        )
    return {"rows": rows, "rates": {k: {"median": r} for k, r in (("sgemm", 3e11), ("far copy", stream))}}


def test_a_machine_that_follows_the_model_is_explained():
    found = scaling.checked(whole_run())
    assert {(c.row.group, c.row.who) for c in found} == {
        ("layer forward", "Mamba-2"), ("layer forward", "attention"), ("generation", CACHED),
        ("whole generation", OURS), ("whole generation", UNCACHED),
    }  # fmt: skip
    assert max(c.error for c in found) < 0.02


@pytest.mark.parametrize(
    ("slower", "status", "shown"), [(1.1, 0, "time 9."), (1.5, 1, "time 33."), (0.5, 1, "time 100")]
)
def test_the_median_error_decides(slower, status, shown, tmp_path, capsys):
    content = whole_run(slower)
    results.save(tmp_path / "run.json", content | {"rows": results.as_json(content["rows"])})
    assert scaling.main([str(tmp_path / "run.json")]) == status
    printed = capsys.readouterr().out
    assert f"Median error of {shown}" in printed and "PREDICTION, not measured" in printed


@pytest.mark.parametrize(("slower", "passed"), [(1.0, True), (1.5, False)])
def test_the_claim_is_judged_on_the_run(slower, passed):
    assert scaling.claim(whole_run(slower)).passed is passed


def test_an_error_of_numpys_is_a_number_that_can_be_kept():
    row = Row("layer forward", "1 x 1", "Mamba-2", 1.0)
    error = scaling.median_error([scaling.Checked(row, np.float64(1.1), 1.0)])
    assert type(error) is float and json.dumps({"passed": error < 0.2}) == '{"passed": true}'


@pytest.mark.parametrize("fast", [0.5, 1.0, 1.3])
def test_a_row_is_predicted_for_the_machine_around_it(fast):
    """Operations in a fast moment, the rest in slow ones: each time is what the machine allowed just then."""
    content = whole_run()
    for row in content["rows"]:
        op = row.group in ("ssd_scan forward", "lora_linear")
        row.floor, there = "sgemm", fast if op else 1 / fast
        row.rate = 3e11 * there
        row.seconds /= there
        row.gflop_s, row.gb_s = row.gflop_s and row.gflop_s * there, row.gb_s and row.gb_s * there
        row.tokens_s = row.tokens_s and row.tokens_s * there
        if row.group.startswith(("causal", "gated")):
            row.floor, row.gb_s, row.seconds = "copy", row.gb_s / there, row.seconds * there
    found = scaling.checked(content)
    assert len(found) == len(scaling.checked(whole_run())) and max(c.error for c in found) < 0.02
    for row in content["rows"]:
        row.rate = None
    assert fast == 1.0 or max(c.error for c in scaling.checked(content)) > 0.2


def test_a_layers_products_count_as_its_own_shapes_do():
    rows = [
        Row("lora_linear", f"1024 x {size} weights", "native", 1.0, times_ours=1.0, gflop_s=rate)
        for size, rate in (("768 to 3352, fp32", 200.0), ("1536 to 768, fp32", 100.0))
    ]
    content = {"rows": [*rows, whole_run()["rows"][0]], "rates": {"sgemm": {"median": 3e11}}}
    flops = (768 * 3352, 1536 * 768)
    assert scaling.measured_rates(content).flops["product"] == pytest.approx(
        1e9 * sum(flops) / (flops[0] / 200 + flops[1] / 100)
    )
    content["rows"].pop(0)
    assert scaling.measured_rates(content).flops["product"] == 2e11


def test_only_large_outputs_are_fresh_and_cost_what_was_measured():
    assert counts.fresh_memory(scaling.SMALL, 2048).bytes == 0
    assert counts.fresh_memory(scaling.SMALL, 4096).bytes == 4 * 4096 * 3352
    content = whole_run()
    content["rates"]["fresh"] = {"median": 1e9}
    slow, fast = (max(scaling.checked(c), key=lambda c: c.predicted).predicted for c in (content, whole_run()))
    assert slow == fast  # the uncached Transformer's
    layer = [c for c in scaling.checked(content) if c.row.case == "1 x 8192" and c.row.who == "Mamba-2"][0]
    assert layer.predicted - layer.measured == pytest.approx(4 * 8192 * (3352 + 1792 + 2 * 1536) / 1e9)


@pytest.mark.parametrize("missing", ["rows", "rates"])
def test_the_claim_admits_what_is_missing(missing):
    found = scaling.claim(whole_run() | {missing: type(whole_run()[missing])()})
    assert (found.passed, found.measured) == (None, "not measured")


def test_rates_come_from_rows_that_are_not_checked():
    assert not {c.row.group for c in scaling.checked(whole_run())} & {"lora_linear", "ssd_scan forward"}
    lengths = {
        results.length_of(c.row.case) for c in scaling.checked(whole_run()) if c.row.who in ("attention", CACHED)
    }
    assert min(lengths) > scaling.SHORTEST


def test_memory_is_weights_and_what_grows():
    held = 2 * counts.weight_count(scaling.SMALL) + counts.state_bytes(scaling.SMALL)
    rows = [Row("generation", "1024 tokens of context", OURS, peak_bytes=2 * held, note="bfloat16 weights")]
    (found,) = scaling.checked_memory({"rows": rows})
    assert found.error == pytest.approx(0.5)


def test_what_is_extrapolated_grows_as_it_should():
    on, model = chips.Cluster(latency=0.0), chips.LARGE
    time = lambda l, gpus=1, split="sequence", on=on: chips.prefill(model, l, gpus, split, on)[0]  # noqa: E731
    assert time(2**24) == pytest.approx(16 * time(2**20), rel=1e-2)
    assert time(2**24, 8) == pytest.approx(time(2**24) / 8, rel=1e-2)
    assert (
        chips.attention_prefill(chips.LARGE_PEER, 2**24, 1, on)[0]
        > 200 * chips.attention_prefill(chips.LARGE_PEER, 2**20, 1, on)[0]
    )
    slow = chips.Cluster(latency=0.0, link=on.link / 10)
    moved = 2 * 7 / 8 * 2 * 2**20 * model.d_model * model.n_layer
    assert time(2**20, 8, "tensor", slow) - time(2**20, 8, "tensor") == pytest.approx(9 * moved / on.link, rel=1e-6)
    waits = time(2**20, 8, on=chips.Cluster(latency=1.0)) - time(2**20, 8)
    assert waits == pytest.approx(8 * model.n_layer, rel=1e-6)
    one, eight = (chips.prefill(model, 2**24, gpus, "sequence", on)[1] for gpus in (1, 8))
    assert one / 8 < eight < one / 7
    for bad in ((7, "tensor"), (8, "pipeline"), (0, "sequence")):
        with pytest.raises(ValueError):
            time(2**20, *bad)


def test_a_gpus_run_is_extrapolated_with_what_it_measured():
    rows = [Row("decode", "1.3B", "cuda", 1.0, times_ours=1.0, floor_share=share) for share in (0.5, 0.7, 0.9)]
    rows.append(Row("decode", "1.3B", "mamba_ssm", 1.0, times_ours=2.0, floor_share=0.1))
    rates = {"gpu matmul": {"median": 6e14}, "gpu copy": {"median": 4e12}}
    chip = scaling.measured_chip({"rows": rows, "rates": rates})
    assert (chip.flops, chip.bandwidth, chip.share) == (6e14, 4e12, 0.7)
    shown = scaling.summary({"rows": rows, "rates": rates})
    assert "600 TFLOP/s and 4 TB/s, 70% of it reached (measured in this run)" in shown and "16,777,216" in shown
    assert "(assumed)" in scaling.summary({"rows": rows, "rates": rates}, on=chips.Cluster())
    assert "against measurement" not in shown
    times = [chips.prefill(chips.LARGE, l, 1, "sequence", chip)[0] for l in (2048, 16384)]
    for l, taken, off in zip((2048, 16384), times, (1.25, 1.0), strict=True):
        rows.append(Row("prefill", f"1.3B, {l} tokens", "cuda", off * taken, times_ours=1.0))
        rows.append(Row("prefill", f"1.3B, {l} tokens", "mamba_ssm", 9 * taken, times_ours=9.0))
    shown = scaling.summary({"rows": rows, "rates": rates})
    assert "1.3B, 2048 tokens -20%, 1.3B, 16384 tokens +0%; median error 10.0%." in shown
    assert scaling.summary({"rows": [], "rates": rates}) == ""


def test_chips_that_cannot_share_a_split_are_told_so():
    shown = chips.extrapolated([1, 72, 5000], chips.Cluster())
    lines = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in shown.splitlines()[2:]}
    assert len(lines) == 3 * len(chips.LENGTHS)
    assert "none: a tensor split needs a divisor of the 64 heads, got 72 chips" in lines["4,096", "72"]
    assert lines["4,096", "72"].rstrip(" |").endswith("x") and "none" not in lines["4,096", "1"]
    assert "none: got 4096 tokens and 5000 chips" in lines["4,096", "5000"] and "x " not in lines["4,096", "5000"][99:]
    one, many = (chips.prefill(chips.LARGE, 2**24, gpus, "sequence", chips.Cluster())[0] for gpus in (1, 72))
    theirs = chips.attention_prefill(chips.LARGE_PEER, 2**24, 72, chips.Cluster())[0]
    assert many < one and f"{theirs / many:.3g}x" in lines["16,777,216", "72"]


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        *((name, bad, False) for name in ("flops", "bandwidth", "link", "share") for bad in ("0", "-1", "nan", "inf")),
        *(("latency", bad, False) for bad in ("-1", "nan", "inf")),
        ("share", "1.1", False), ("share", "1", True), ("latency", "0", True), ("gpus", "0", False),
        ("gpus", "-8", False), ("gpus", "7", True),
    ],
)  # fmt: skip
def test_impossible_chips_are_refused(name, value, good, tmp_path, capsys):
    content = whole_run()
    results.save(tmp_path / "run.json", content | {"rows": results.as_json(content["rows"])})
    arguments = [str(tmp_path / "run.json"), f"--{name}={value}"]
    if good:
        assert scaling.main(arguments) == 0 and "nan" not in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        scaling.main(arguments)
    assert ended.value.code == 2 and f"--{name}: got {value}" in capsys.readouterr().err


def test_a_result_without_rates_is_named(tmp_path, capsys):
    results.save(tmp_path / "run.json", {"rows": []})
    with pytest.raises(SystemExit) as ended:
        scaling.main([str(tmp_path / "run.json")])
    assert ended.value.code == 2 and "it has no rates" in capsys.readouterr().err
