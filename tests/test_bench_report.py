"""A README shows whole runs alone, between markers that are in order, and changes where all else went well."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from test_bench import MARKED, content, layer_rows

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import pages, report, results  # noqa: E402


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Takes a result's content; the arguments that show it, the README's path and the result's."""
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    readme, result = tmp_path / "README.md", tmp_path / "run.json"
    readme.write_text(MARKED)

    def keep(found: dict) -> tuple[list[str], Path, Path]:
        results.save(result, found)
        return ["--readme", str(readme), "--results", str(result)], readme, result

    return keep


def ends(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        report.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"complete": False}, {"quick": True}])
def test_a_quick_or_partial_run_has_pages_and_no_readme(kept, change, capsys):
    arguments, readme, result = kept(content(layer_rows()) | change)
    assert report.main(arguments) == 0
    assert readme.read_text() == MARKED and "is as it was" in capsys.readouterr().out
    assert "| 32768 " in result.with_suffix(".md").read_text() and result.with_suffix(".html").exists()
    ends([*arguments, "--check"], "no README shows", capsys)


def changed(**values) -> dict:
    """A result whose second row has these values."""
    found = content(layer_rows())
    found["rows"][1] |= values
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        *((changed(seconds=bad), f"seconds is {bad}") for bad in (math.nan, math.inf, 0.0, -1.0)),
        (changed(floor_share=0.0), "floor_share is 0.0"),
        (changed(seconds="1"), "seconds is '1'"),
        (changed(rounds=True), "rounds is True"),
        (changed(reason=7), "reason is 7"),
        (changed(case="a case"), "'a case' names no length"),
        *(
            ({k: v for k, v in content([]).items() if k != name}, f"it has no {name}")
            for name in ("started", "seconds", "machine", "rates", "demo", "claims", "exponents")
        ),
        (content([]) | {"claims": None}, "claims is None"),
    ],
)
def test_what_cannot_be_shown_changes_nothing(kept, found, said, capsys):
    arguments, readme, result = kept(found)
    ends(arguments, said, capsys)
    assert readme.read_text() == MARKED and not result.with_suffix(".md").exists()


def test_a_page_that_cannot_be_written_leaves_the_readme(kept, monkeypatch, capsys):
    arguments, readme, _ = kept(content(layer_rows()))

    def full(*_) -> list:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "write", full)
    ends(arguments, "No space left", capsys)
    assert readme.read_text() == MARKED
    ends(["--readme", str(readme.parent / "none.md"), *arguments[2:]], "none.md", capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("words alone", "has no <!-- bench:begin -->"),
        ("<!-- bench:begin -->\nmine\n<!-- bench:begin -->\n<!-- bench:end -->\n", "not closed before bench:begin"),
        ("<!-- bench:begin -->\n<!-- demo:begin -->\n<!-- demo:end -->\n<!-- bench:end -->\n", "before demo:begin"),
        ("<!-- bench:begin -->\n<!-- bench:end -->\nmine\n<!-- bench:end -->\n", "comes after no bench:begin"),
        ("<!-- bench:begin -->\n<!-- bench:end -->\n<!-- demo:end -->\n", "comes after no demo:begin"),
        ("<!-- bench:begin --><!-- bench:end -->\n", "on a later line"),
    ],
)
def test_markers_out_of_order_change_nothing(kept, text, said, capsys):
    arguments, readme, result = kept(content(layer_rows()))
    readme.write_text(text)
    ends(arguments, said, capsys)
    assert readme.read_text() == text and not result.with_suffix(".md").exists()
