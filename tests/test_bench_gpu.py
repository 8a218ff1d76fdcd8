"""A run of the benchmarks on a GPU: the same code on small problems where there is none, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import conftest, gpu_check, gpu_ops, gpu_run, pages, plain, published, report, results, tables  # noqa: E402
from bench.gpu_clock import Clock  # noqa: E402
from bench.gpu_problems import OPERATIONS, common, generation, lora, models, scan  # noqa: E402
from bench.gpu_problems.common import Problem, Steps  # noqa: E402
from bench.integrated import positions  # noqa: E402
from bench.results import Row  # noqa: E402
from omnimamba_kernels import backends  # noqa: E402

CPU = torch.device("cpu")
OURS = "native" if backends()["native"] is None else "reference"
OPS = ("gated_norm", "models", "generation")


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> conftest.Session:
    """A run of three operations, in this process instead of one each."""

    if torch.cuda.is_available():
        pytest.skip("it would be a run on a GPU")

    def child(arguments: list[str], seconds: float, log: Path, **environment: str) -> int:
        return gpu_ops.main(arguments[2:])

    folder = tmp_path_factory.mktemp("results")
    options = {"--quick": False, "--device": "gpu", "--results": str(folder), "--minutes": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "child", child)
        found = conftest.Session(SimpleNamespace(getoption=options.get))
        for op in OPS:
            part = found.on_gpu.measure(op)
            assert part.status == "ok", part
    found.collected, found.total, found.done = conftest.files(gpu=True), 3, 3
    return found


@pytest.fixture
def as_on_a_gpu(session, monkeypatch) -> dict:
    """What the run would keep if its device had been a GPU of the published size."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = json.dumps(session.content()).replace("tiny", "1.3B").replace(f'"{OURS}"', '"cuda"')
    content = json.loads(text)
    content["rows"] = [row for row in content["rows"] if row["group"] != published.MEMORY_GROUP]  # a CPU's have none
    whole, held = [row for row in content["rows"] if row["group"] == published.WHOLE], [4e9, 9e9, 6e9]
    for row, peak in zip(whole, held, strict=True):
        content["rows"].append({**row, "case": published.SPEED_CASE, "peak_bytes": int(peak)})
        content["rows"].append(
            {**row, "group": published.MEMORY_GROUP, "case": published.MEMORY_CASE, "peak_bytes": int(peak)}
        )
    for row in content["rows"]:
        if row["group"] == models.IMAGES:
            row["case"], row["seconds"] = published.gpu_images_case("1.3B", 256), 0.32
        row.update(clock_mhz=1980, memory_clock_mhz=3201, throttled=["power cap"], joules=0.25, graph_seconds=5e-6)
    return content


def test_a_run_keeps_rows_rates_and_what_must_be_shown(session):
    assert session.minutes == 9 and not session.complete()  # there is no GPU
    content = session.keep()
    kept = results.load(session.path(False))
    assert kept["gpu"] and {"gpu copy", "gpu matmul"} <= kept["rates"].keys() and session.path(False).exists()
    who = published.named("tiny")
    for name in who:
        row = results.find(kept["rows"], published.WHOLE, published.whole_case(4096), name)
        assert row.seconds > 0 and row.error <= row.error_bound and row.tokens_s == pytest.approx(4096 / row.seconds)
    assert published.names(kept["rows"]) == who
    shares = [c for c in content["claims"] if c["what"].startswith("causal_conv1d forward, share")]
    assert {c["what"].split(": ")[1] for c in shares} == {"cuda", "triton"} and not any(c["passed"] for c in shares)
    row = results.find(kept["rows"], "gated_norm forward", "gate before", OURS)
    assert row.gb_s > 0 and row.gflop_s is None and row.floor == "copy" and row.rounds == row.rounds_taken >= 3
    assert row.first_call > 0 and row.times_ours == 1.0 and row.spread is not None


def test_a_gpus_run_fills_its_part_of_the_readme_alone(as_on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(results.latest, "__defaults__", (tmp_path / "results", False))
    readme, path = tmp_path / "README.md", tmp_path / "gpu.json"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    about = {"device": "A processor", "threads": 2, "instruction_set": "", "versions": {}, "commit": "abc"}
    cpu = {"started": "2026-01-01", "seconds": 60.0, "complete": True, "quick": False, "machine": about, "rates": {}}
    results.save(tmp_path / "results" / "a" / "a.json", cpu | {"claims": [], "rows": [], "exponents": [], "demo": {}})
    results.save(path, as_on_a_gpu)
    assert report.main(["--readme", str(readme), "--results", str(path)]) == 0
    other, text = readme.read_text().split("<!-- gpu:begin -->")
    assert "A processor" in other and "H200" not in other and "A processor" not in text
    for words in (
        "What must be shown on an H200", "119.2x", "63.0% less | 33.3% less", "55.6% less", "9.00 GB",
        "Images a second, 16 at once, 1.3B: 50 here",
        "| 4K ", "16.5 s, 8.50 GB", "GB/s copied on the GPU", "1980 and 3201 MHz, power cap", "as a graph", "joules",
        "| cuda, forward ", "attention, flash, forward", "of bf16 matmul",
    ):  # fmt: skip
        assert words in text, words
    page = path.with_suffix(".md").read_text()
    assert "Roofline" in page and "Time against length" in page and path.with_suffix(".html").exists()
    assert "No whole run on a GPU" in report.gpu(None)


def test_the_latest_run_is_of_its_kind(tmp_path):
    for name, started, gpu in (("a", "2026-01-01", False), ("b", "2026-01-03", True), ("c", "2026-01-02", False)):
        content = {"started": started, "complete": True, "quick": False, "gpu": gpu}
        results.save(tmp_path / "device" / f"{name}.json", content)
    assert results.latest(tmp_path).stem == "c" and results.latest(tmp_path, gpu=True).stem == "b"


def test_what_is_collected_belongs_to_the_device():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*command, "--device", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = [line.split("[")[1][:-1] for line in listed.splitlines() if line.startswith("bench/bench_gpu.py::")]
    assert tuple(cases) == gpu_run.ORDER and set(cases) == set(OPERATIONS)
    assert not [line for line in listed.splitlines() if "::" in line and "bench_gpu.py" not in line]


def test_time_is_dealt_out_by_weight_and_what_is_left(monkeypatch):
    given = []
    nothing = {"rates": {}, "rows": []}
    part = gpu_check.Part("benchmark", "ok")
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda op, out, seconds: (given.append(seconds) or part, nothing))
    run = gpu_run.GpuRun(SimpleNamespace(rates=SimpleNamespace(history={}), rows=[]), 0.0)
    run.until = time.monotonic() + 110.0
    for op in gpu_run.ORDER:
        run.measure(op)
    assert sum(gpu_run.HEAVY.get(op, 1.0) for op in gpu_run.ORDER) == 12
    assert given[0] == pytest.approx(110 * 2 / 12, rel=0.05) and given[-1] == pytest.approx(110, rel=0.05)


def test_a_part_that_failed_or_had_no_time_makes_a_partial_run_and_leaves_its_last_words(monkeypatch):
    def ended(status: str, rows: list[dict]) -> gpu_run.GpuRun:
        def run_benchmark(op: str, out: Path, seconds: float) -> tuple:
            (out / f"bench-{op}.log").write_text("".join(f"line {i}\n" for i in range(99)) + "illegal address\n")
            return gpu_check.Part(op, status, detail="0 timed of 1"), {"rates": {}, "rows": rows}

        monkeypatch.setattr(gpu_check, "run_benchmark", run_benchmark)
        run = gpu_run.GpuRun(SimpleNamespace(rates=SimpleNamespace(history={}), rows=[]), 60.0)
        run.measure("models")
        return run

    row = {"group": "g", "case": "c", "who": "cuda", "limit": "memory"}
    assert ended("ok", [row | {"seconds": 1.0}, row | {"reason": "ModuleNotFoundError: fla"}]).whole()
    assert not ended("ok", [row | {"reason": gpu_ops.NO_TIME}]).whole()
    for status in ("failed", "out of time"):
        run = ended(status, [])
        assert not run.whole()
        lines = run.parts[0].detail.splitlines()
        assert lines[0] == "0 timed of 1" and lines[-1] == "illegal address" and len(lines) == 1 + gpu_run.TAIL
    assert ended("ok", []).parts[0].detail == "0 timed of 1"


def test_a_whole_session_needs_whole_parts(tmp_path, monkeypatch):
    options = {"--quick": False, "--device": "gpu", "--results": str(tmp_path), "--minutes": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conftest.machine, "describe", lambda gpu: {"device": "a GPU", "commit": "abc"})
    session = conftest.Session(SimpleNamespace(getoption=options.get))
    session.collected, session.total, session.done = conftest.files(gpu=True), 1, 1
    assert session.complete()
    session.on_gpu.parts.append(gpu_check.Part("benchmark, models", "out of time", detail="why"))
    assert not session.complete() and session.content()["parts"][0]["detail"] == "why"


def test_steps_are_weighed_and_replayed_where_a_fast_generation_does(monkeypatch):
    clock, replayed = Clock(CPU, 0.0), []
    times = {"a": 2.0, "b": 0.5}
    monkeypatch.setattr(clock, "median", lambda call: times[call()])
    monkeypatch.setattr(clock, "_captured", lambda call: (replayed.append(call()), call)[1])
    parts = [(10.0, lambda: "a"), (30.0, lambda: "b")]
    assert gpu_ops.times(clock, Steps(parts, replayed=True)) == [35.0] and not replayed
    clock.cuda = True
    assert gpu_ops.times(clock, Steps(parts)) == [35.0] and not replayed
    assert gpu_ops.times(clock, Steps(parts, replayed=True)) == [35.0] and replayed == ["a", "b"]


def test_each_contender_has_its_own_floor():
    needed = {"theirs": (8e9, 0.0), "again": (1e9, 9e12)}
    problem = Problem("g", "c", 1e9, 1e12, {}, None, 1.0, needs=needed)
    rates = {"copy": 1e9, "matmul": 1e12}
    found = {who: gpu_ops.floor(problem, who, rates) for who in ("ours", *needed)}
    assert [found[who]["floor"] for who in found] == [1.0, 8.0, 9.0]
    assert [found[who]["limit"] for who in found] == ["memory", "memory", "matrix units"]


def test_a_transformer_needs_its_cache_or_the_whole_sequence_again():
    gpu = SimpleNamespace(type="cuda")
    short, long = (models.needs(gpu, context) for context in (4096, 131072))
    assert short[models.OURS] == long[models.OURS] and 2.6e9 < short[models.OURS][0] < 2.9e9
    cache = 2 * 24 * 2048 * 2
    assert long[models.CACHED][0] - short[models.CACHED][0] == pytest.approx(cache * (131072 - 4096))
    assert 0.5 < short[models.INT8][0] / short[models.OURS][0] < 0.55  # states stay fp32
    assert short[models.UNCACHED][1] > 2 * 1.2e9 * 4096
    moved, flops = generation._summed(gpu, models.CACHED, positions(4096))
    assert moved == pytest.approx(4096 * models.needs(gpu, 2048)[models.CACHED][0], rel=1e-3) and flops > 0


def test_a_gpu_is_asked_at_the_lengths_of_the_paper_and_of_the_issue():
    assert tuple(published.FIGURE_1) == (4096, 8192, 16384, 32768, 65536, 102400, 131072)
    (whole,) = (problem for problem in generation.problems(CPU) if problem.group == published.WHOLE)
    assert whole.contenders.keys() == set(published.named("tiny"))
    assert (models.LENGTHS[0], models.LENGTHS[-1]) == (512, 2**20)


def test_clocks_are_read_while_the_calls_run():
    clock, row, looks = Clock(CPU, 0.0), {}, []

    def state() -> dict:
        looks.append(1)
        idle = len(looks) == 1
        return {
            "clock_mhz": 300 if idle else 1980,
            "memory_clock_mhz": 3201,
            "throttled": ["idle"] if idle else ["power cap"],
        }

    clock.board = SimpleNamespace(state=state)
    with clock.watched(row):
        while len(looks) < 4:
            time.sleep(0.005)
    assert row == {"clock_mhz": 1980, "memory_clock_mhz": 3201, "throttled": ["power cap"]}
    seen = len(looks)
    time.sleep(0.06)
    assert len(looks) == seen  # nobody looks any more


def test_what_takes_long_is_timed_once(monkeypatch):
    clock = Clock(CPU, 0.0)
    for taken, times in ((3.0, 1), (0.5, 3)):
        monkeypatch.setattr(clock, "_once", lambda call, taken=taken: taken)
        assert clock.times(lambda: None) == [taken] * times


@pytest.mark.parametrize("op", ["causal_conv1d", "gated_norm", "state_update", "lora_linear", "ssd_scan"])
def test_torch_is_a_peer_eager_and_compiled(op, monkeypatch):
    """The compiler itself is tried where the CPU's benchmarks run."""
    compiled = []
    stand_in = lambda function: (compiled.append(function), function)[1]  # noqa: E731
    monkeypatch.setattr(plain, "compiled", stand_in)
    for module in (common, scan):
        monkeypatch.setattr(module, "compiles", lambda device: True)
    monkeypatch.setattr(scan, "compiled", stand_in)
    clock, timed = Clock(CPU, 0.0), set()
    for problem in OPERATIONS[op](CPU):
        rows = gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf"))
        timed |= {row["who"] for row in rows if "seconds" in row}
    assert compiled and any(who.startswith(plain.COMPILED) for who in timed)
    assert op == "ssd_scan" or any(who.split(",")[0] == plain.EAGER for who in timed)


@pytest.mark.parametrize("op", [op for op in gpu_run.ORDER if op != "generation"])
def test_energy_is_read_of_one_case_at_least(op):
    assert any(problem.energy for problem in OPERATIONS[op](CPU))


def test_peft_is_a_peer_of_one_adapter(monkeypatch):
    pytest.importorskip("peft")
    rows = []
    for problem in lora._one_adapter(CPU):
        rows += gpu_ops.measure(problem, Clock(CPU, 0.0), {"copy": 1e9, "matmul": 1e9}, float("inf"))
    timed = {(row["group"], row["who"].split()[0]) for row in rows if "seconds" in row}
    assert {("lora_linear", "PEFT"), ("lora_linear backward", "PEFT"), ("lora_linear", OURS)} <= timed, rows


def test_pages_and_tables_know_no_gpu_of_a_cpu():
    row = Row("op", "case", "native", 1.0, gb_s=2.0, gflop_s=3.0, floor="sgemm")
    assert tables.rate_of(row) == "3 GFLOP/s" and tables.rate_of(row, gpu=True) == "2 GB/s, 0.003 TFLOP/s"
    assert pages.TITLES and not tables.on_gpu({"rows": []})


def test_ratios_are_to_one_of_ours_alone():
    def broken():
        raise RuntimeError("no such kernel")

    call = lambda: lambda: 0.0  # noqa: E731
    problem = common.Problem("g", "c", 1e3, 0.0, {"triton": broken, "torch": call, "reference": call}, float, 1.0)
    rows = gpu_ops.measure(problem, Clock(CPU, 0.0), {"copy": 1e9, "matmul": 1e9}, float("inf"))
    assert "seconds" not in rows[0] and rows[1]["seconds"] > 0 and "times_ours" not in rows[1]
    assert rows[2]["times_ours"] == 1.0
