"""A run's results for readers: the README's tables, a Markdown page with plots, one HTML page that needs no other file.

``python -m bench.report`` rewrites README.md from the latest whole run and puts the two pages beside the result file
(bench.pages); ``--check`` writes nothing and only says whether the README would change.

A README holds a part where it has ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; NAME is a key of ``PARTS``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import ablation, accuracy, pages, results
from .machine import ROOT
from .tables import TABLES, Content, on_gpu, table

READING = (
    "A time is the median of its own rounds. A ratio is the median over the rounds that both ran, side by side, so two "
    "times need not divide to it. A floor is the time at a rate measured in the same run: torch's fp32 matmul{bf16}, a "
    "read of DRAM, or torch's copy of as many bytes (which also reads what it overwrites, so that a kernel that works "
    "in place can be above 1). Peak memory is what a call adds at its height; of scan training, generation and "
    "OmniMamba what a process of its own needs for it, inputs and weights included.{threads}"
)
BOUND = " While something is timed each thread keeps to one processor."
BF16 = {
    True: ", its bf16 matmul where the processor is faster at it and the operands are bf16",
    False: " (of bf16 products too, which a processor's matrix unit does several times faster)",
}
"""By whether the run measured it."""
GPU_READING = (
    "Times are medians of calls timed by the device's own events, each after everything was pushed out of its cache; "
    "as a graph: the same calls replayed as a CUDA graph. The floor is the longer of bytes over a copy's speed and "
    "FLOPs over the rate of torch's bf16 matmul, both measured in the same process. Clocks are medians while the calls "
    "ran, with what held them back; joules, of an operation's first case and of a model's, are a call's or its "
    "graph's in a second back to back, by the driver. (~: three steps measured, and summed.)"
)

TITLES = {
    "must show": "What is promised, and what one run measured:",
    "generation, 130M parameters": "The 130M shape, random weights, batch 1:",
    "the paper's figures": "The paper's figures (1.3B on one RTX 4090, fp16) beside ours (130M on this machine):",
    "a layer against attention, tokens": "One layer of width 768, fp32, by number of tokens (~: from pieces):",
    "operations": "<details><summary>Every operation, backend and peer</summary>",
    "machine": READING,
}
GPU_TITLES = {
    "must show": "What must be shown on an H200, and what one run measured:",
    "generation, 130M parameters": "The 1.3B shape, random weights, bf16, batch 1 but for the images:",
    "the paper's figures": "The paper's figures (1.3B on one RTX 4090, fp16) beside ours (1.3B on this GPU, bf16):",
    "a layer against attention, tokens": "One layer of width 2048, bf16, by number of tokens:",
    "operations": TITLES["operations"],
    "machine": GPU_READING,
}


def bench(content: Content) -> str:
    """All tables, the long one folded."""
    parts = []
    for name, title in (GPU_TITLES if on_gpu(content) else TITLES).items():
        text = TABLES[name](content)
        if not text:
            continue
        bound = content.get("threads", {}).get("bound")
        title = title.format(bf16=BF16["bf16 gemm" in content["rates"]], threads=BOUND if bound else "")
        end = ["", "</details>"] if title.startswith("<details>") else []
        parts.append("\n".join([*([title, ""] if title else []), text, *end]))
    return "\n\n".join(parts)


def gpu(content: Content | None) -> str:
    """The same of a run on a GPU, where there is one."""
    return bench(content) if content else "No whole run on a GPU is kept: `pytest bench` where there is one makes it."


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


def narrow(content: Content) -> str:
    """What `python -m bench.accuracy` has kept, whenever it ran."""
    found = accuracy.kept()
    return accuracy.table(found["costs"]) if found else "Not scored: python -m bench.accuracy."


PARTS = {"bench": bench, "gpu": gpu, "demo": demo, "ablation": ablations, "accuracy": narrow}


def filled(readme: str, content: Content, of_gpu: Content | None = None) -> str:
    """The README with the tables of a run on a CPU and of one on a GPU, if any, between its markers.

    ValueError for a marker unknown or open, and where there is none of "bench"."""
    for name in _marked(readme):
        block = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        if not block.search(readme):
            raise ValueError(f"README marker {name}:begin is not closed by <!-- {name}:end --> on a later line")
        text = PARTS[name](of_gpu if name == "gpu" else content)
        readme = block.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", readme)
    return readme


def _marked(readme: str) -> list[str]:
    """The parts, in order: of each a beginning, then its end, with no other marker between."""
    marks = re.findall(r"<!-- (\S+):(begin|end) -->", readme)
    open_: str | None = None
    for name, which in marks:
        if name not in PARTS:
            raise ValueError(f"README marker {name}:{which}: expected one of {', '.join(PARTS)}")
        if which == "begin" and open_:
            raise ValueError(f"README marker {open_}:begin is not closed before {name}:begin")
        if which == "end" and open_ != name:
            raise ValueError(f"README marker {name}:end comes after no {name}:begin of its own")
        open_ = name if which == "begin" else None
    if open_:
        raise ValueError(f"README marker {open_}:begin is not closed by <!-- {open_}:end --> on a later line")
    parts = [name for name, which in marks if which == "begin"]
    if "bench" not in parts:
        raise ValueError("the README has no <!-- bench:begin --> and <!-- bench:end -->, between which tables stand")
    return parts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, help="a result file (default: the latest whole run)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is out of date")
    options = parser.parse_args(arguments)
    path, content = results.chosen(parser, options.results)
    try:
        before, after = options.readme.read_text(), None
        if results.is_whole(content):
            after = filled(before, *both(path, content))
        elif options.check:
            raise ValueError(f"{path} is of a quick or partial run, which no README shows")
        if options.check:
            return int(after != before)
        written = pages.write(path, content)
        if after is None:
            print(f"{options.readme} is as it was: {path} is of a quick or partial run")
        else:
            options.readme.write_text(after)
            print(f"{options.readme} shows {path}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for page in written:
        print(page)
    return 0


def both(path: Path, content: Content) -> tuple[Content, Content | None]:
    """The run and the latest whole one of the other kind: CPU's, GPU's."""
    other = results.latest(gpu=not on_gpu(content))
    beside = results.load_run(other) if other else None
    if on_gpu(content):
        return beside or content, content
    return content, beside


if __name__ == "__main__":
    sys.exit(main())
