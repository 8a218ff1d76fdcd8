"""What is promised of operations and of the 130M model: thresholds, whose rows they judge, which way they point."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import claims, results  # noqa: E402

Row = functools.partial(results.Row, rounds=claims.ENOUGH)

OURS = "Mamba-2 130M"
AGAINST_PEERS = [
    ("130M, prefill of 2048, against transformers fp32", "130M prefill", "2048 tokens", "transformers 5.23.0", 2.6),
    ("130M, decode with bf16 weights, against transformers fp32", "130M decode", "bf16 weights", "transformers", 7),
    ("130M, prefill of 2048, against llama.cpp F32", "130M prefill", "2048 tokens", "llama-cpp-python, F32", 1.15),
    ("130M, decode with bf16 weights, against llama.cpp BF16", "130M decode", "bf16 weights", "llama-cpp, BF16", 1.3),
    ("130M, decode with int8 weights, against llama.cpp Q8_0", "130M decode", "int8 weights", "llama-cpp, Q8_0", 1.4),
]
SHARES = [
    ("130M, decode with bf16 weights, share", "130M decode", ["bf16 weights"], 0.65),
    ("SSD forward, share", "ssd_scan forward", [f"1 x {l}, {h} heads" for l in (1024, 4096) for h in (24, 64)], 0.95),
    ("bf16 product", "lora_linear", [f"{r} x 2048 to 8512, bf16 weights" for r in (1, 4)], 0.85),
]


def verdict(rows: list[results.Row], what: str) -> bool | None:
    (found,) = (c["passed"] for c in claims.judge(rows, {}) if c["what"].startswith(what))
    return found


@pytest.mark.parametrize(("what", "group", "case", "peer", "least"), AGAINST_PEERS, ids=[c[0] for c in AGAINST_PEERS])
def test_a_promise_against_a_peer(what, group, case, peer, least):
    """A peer that takes `least` times as long keeps it, one a little faster breaks it; others' rows do not count."""

    def rows(times: float, group=group, case=case, peer=peer) -> list[results.Row]:
        return [Row(group, case, OURS, 1.0, times_ours=1.0), Row(group, case, peer, times, times_ours=times)]

    assert verdict(rows(least), what) is True
    assert verdict(rows(0.99 * least), what) is False
    assert verdict(rows(100.0, group="130M"), what) is None
    assert verdict(rows(100.0, case="fp32 weights"), what) is None
    assert verdict(rows(100.0, peer="Transformer"), what) is None
    few = rows(100.0)
    few[1].rounds = 2
    assert verdict(few, what) is None


@pytest.mark.parametrize(("what", "group", "cases", "least"), SHARES, ids=[c[0] for c in SHARES])
def test_a_promise_about_a_share_of_the_floor(what, group, cases, least):
    """The worst case decides, ours alone, and all have to be there."""

    def rows(shares: list[float]) -> list[results.Row]:
        found = [
            Row(group, case, OURS, 1.0, times_ours=1.0, floor_share=s) for case, s in zip(cases, shares, strict=False)
        ]
        return [*found, Row(group, cases[0], "a peer", 2.0, times_ours=2.0, floor_share=0.01)]

    assert verdict(rows([least] * len(cases)), what) is True
    assert verdict(rows([*[2.0] * (len(cases) - 1), 0.99 * least]), what) is False
    assert verdict(rows([2.0] * (len(cases) - 1)), what) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_of_16_bit_values_enter_no_promise_about_fp32(dtype):
    group, what = "ssd_scan forward", "SSD forward, share"
    rows = [
        Row(group, f"1 x {l}, {h} heads", OURS, 1.0, times_ours=1.0, floor_share=1.0)
        for l in (1024, 4096)
        for h in (24, 64)
    ]
    narrow = Row(group, f"1 x 1024, 24 heads, {dtype}", OURS, 1.0, times_ours=1.0, floor_share=0.1)
    assert narrow.narrow and not rows[0].narrow
    assert verdict([*rows, narrow], what) is True
    assert verdict([*rows[1:], narrow], what) is None


def test_a_whole_run_has_its_time():
    assert claims.in_time(1800.0, 30.0).passed and not claims.in_time(1801.0, 30.0).passed


@pytest.mark.parametrize("times", [(12.0, 6.0), (11.9, 6.0), (12.0, 5.9)], ids=str)
def test_the_scans_promises(times):
    rows = [
        Row(group, case, "transformers 5.23.0", 1.0, times_ours=t)
        for group, t in zip(("ssd_scan forward", "ssd_scan forward + backward"), times, strict=True)
        for case in SHARES[1][2]
    ]
    assert verdict(rows, "SSD forward, 4 shapes") is (times[0] >= 12)
    assert verdict(rows, "SSD forward + backward") is (times[1] >= 6)


@pytest.mark.parametrize(("share", "kept"), [(0.70, True), (0.69, False)])
def test_the_convolutions_promise_is_about_dram(share, kept):
    """Of a copy from DRAM to DRAM, whatever the share of a copy as large."""
    found = {"times_ours": 1.0, "floor_share": 0.1, "far_share": share}
    rows = [Row("causal_conv1d forward", "1 x 4096 x 1792", OURS, 1.0, **found)]
    assert verdict(rows, "conv1d with SiLU") is kept


@pytest.mark.parametrize(("mine", "kept"), [(33, True), (34, False), (None, None)])
def test_the_scans_promise_about_memory(mine, kept):
    group, case = "ssd_scan forward + backward", "1 x 4096, 24 heads"
    ours = Row(group, case, OURS, 1.0, times_ours=1.0, peak_bytes=mine)
    rows = [ours, Row(group, case, "transformers 5.23.0", 9.0, times_ours=9.0, peak_bytes=100)]
    assert verdict(rows, "its peak memory") is kept
