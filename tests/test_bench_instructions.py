"""Kernels need no more instructions than are kept: what callgrind counts, which a busy machine does not change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import compare, instructions  # noqa: E402

KEPT = json.loads(instructions.KEPT.read_text())


def test_no_kernel_needs_more_instructions_than_are_kept():
    reason = instructions.why_not()
    if reason is None and instructions.compiler() != KEPT["compiler"]:
        reason = f"counts are kept for {KEPT['compiler']}, this build is of {instructions.compiler()}"
    if reason:
        pytest.skip(reason)
    found = instructions.count()
    assert {name: set(counts) for name, counts in found.items()} == {
        name: set(counts) for name, counts in KEPT["counts"].items()
    }, "python -m bench.instructions --keep"
    worse = instructions.more(KEPT["counts"], found)
    assert not worse, f"{worse}; if that is right: python -m bench.instructions --keep"


def test_wider_vectors_need_fewer_instructions():
    narrow, wide = (KEPT["counts"][name] for name in ("generic", "avx2"))
    assert all(0 < wide[case] < narrow[case] for case in narrow)


def counts(compiler: str, instructions: int) -> dict:
    return {"compiler": compiler, "counts": {"avx2": {"scan": instructions}}}


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (counts("GNU 12", 1000), counts("GNU 12", 1030), 1),
        (counts("GNU 12", 1000), counts("GNU 12", 1010), 0),
        (counts("GNU 12", 1000), counts("GNU 12", 500), 0),
        (counts("GNU 12", 1000), counts("GNU 13", 5000), 0),
    ],
)
def test_counts_are_compared(before, after, status, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    assert compare.main([str(p) for p in paths]) == status
    assert ("+3.0%" in capsys.readouterr().out) == bool(status)
