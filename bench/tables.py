"""Tables from results, in Markdown with aligned columns, which also reads well in a terminal."""

from __future__ import annotations

from typing import Any

from . import published, results
from .plain import COMPILED
from .rates import PRODUCTS
from .results import Row, ratio_text

Content = dict[str, Any]
MODEL_GROUPS = ("generation", "whole generation", "130M", "decode", "prefill", "images")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def time_of(row: Row) -> str:
    return duration(row.seconds) if row.seconds else f"not timed: {row.reason}"


def cold(row: Row) -> bool:
    """Whether a compiled peer has but one round: the call after its compilation, which says little of the next."""
    return row.who == COMPILED and row.rounds_taken == 1


def floor_of(row: Row) -> str:
    floor = "fp32 sgemm" if row.floor == "sgemm" else row.floor
    return f"{row.floor_share:.2f} of {floor}" if row.floor_share else ""


def rounds_of(row: Row) -> str:
    """How many rounds the figures stand on."""
    return f"{row.rounds} of {row.rounds_taken}" if row.seconds and row.rounds_taken else ""


def measured_parts(row: Row) -> str:
    """What its note says of the parts that a time was summed from; empty where the whole was timed."""
    return next((said for said in row.note.split("; ") if " measured" in said), "")


def summed(row: Row) -> str:
    """A mark before a time that some of its parts were measured for."""
    return "~" if measured_parts(row) else ""


def explained(row: Row) -> str:
    """The time, and of one that is summed the mark and which parts were measured."""
    parts = measured_parts(row) if row.seconds else ""
    return f"~{time_of(row)} ({parts})" if parts else time_of(row)


def ratio_of(row: Row) -> str:
    return f"{ratio_text(row.times_ours)} ours" if row.times_ours not in (None, 1.0) else ""


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
    lines, gpu = [], on_gpu(content)
    for row in content["rows"]:
        if not row.group.startswith(("layer", *MODEL_GROUPS)) and not cold(row):
            peak = f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else ""
            cells = [explained(row), rate_of(row, gpu), floor_of(row), ratio_of(row), rounds_of(row), peak]
            lines.append([row.group, row.case, row.who, *cells, *(of_the_chip(row) if gpu else ())])
    header = ["operation", "case", "by", "time", "rate", "floor", "against ours", "rounds", "peak memory"]
    return table([*header, *(OF_THE_CHIP if gpu else ())], lines)


def on_gpu(content: Content) -> bool:
    return bool(content.get("gpu"))


def rate_of(row: Row, gpu: bool = False) -> str:
    """What a CPU's floor is made of; of a GPU both."""
    moved, computed = (f"{row.gb_s:.{0 if gpu else 1}f} GB/s" if row.gb_s else ""), row.gflop_s
    if gpu:
        return ", ".join(filter(None, [moved, f"{computed / 1e3:.3g} TFLOP/s" if computed else ""]))
    return f"{computed:.0f} GFLOP/s" if row.floor in PRODUCTS else moved


OF_THE_CHIP = ("as a graph", "first call", "SM and memory clock", "joules")


def of_the_chip(row: Row) -> list[str]:
    """What only a GPU's row has, in the order of OF_THE_CHIP; clocks with what held them back."""
    clocks = " and ".join(f"{clock:.0f}" for clock in (row.clock_mhz, row.memory_clock_mhz) if clock)
    clocks += " MHz" if clocks else ""
    return [
        duration(row.graph_seconds) if row.graph_seconds else "",
        duration(row.first_call) if row.first_call else "",
        ", ".join(filter(None, [clocks, *row.throttled])),
        f"{row.joules:.2g}" if row.joules else "",
    ]


def scaling(content: Content) -> str:
    """Both layers at each length, forward and training, with the fitted exponents below."""
    groups = ("layer forward", "layer forward + backward")
    kinds = list(dict.fromkeys(row.who for row in content["rows"] if row.group in groups)) or ["Mamba-2", "attention"]
    columns = [(group, who) for group in groups for who in kinds]
    known = {(r.group, r.who, r.case): r for r in content["rows"] if r.group in groups}
    cases = list(dict.fromkeys(case for _, _, case in known))
    short = {"layer forward": "forward", "layer forward + backward": "forward + backward"}
    cell = lambda row: summed(row) + time_of(row) if row else ""  # noqa: E731
    lines = [[str(results.length_of(case)), *(cell(known.get((*c, case))) for c in columns)] for case in cases]
    slopes = {(e["group"], e["who"]): e for e in content["exponents"]}
    for label, key in (("exponent", "exponent"), ("exponent, longer half", "exponent_of_longer_half")):
        lines.append([label, *(f"{slopes[c][key]:.2f}" if c in slopes else "" for c in columns)])
    return table(["tokens", *(f"{who}, {short[group]}" for group, who in columns)], lines)


def generation(content: Content) -> str:
    lines, gpu = [], on_gpu(content)
    for row in content["rows"]:
        if row.group.startswith(MODEL_GROUPS):
            speed = f"{row.tokens_s:.1f}" if row.tokens_s else time_of(row)
            peak = f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else ""
            cells = [summed(row) + speed, ratio_of(row), rounds_of(row), floor_of(row), peak, row.note]
            lines.append([row.group, row.case, row.who, *cells, *(of_the_chip(row) if gpu else ())])
    header = ["what", "case", "by", "tokens/s", "against ours", "rounds", "floor", "peak memory", "note"]
    return table([*header, *(OF_THE_CHIP if gpu else ())], lines)


def paper(content: Content) -> str:
    """The paper's claims beside ours in both protocols, then its Figure 1; empty where nothing of it was measured."""
    found = published.beside(content["rows"])
    if not found:
        return ""
    header = ["the paper's", "claimed", "ours, its protocol: no cache", "ours, fair: static KV cache"]
    claims = table(header, [[p.what, p.claimed, p.without_cache or "", p.with_cache or ""] for p in found])
    drawing = published.drawing_at_once(content["rows"])
    theirs, drawn = ", ".join(f"{who} {rate}" for who, rate in published.TABLE_3.items()), ""
    if drawing:
        here = f"{summed(drawing)}{published.AT_ONCE / drawing.seconds:.3g} here"
        drawn = f"Images a second, {published.AT_ONCE} at once, 1.3B: {here}; the paper's: {theirs}."
    return "\n\n".join(filter(None, [claims, figure_1(content), drawn]))


def dtype_in(row: Row) -> str:
    """The type of a model's weights, where its row's note says it."""
    return next((f", {short}" for name, short in DTYPES.items() if row.note.startswith(name)), "")


DTYPES = {"float32 weights": "fp32", "bfloat16 weights": "bf16"}


def figure_1(content: Content) -> str:
    """Seconds and GB of a whole generation, ours on this machine beside the paper's curves."""
    own, lines = tuple(published.names(content["rows"])), []
    peers = ("OmniMamba", "JanusFlow", "Show-o")
    for length, curves in published.FIGURE_1.items():
        rows = [results.find(content["rows"], "whole generation", f"{length} tokens in all", who) for who in own]
        cells = [f"{summed(r)}{r.seconds:.4g} s{dtype_in(r)}" if r and r.seconds else "" for r in rows]
        cells = [
            f"{c}, {r.peak_bytes / 1e9:.2f} GB" if c and r.peak_bytes else c for c, r in zip(cells, rows, strict=True)
        ]
        theirs = [f"{curves[who][0]:g} s, {curves[who][1]:.2f} GB" if who in curves else "" for who in peers]
        lines.append([f"{length // 1024}K", *cells, *theirs])
    return table(["tokens", *own, *(f"paper: {who}" for who in peers)], lines)


def machine(content: Content) -> str:
    about, rates = content["machine"], content["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    units = {
        "sgemm": ("GFLOP/s fp32 matmul", 1e9),
        "far copy": ("GB/s copied in DRAM", 1e9),
        "read": ("GB/s read from DRAM", 1e9),
        "bf16 gemm": ("GFLOP/s bf16 matmul", 1e9),
        "gpu copy": ("GB/s copied on the GPU", 1e9),
        "gpu matmul": ("TFLOP/s bf16 matmul on the GPU", 1e12),
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
    "the paper's figures": paper,
    "a layer against attention, tokens": scaling,
    "operations": ops,
    "machine": machine,
}


def sections(content: Content) -> dict[str, str]:
    """Each table under its title, for the terminal."""
    return {f"benchmarks: {name}": text for name, make in TABLES.items() if (text := make(content))}
