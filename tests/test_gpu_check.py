"""The GPU check and the tuning script, as far as a machine without a GPU can run them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import gpu_check, gpu_claims, gpu_ops, tune  # noqa: E402
from bench.gpu_clock import Clock  # noqa: E402
from bench.gpu_problems import OPERATIONS, Problem  # noqa: E402
from omnimamba_kernels import backends, triton_launch  # noqa: E402
from omnimamba_kernels.backends import OPS  # noqa: E402
from omnimamba_kernels.gated_norm import cases as norm_cases  # noqa: E402
from omnimamba_kernels.lora_linear import cases as lora_cases  # noqa: E402
from omnimamba_kernels.report.calls import calls  # noqa: E402
from omnimamba_kernels.ssd_scan import cases as scan_cases  # noqa: E402
from omnimamba_kernels.state_update import cases as update_cases  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
RATES = {"copy": 1e9, "matmul": 1e9}
GROUPS = {
    "ssd_scan": {"ssd_scan forward", "ssd_scan backward"},
    "gated_norm": {"gated_norm forward", "gated_norm backward"},
    "causal_conv1d": {"causal_conv1d forward", "causal_conv1d backward", "causal_conv1d update"},
    "state_update": {"state_update"},
    "lora_linear": {"lora_linear", "lora_linear backward", "lora_linear int8"},
    "mamba_mixer": {"mamba_mixer sequence", "mamba_mixer sequence backward", "mamba_mixer step"},
}


@no_gpu
@pytest.mark.skipif(backends()["native"] is not None, reason="no native kernels")
def test_every_part_runs_or_says_why_not(tmp_path, capsys):
    only = "tests/kernels/test_gated_norm.py::test_matches_the_definition"
    content = gpu_check.check(tmp_path, 300, only, ops=("gated_norm",))
    parts = {part["name"]: part for part in content["parts"]}
    assert parts["tests, triton"]["status"] == parts["tests, cuda"]["status"] == "skipped"
    assert parts["tests, native"]["status"] == "ok" and " 0 failed" in parts["tests, native"]["detail"]
    assert parts["benchmark, gated_norm"]["status"] == "ok"
    timed = {row["who"] for row in content["rows"] if "seconds" in row}
    assert {"native", "reference"} <= timed
    assert all("seconds" in row or row["reason"] for row in content["rows"])
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == content["parts"]
    report = (tmp_path / "report.md").read_text()
    assert "need a GPU" in report and "| gated_norm forward" in report
    assert set(gpu_check.ORDER) == set(OPS)


@pytest.mark.skipif(backends()["native"] is not None, reason="no native kernels")
@pytest.mark.parametrize("op", OPS)
def test_every_problem_has_a_check_that_ours_and_the_peers_at_hand_pass(op):
    """As a GPU has them, but small: one that needs a package which is not there may not run, nobody may be wrong."""
    groups, clock = set(), Clock(torch.device("cpu"), 0.0)
    for problem in OPERATIONS[op](torch.device("cpu")):
        groups.add(problem.group)
        rows = {row["who"]: row for row in gpu_ops.measure(problem, clock, RATES, float("inf"))}
        assert {"native", "reference"} <= {who for who, row in rows.items() if "seconds" in row}, rows
        assert all("ModuleNotFoundError" in row["reason"] for row in rows.values() if "seconds" not in row), rows
        assert all("seconds" in row for who, row in rows.items() if who.startswith("torch")), rows
    assert groups == GROUPS[op]


def test_a_claim_is_judged_on_what_was_measured_and_says_what_was_not():
    case, base = gpu_claims.LORA, {"floor_share": 0.9, "first_call": 1.0}
    rows = [
        {"group": "ssd_scan forward", "case": "8 x 2048, 64 heads", "who": "triton", "seconds": 1.0, **base},
        {"group": "ssd_scan forward", "case": "8 x 2048, 64 heads", "who": "mamba_ssm", "seconds": 3.0},
        {"group": "causal_conv1d forward", "case": "a", "who": "triton", "seconds": 1.0, **base},
        {"group": "causal_conv1d forward", "case": "b", "who": "triton", "seconds": 1.0, "floor_share": 0.8},
        {"group": "lora_linear", "case": case, "who": "triton", "seconds": 1.05, **base, "first_call": 3.5},
        {"group": "lora_linear", "case": case, "who": gpu_claims.BASE, "seconds": 1.0},
    ]
    found = {claim["what"]: claim for claim in gpu_claims.judge(rows, "triton")}
    forward = found["ssd_scan forward 8 x 2048, 64 heads, against mamba_ssm"]
    assert (forward["measured"], forward["met"]) == ("3.00x", False)
    assert found["causal_conv1d forward, share of the copy speed"]["measured"] == "0.80"
    assert found["causal_conv1d forward in all cases, against causal_conv1d"]["measured"] == "no time of causal_conv1d"
    assert found["causal_conv1d backward, share of the copy speed"]["met"] is None
    assert [c["met"] for what, c in found.items() if what.startswith("lora_linear")] == [True]
    assert found["first call with a cold cache, the slowest"]["met"] is False
    assert all(claim["met"] is None for claim in gpu_claims.judge(rows, "cuda"))


def test_each_back_end_is_held_to_its_own_numbers():
    """The CUDA kernels to more than Triton's, and to shapes that Triton's are not asked for."""
    step = {"bytes": 3e9, "floor_share": 0.76, "peak_bytes": 1.0}
    times = [
        ("ssd_scan forward", "8 x 2048, 64 heads", "mamba_ssm", {"seconds": 4.5}),
        ("ssd_scan forward", "8 x 2048, 64 heads", "", {}),
        ("ssd_scan forward", "32 x 2048, 64 heads", "mamba_ssm", {"seconds": 9.5}),
        ("ssd_scan forward", "32 x 2048, 64 heads", "", {"floor_share": 0.5}),
        ("ssd_scan forward", "8 x 4096, 64 heads", "", {"floor_share": 0.61}),
        ("gated_norm forward", "1.3B, 64 rows", "", {"floor_share": 0.1}),
        ("gated_norm forward", "1.3B, 8 x 2048", "", {"floor_share": 0.87}),
        ("lora_linear", gpu_claims.LORA, "", {"seconds": 1.06}),
        ("lora_linear", gpu_claims.LORA, gpu_claims.BASE, {}),
        ("lora_linear", gpu_claims.LORA_STEP, "", {"seconds": 1.04}),
        ("lora_linear", gpu_claims.LORA_STEP, gpu_claims.BASE, {}),
        ("decode", "1.3B, 4096 tokens of context", "", step),
    ]

    def judged(name):
        rows = [
            {"group": group, "case": case, "who": who or name, "seconds": 1.0, "floor_share": 0.9} | more
            for group, case, who, more in times
        ]
        return {c["what"]: (c["required"], c["met"]) for c in gpu_claims.judge(rows, name) if c["met"] is not None}

    product = "2048 to 8512, two tasks mixed, over the bare product"
    asked = {
        "ssd_scan forward 8 x 2048, 64 heads, against mamba_ssm": ("4x", True),
        "gated_norm forward 1.3B, 8 x 2048, share of the copy speed": ("0.85", True),
        f"lora_linear, 8192 tokens, {product}": ("at most 1.08x", True),
    }
    assert judged("triton") == asked
    assert judged("cuda") == {
        "ssd_scan forward 8 x 2048, 64 heads, against mamba_ssm": ("5x", False),
        "ssd_scan forward 32 x 2048, 64 heads, against mamba_ssm": ("9x", True),
        "ssd_scan forward 8 x 4096, 64 heads, share of the floor": ("0.6", True),
        "gated_norm forward 1.3B, 8 x 2048, share of the copy speed": ("0.88", False),
        f"lora_linear, 8192 tokens, {product}": ("at most 1.05x", False),
        f"lora_linear, one token, {product}": ("at most 1.05x", True),
        "decode of the 1.3B shape, batch 1, weights' bytes at the copy speed over the time": ("0.75", False),
    }


def test_the_worst_case_counts_and_one_without_a_time_does_not():
    times = {("triton", "a"): 1.0, ("triton", "b"): 1.0, ("causal_conv1d", "a"): 2.0, ("causal_conv1d", "b"): 0.5}
    rows = [
        {"group": "causal_conv1d forward", "case": case, "who": who, "seconds": seconds, "floor_share": 0.9}
        for (who, case), seconds in times.items()
    ]
    rows += [{"group": "causal_conv1d forward", "case": "c", "who": who, "reason": "x"} for who in ("triton", "peer")]
    found = {claim["what"]: claim for claim in gpu_claims.judge(rows, "triton")}
    claim = found["causal_conv1d forward in all cases, against causal_conv1d"]
    assert (claim["measured"], claim["met"]) == ("0.50x", False)
    assert found["causal_conv1d forward, share of the copy speed"]["met"] is True


def test_claims_name_cases_that_a_gpu_is_measured_at():
    names = {case.name for case in scan_cases.GPU}
    assert names.issuperset([*gpu_claims.LEAST["triton"].scan, *gpu_claims.LEAST["cuda"].scan, gpu_claims.FLOOR])
    assert f"{update_cases.GPU[2].name}, state float32" == gpu_claims.STEP
    assert [str(lora_cases.GPU[0]), str(lora_cases.GPU[3])] == [gpu_claims.LORA_STEP, gpu_claims.LORA]
    assert gpu_claims.NORM in {case.name for case in norm_cases.GPU}


def test_failures_and_lost_time_are_told(tmp_path):
    report = tmp_path / "t.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        '</testcase><testcase classname="a" name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu_check.read_tests(report) == ({"passed": 1, "failed": 1, "skipped": 1}, ["a::bad"])
    log = tmp_path / "log"
    assert gpu_check.child(["-c", "import time; time.sleep(60)"], 1.0, log) is None
    assert gpu_check.child(["-c", "print('words'); raise SystemExit(3)"], 60, log) == 3 and log.read_text() == "words\n"


def test_what_a_child_started_ends_with_it(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    started = f"import subprocess; subprocess.run(['sh', '-c', 'exec > {fifo}; echo here; exec sleep 20'])"
    try:
        assert gpu_check.child(["-c", started], 3.0, tmp_path / "log") is None
        assert os.read(reader, 99) == b"here\n"
        until = time.monotonic() + 5
        while True:
            try:
                assert os.read(reader, 99) == b""  # nobody holds the other end any more
                break
            except BlockingIOError:
                assert time.monotonic() < until, "it lives on"
                time.sleep(0.05)
    finally:
        os.close(reader)


def test_tests_that_ran_out_of_time_are_counted(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import time, pytest\n"
        "def test_reference_a_matches(): pass\n"
        "def test_reference_b_matches(): assert False\n"
        "def test_reference_c_matches(): pytest.skip('no')\n"
        "def test_reference_d_matches(): time.sleep(60)\n"
    )
    part = gpu_check.run_tests("reference", tmp_path, 5.0, str(slow))
    assert part.status == "out of time" and part.detail.startswith("1 passed, 1 failed, 1 skipped; stopped after")
    log = tmp_path / "log"
    log.write_text("bringing up nodes...\n" + "." * 60 + "FsEx [ 41%]\n" + "..X" + "\n\n1 passed. F\n")
    assert gpu_check.so_far(log) == {"passed": 63, "failed": 2, "skipped": 2}


def test_a_gpus_time_is_not_spent_on_what_the_host_shows(tmp_path, monkeypatch):
    commands, surroundings = [], []

    def child(command, *_, **environment):
        commands.append(command)
        surroundings.append(environment)
        return 1

    monkeypatch.setattr(gpu_check, "child", child)
    monkeypatch.setattr(gpu_check, "backends", lambda: {"triton": None})
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        gpu_check.run_tests("triton", tmp_path, 1.0)
    ignored = [[a.removeprefix("--ignore=") for a in c if a.startswith("--ignore=")] for c in commands]
    assert ignored == [list(gpu_check.ON_THE_HOST), []]
    every = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_triton_*.py")}
    assert every - {"tests/kernels/test_triton_addresses.py"} == set(ignored[0])  # of addresses it shows the true ones
    assert surroundings == [gpu_check.NO_EMULATOR, {}]


def test_the_time_of_a_build_is_not_there_for_the_rest(tmp_path, monkeypatch):
    """Of 100 seconds 60 are gone: the tests have half of 40, the two back ends each half of that."""
    given = {}

    def tests(backend, out, seconds, *_):
        given[backend] = seconds
        return gpu_check.Part(f"tests, {backend}", "ok", seconds)

    def benchmark(op, out, seconds):
        given[op] = seconds
        return gpu_check.Part(f"benchmark, {op}", "ok"), {"rates": {}, "rows": []}

    monkeypatch.setattr(gpu_check, "run_tests", tests)
    monkeypatch.setattr(gpu_check, "run_benchmark", benchmark)
    monkeypatch.setattr(gpu_check, "backends", lambda: {"triton": None, "cuda": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.machine, "describe", lambda: {"device": "a GPU", "commit": "c", "backends": {}})
    words = ["--out", str(tmp_path), "--seconds", "100", "--op", "gated_norm", "--started", str(time.time() - 60)]
    assert gpu_check.main(words) == 0
    assert given["triton"] == pytest.approx(10, abs=1) and given["cuda"] == pytest.approx(20, abs=1)
    assert given["gated_norm"] == pytest.approx(40 / 3, abs=1)
    assert re.search(r"\| build +\| ok +\| 60", (tmp_path / "report.md").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert "started=$$(date +%s) && $(PYTHON) setup.py -q build_ext --inplace" in makefile
    assert "bench.gpu_check --out $(OUT) --started $$started" in makefile


def test_one_timed_case_meets_no_claim_of_several():
    times = {(who, case): 1.0 for who in ("triton", "causal_conv1d") for case in sorted(gpu_claims.CONV)}
    rows = [
        {"group": "causal_conv1d forward", "case": case, "who": who, "seconds": seconds, "floor_share": 0.9}
        for (who, case), seconds in times.items()
    ]

    def claim(rows):
        found = {claim["what"]: claim for claim in gpu_claims.judge(rows, "triton")}
        return found["causal_conv1d forward in all cases, against causal_conv1d"]

    assert len(gpu_claims.CONV) == 4 and claim(rows)["met"] is True
    few = claim(rows[:5])  # all of ours, the peer's first
    assert (few["measured"], few["met"]) == ("1.00x, without 3 of 4 cases", None)
    assert claim([*rows[:4], rows[4] | {"seconds": 0.5}])["met"] is False


def test_each_problem_says_which_contenders_are_ours():
    """All that are no package of others, no torch and no Transformer."""
    device = torch.device("cpu")
    found = {who: who in problem.ours for op in ("models", "generation", "gated_norm")
             for problem in OPERATIONS[op](device) for who in problem.contenders}  # fmt: skip
    ours = {"native" if backends()["native"] is None else "reference", "reference", "ours, int8 weights",
            "Mamba-2 tiny"}  # fmt: skip
    assert {who for who, own in found.items() if own} == ours
    assert {"mamba_ssm", "Transformer tiny, KV cache", "attention, flash"} <= found.keys()


def test_a_contender_of_ours_that_breaks_and_anyone_wrong_is_a_fault_and_a_missing_peer_is_none():
    def broken():
        raise ValueError("shape")

    wrong, right = (lambda: lambda: 1.0), (lambda: lambda: 0.0)
    calls = {
        "reference": broken, "mamba_ssm": broken, "a wrong peer": wrong, "torch": right, "Mamba-2 1.3B": broken,
        "ours, int8 weights": wrong,
    }  # fmt: skip
    ours = ("reference", "Mamba-2 1.3B", "ours, int8 weights")
    problem = Problem("g", "c", 1e3, 0.0, calls, error=float, bound=0.5, ours=ours)
    clock = Clock(torch.device("cpu"), 0.01)
    rows = {row["who"]: row for row in gpu_ops.measure(problem, clock, RATES, float("inf"))}
    assert rows["torch"]["seconds"] > 0 and rows["torch"]["floor"] == 1e-6 and rows["torch"]["limit"] == "memory"
    faults = [who for who, row in rows.items() if gpu_check.is_fault(row)]
    assert faults == ["reference", "a wrong peer", "Mamba-2 1.3B", "ours, int8 weights"]
    late = gpu_ops.measure(problem, clock, RATES, 0.0)
    assert all(row["reason"] == gpu_ops.NO_TIME and not gpu_check.is_fault(row) for row in late)


@no_gpu
def test_tuning_without_a_gpu_says_so(capsys):
    before = (tune.KERNELS / "gated_norm" / "launch.json").read_text()
    assert tune.main(["gated_norm"]) == 2 and "needs a GPU" in capsys.readouterr().err
    assert (tune.KERNELS / "gated_norm" / "launch.json").read_text() == before


def test_a_tuned_rule_comes_first_and_replaces_its_like(tmp_path):
    last = {"use": {"BLOCK": 1, "num_warps": 4}}
    rule = {"arch": ["sm_90"], "when": {"d": [8, 8]}, "use": {"BLOCK": 2, "num_warps": 4}}
    better = {**rule, "use": {"BLOCK": 4, "num_warps": 8}}
    table = tune.merged({"kernel": [last]}, [{"kernel": "kernel", "rule": rule}])
    assert table == {"kernel": [rule, last]}
    table = tune.merged(table, [{"kernel": "kernel", "rule": better}])
    assert table == {"kernel": [better, last]}
    tune.save(tmp_path / "launch.json", tune.written(table))
    assert json.loads((tmp_path / "launch.json").read_text()) == table
    assert [path.name for path in tmp_path.iterdir()] == ["launch.json"]


def test_written_tables_are_what_the_files_have():
    for path in triton_launch.Path(triton_launch.__file__).parent.glob("*/launch.json"):
        assert json.loads(tune.written(json.loads(path.read_text()))) == json.loads(path.read_text())


def test_candidates_are_neighbours():
    use = {"BLOCK": 64, "num_warps": 4}
    found = list(tune.candidates(use))
    assert use not in found and {"BLOCK": 128, "num_warps": 4} in found and {"BLOCK": 32, "num_warps": 8} in found
    with tune.trying("op", "kernel", {"BLOCK": 7}, (("d", 3),)) as asked:
        assert triton_launch.settings("op", "kernel", triton_launch.INTERPRETER, d=3) == {"BLOCK": 7}
    assert asked == [(("d", 3),)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_of_a_table_can_be_tuned(op):
    for kernel in triton_launch.table(op):
        with tune.trying(op, kernel, {}) as asked:
            assert any(call.launches(triton_launch.TARGETS["sm_90"]) and asked for call in calls(op)), kernel
