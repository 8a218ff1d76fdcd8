"""The pages of a run: what the plots show, tables in HTML, one file that needs no other."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import pages, plots, published, results  # noqa: E402
from bench.results import Row  # noqa: E402


def rows() -> list[Row]:
    found = []
    for length in (4096, 1024, 16384):
        found.append(Row("layer forward", f"1 x {length}", "Mamba-2", 1e-6 * length, gflop_s=200.0, times_ours=1.0))
        found.append(
            Row("layer forward", f"1 x {length}", "attention", 1e-9 * length**2, gflop_s=150.0, times_ours=2.0)
        )
        case = f"{length} tokens in all"
        found.append(Row("whole generation", case, published.OURS, 0.01 * length, times_ours=1.0, peak_bytes=3 * 10**8))
        peak = 10**8 + 40_000 * length
        found.append(Row("whole generation", case, published.CACHED, 0.05 * length, times_ours=5.0, peak_bytes=peak))
    found.append(Row("gated_norm forward", "1 x 4096 x 1536", "native", 1e-3, gb_s=24.0, times_ours=1.0))
    found.append(Row("gated_norm forward", "1 x 4096 x 1536", "a <peer>", 3e-3, gb_s=8.0, times_ours=3.0))
    return found


def content() -> dict:
    return {
        "started": "2026-11-23T10:00:00+00:00", "seconds": 60.0, "demo": {}, "claims": [], "exponents": [],
        "machine": {"device": "A CPU", "threads": 2, "instruction_set": "avx2", "versions": {}, "commit": "abc"},
        "rates": {k: {"median": r} for k, r in (("sgemm", 3e11), ("far copy", 2e10), ("read", 3e10))}, "rows": rows(),
    }  # fmt: skip


def test_curves_are_sorted_and_have_their_exponents():
    found = plots.curves(rows(), "layer forward", "seconds")
    assert [length for length, _ in found["attention"]] == [1024, 4096, 16384]
    assert plots.slope(found["attention"]) == pytest.approx(2) and plots.slope(found["Mamba-2"]) == pytest.approx(1)
    memory = plots.curves(rows(), "whole generation", "peak_bytes")
    assert plots.slope(memory[published.OURS]) == pytest.approx(0) and plots.slope(memory[published.CACHED]) > 0.7


def test_the_roofline_places_what_is_known():
    found = {(what, who): (x, y) for what, who, x, y in plots.roofline_points(rows())}
    x, y = found["gated_norm forward, 1 x 4096 x 1536", "native"]
    assert (x, y) == (pytest.approx(8 / 12), pytest.approx(24e9 * 8 / 12))
    short, long = (found[f"layer forward, 1 x {n}", "attention"][0] for n in (1024, 16384))
    assert long > 4 * short
    assert not [what for what, _ in found if what.startswith("whole generation")]
    scan = Row("ssd_scan forward", "1 x 4096, 64 heads", "native", 0.05, gflop_s=220.0, times_ours=1.0)
    ((_, _, x, y),) = plots.roofline_points([scan])
    flops, moved = 64 * (2 * 64 * 64 + 4 * 128 * 64) + 2 * 64 * 128, 4 * (4096 + 2 * 128 + 64 + 4096)  # of a token
    assert (x, y) == (pytest.approx(flops / moved), 220e9)


def test_ratios_are_the_peers():
    assert ("gated_norm forward, 1 x 4096 x 1536: a <peer>", 3.0) in plots.ratios(rows())
    assert len(plots.ratios(rows())) == 7


class Reader(HTMLParser):
    """What a browser would see: tags opened and closed in order, pictures, cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.pictures, self.cells, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        if tag == "img":
            self.pictures.append(known["src"])
        self.links += [v for k, v in attrs if k in ("href", "src") and not v.startswith("data:")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_pages_stand_beside_the_result(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "2026-11-23-abc.json"
    page, document = pages.write(path, content())
    text = page.read_text()
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [Path(name).stem for name in names] == ["time", "memory", "roofline", "ratios"]
    for name in names:
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert "| a <peer> " in text and "PREDICTION, not measured" in text
    reader = Reader()
    reader.feed(document.read_text())
    assert not reader.open and not reader.links
    assert len(reader.pictures) == 4 and all(p.startswith("data:image/png;base64,") for p in reader.pictures)
    assert "a <peer>" in reader.cells and not [cell for cell in reader.cells if cell.startswith("---")]


def test_a_run_without_rows_and_a_machine_without_matplotlib_have_pages_too(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    page, document = pages.write(tmp_path / "few.json", content() | {"rows": []})
    assert "matplotlib is not installed" in page.read_text() and "A CPU" in document.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.html", "few.md"]


def test_cases_name_their_lengths():
    assert [results.length_of(c) for c in ("1 x 4096", "1024 tokens of context", "1 x 4096, 24 heads")] == [
        4096,
        1024,
        4096,
    ]
