"""Tables from results: for the terminal, and for the README between its markers.

``python -m bench.report`` rewrites README.md from the latest whole run; ``--check`` only says whether that would
change it.

A README holds a part where it has ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; NAME is a key of ``PARTS``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from . import ablation, results
from .machine import ROOT
from .results import Row

Content = dict[str, Any]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def time_of(row: Row) -> str:
    return duration(row.seconds) if row.seconds else f"not timed: {row.reason}"


def floor_of(row: Row) -> str:
    return f"{row.floor_share:.2f} of {row.floor}" if row.floor_share else ""


def ratio_of(row: Row) -> str:
    return f"{row.times_ours:.3g}x ours" if row.times_ours not in (None, 1.0) else ""


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns, which also reads well in a terminal."""
    cells = [[cell.replace("|", "/") for cell in line] for line in [header, *lines]]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    join = lambda line: "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([join(cells[0]), join(["-" * w for w in widths]), *map(join, cells[1:])])


def must_show(content: Content) -> str:
    verdict = {True: "yes", False: "no", None: "not judged"}
    return table(
        ["what", "required", "measured", "met"],
        [[c["what"], c["required"], c["measured"], verdict[c["passed"]]] for c in content["claims"]],
    )


def ops(content: Content) -> str:
    """Every operation and contender: time, throughput, share of the floor, ratio to ours, peak memory."""
    lines = []
    for row in content["rows"]:
        if not row.group.startswith(("layer", "generation", "130M")):
            peak = f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else ""
            rate = f"{row.gflop_s:.0f} GFLOP/s" if row.floor == "sgemm" else f"{row.gb_s:.1f} GB/s" if row.gb_s else ""
            lines.append([row.group, row.case, row.who, time_of(row), rate, floor_of(row), ratio_of(row), peak])
    return table(["operation", "case", "by", "time", "rate", "floor", "against ours", "peak memory"], lines)


def scaling(content: Content) -> str:
    """Both layers at each length, forward and training, with the fitted exponents below."""
    groups, kinds = ("layer forward", "layer forward + backward"), ("Mamba-2", "attention")
    columns = [(group, who) for group in groups for who in kinds]
    known = {(r.group, r.who, r.case): r for r in content["rows"] if r.group in groups}
    cases = list(dict.fromkeys(case for _, _, case in known))
    short = {"layer forward": "forward", "layer forward + backward": "forward + backward"}
    lines = [
        [case.split()[-1], *(time_of(known[(*c, case)]) if (*c, case) in known else "" for c in columns)]
        for case in cases
    ]
    slopes = {(e["group"], e["who"]): e for e in content["exponents"]}
    for label, key in (("exponent", "exponent"), ("exponent, longer half", "exponent_of_longer_half")):
        lines.append([label, *(f"{slopes[c][key]:.2f}" if c in slopes else "" for c in columns)])
    return table(["tokens", *(f"{who}, {short[group]}" for group, who in columns)], lines)


def generation(content: Content) -> str:
    lines = []
    for row in content["rows"]:
        if row.group.startswith(("generation", "130M")):
            speed = f"{row.tokens_s:.1f}" if row.tokens_s else time_of(row)
            peak = f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else ""
            lines.append([row.group, row.case, row.who, speed, ratio_of(row), floor_of(row), peak, row.note])
    return table(["what", "case", "by", "tokens/s", "against ours", "floor", "peak memory", "note"], lines)


def machine(content: Content) -> str:
    about, rates = content["machine"], content["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    units = {
        "sgemm": ("GFLOP/s fp32 matmul", 1e9),
        "far copy": ("GB/s copied in DRAM", 1e9),
        "read": ("GB/s read from DRAM", 1e9),
    }
    measured = ", ".join(f"{r['median'] / units[k][1]:.0f} {units[k][0]}" for k, r in rates.items() if k in units)
    return (
        f"{about['device']}, {about['threads']} threads, {about['instruction_set'] or 'no native'} kernels; "
        f"{measured} (medians of the run); {versions}; commit {about['commit']}, {content['started'][:10]}, "
        f"{content['seconds'] / 60:.0f} minutes."
    )


TABLES = {
    "must show": must_show,
    "generation, 130M parameters": generation,
    "a layer against attention, tokens": scaling,
    "operations": ops,
    "machine": machine,
}


def bench(content: Content) -> str:
    """All tables, the long one folded."""
    titles = {
        "must show": "What is promised, and what one run measured:",
        "generation, 130M parameters": "The 130M shape, random weights, batch 1:",
        "a layer against attention, tokens": "One layer of width 768, fp32, seconds by number of tokens:",
        "operations": "<details><summary>Every operation, backend and peer</summary>",
        "machine": "",
    }
    parts = []
    for name, title in titles.items():
        end = ["", "</details>"] if title.startswith("<details>") else []
        parts.append("\n".join([*([title, ""] if title else []), TABLES[name](content), *end]))
    return "\n\n".join(parts)


def demo(content: Content) -> str:
    """The demo's scores as the run found them."""
    scores = content["demo"]
    if not scores:
        return "The run of the benchmarks found no scores of the demo."
    return table(["score", "value"], [[name, f"{value:.4g}"] for name, value in scores.items()])


def ablations(content: Content) -> str:
    """What `python -m bench.ablation` has kept, whenever it ran."""
    header, lines = ablation.table()
    return table(header, lines) if lines else "The ablation has not run: python -m bench.ablation."


PARTS = {"bench": bench, "demo": demo, "ablation": ablations}


def sections(content: Content) -> dict[str, str]:
    """Each table under its title, for the terminal."""
    return {f"benchmarks: {name}": make(content) for name, make in TABLES.items()}


def filled(readme: str, content: Content) -> str:
    """The README with ``content``'s tables between its markers. ValueError for a marker unknown or open."""
    for name in re.findall(r"<!-- (\S+):begin -->", readme):
        if name not in PARTS:
            raise ValueError(f"README marker {name}:begin: expected one of {', '.join(PARTS)}")
        block = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        if not block.search(readme):
            raise ValueError(f"README marker {name}:begin is not closed by <!-- {name}:end --> on a later line")
        text = PARTS[name](content)
        readme = block.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", readme)
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, help="a result file (default: the latest whole run)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is out of date")
    options = parser.parse_args(arguments)
    path = options.results or results.latest()
    if path is None:
        parser.error("no whole run under bench/results: run pytest bench/ first")
    before = options.readme.read_text()
    after = filled(before, results.load(path))
    if options.check:
        return int(after != before)
    options.readme.write_text(after)
    print(f"{options.readme} shows {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
