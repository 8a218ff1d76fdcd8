"""Whole models in the GPU check, the board's words and CUDA graphs, as far as a machine without a GPU can run them."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import capturing
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import gpu_board, gpu_check, gpu_claims, gpu_clock, gpu_ops, measure, peers  # noqa: E402
from bench.baselines.attention import Attention  # noqa: E402
from bench.gpu_clock import Clock  # noqa: E402
from bench.gpu_problems import Problem, generation, models, prefill  # noqa: E402
from bench.gpu_problems.common import Parts  # noqa: E402
from bench.gpu_run import as_row  # noqa: E402
from bench.tables import of_the_chip  # noqa: E402
from omnimamba_kernels import backends  # noqa: E402

CPU = torch.device("cpu")
OURS = "native" if backends()["native"] is None else "reference"


@pytest.fixture(scope="module")
def problems() -> list:
    return list(models.problems(CPU))


def test_models_pass_their_checks_or_say_why_they_cannot_run(problems):
    clock, timed = Clock(CPU, 0.0), set()
    for problem in problems:
        for row in gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf")):
            assert "seconds" in row or row["who"] == "attention, cuDNN", row
            timed |= {(row["group"], row["who"])} if "seconds" in row else set()
    assert {problem.group for problem in problems if problem.graph} == {models.DECODE}
    assert [problem.group for problem in problems if problem.energy] == [models.DECODE]
    wanted = {(group, OURS) for group in gpu_claims.MODELS if group != prefill.PREFILL} | {
        ("layer forward", "attention, flash")
    }
    assert wanted | {("decode", who) for who in (models.INT8, models.CACHED, models.UNCACHED)} <= timed


def test_a_wrong_model_fails_its_check(problems):
    decode, images, forward, training = problems
    for problem, found in ((decode, torch.zeros(1, 128)), (forward, torch.zeros(1, 256, 64))):
        assert not problem.error(found) <= problem.bound
    flash = "attention, flash"
    y = forward.contenders[flash]()()
    assert forward.errors[flash](y) <= forward.bound
    for at in (0, -1):
        wrong = y.clone()
        wrong[:, at] = 0
        assert forward.errors[flash](wrong) > forward.bound
    right = next(iter(training.contenders.values()))()()
    assert training.error(right) <= training.bound and len(right) == 9
    for i, part in enumerate(right):
        wrong = (*right[:i], torch.zeros_like(part), *right[i + 1 :])
        assert (training.error(wrong) <= training.bound) == (part.ndim == 1)
    assert not images.error(torch.zeros(16, 8)) <= images.bound


THEIRS = pytest.mark.skipif(isinstance(peers.mamba2(), str), reason="transformers 5.23 is not installed")


def test_a_prompt_is_taken_in_by_every_model_on_the_same_weights(problems):
    """transformers' is one of them, in decoding too, or says that it is not installed; one whose weights are others
    fails its check."""
    clock, timed, missing = Clock(CPU, 0.0), set(), isinstance(peers.mamba2(), str)
    for problem in [*prefill.problems(CPU), problems[0]]:
        rows = gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf"))
        timed |= {(row["group"], row["who"]) for row in rows if "seconds" in row}
        for row in rows:
            if missing and row["who"] == peers.label():
                assert peers.mamba2() in row["reason"]
            else:
                assert row["floor"] > 0 and row["tokens_s"] > 0, row
    wanted = (OURS,) if missing else (OURS, peers.label())
    assert {(group, who) for group in (prefill.PREFILL, models.DECODE) for who in wanted} <= timed
    assert (prefill.PREFILL, prefill.TRANSFORMER) in timed


@pytest.mark.parametrize(
    "who", [OURS, pytest.param(peers.label(), marks=THEIRS), models.CACHED, models.UNCACHED, models.INT8]
)
def test_a_step_that_is_wrong_where_it_is_timed_fails(problems, who, monkeypatch):
    """Ours forgets its prompt, transformers' too; a Transformer its first key or token."""
    decode, error = problems[0], problems[0].errors.get(who, problems[0].error)
    assert error(decode.contenders[who]()()) <= decode.bound
    whole = torch.nn.functional.scaled_dot_product_attention
    if who in (models.CACHED, models.UNCACHED):
        fewer = lambda q, k, v, **more: whole(q, k[:, :, 1:], v[:, :, 1:], **more)  # noqa: E731
        if who == models.UNCACHED:
            fewer = lambda q, k, v, **more: whole(q, torch.roll(k, 1, 2), v, **more)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fewer)
    else:
        monkeypatch.setattr(models, "PROMPT", 1)
    wrong = decode.contenders[who]()()
    monkeypatch.undo()
    assert error(wrong) > decode.bound


def test_the_numbers_of_int8_weights_are_the_ones_that_are_checked():
    ids = models.prompt(CPU, 5)
    whole, narrow = (models.exact_logits(CPU, ids, int8=int8) for int8 in (False, True))
    assert 1e-4 < measure.relative_error(narrow, whole) < 0.2
    rounded = models.exact_logits(CPU, ids, rounded=True)
    assert torch.equal(rounded, whole)  # on a CPU all are fp32


def test_a_model_that_is_cast_as_a_whole_is_held_against_rounded_vectors(problems, monkeypatch):
    """mamba_ssm's and transformers', in each group that has them; ours keeps its vectors as they are."""
    logits = {rounded: torch.full((1, 128), 1.0 + rounded) for rounded in (False, True)}
    monkeypatch.setattr(models, "exact_logits", lambda *_, rounded=False: logits[rounded])
    monkeypatch.setattr(models, "exact_step", lambda *_, rounded=False: logits[rounded])
    for problem in (problems[0], next(iter(prefill.problems(CPU))), next(iter(generation.problems(CPU)))):
        assert problem.error(logits[False]) == 0.0
        for who in {models.MAMBA_SSM, peers.label()} & {models.MAMBA_SSM, *problem.errors}:
            assert problem.errors[who](logits[True]) == 0.0


def test_the_definition_of_a_step_is_computed_once_for_all_contexts(monkeypatch):
    lengths = []
    monkeypatch.setattr(models, "exact_logits", lambda _, ids, *kind: lengths.append(ids.shape[1]) or torch.empty(0))
    nowhere = torch.device("meta")
    for kind in ({}, {"int8": True}, {"rounded": True}) * 2:
        models.exact_step(nowhere, **kind)
    assert lengths == [models.PROMPT + 1] * 3
    monkeypatch.setattr(models, "PROMPT", 1)
    models.exact_step(nowhere)
    assert lengths[3:] == [2]


def test_attentions_check_makes_its_mask_where_its_input_is():
    with torch.device("meta"):
        layer, u = Attention(64), torch.empty(1, 8, 64)
    assert layer.plain(u).is_meta


def rows(step: float, long: float, draw: float, held: float, replayed: float | None = None) -> list[dict]:
    times = dict(zip(models.CONTEXTS, (step, step, long), strict=True))
    found = [
        {"group": models.DECODE, "case": f"1.3B, {models.context_case(n)}", "who": "cuda", "seconds": t,
         "first_call": 9.0, "peak_bytes": held, "bytes": 3e9, "floor_share": 0.9}
        for n, t in times.items()
    ]  # fmt: skip
    for row in found if replayed else []:
        row["graph_seconds"] = replayed
    return [*found, {"group": models.IMAGES, "case": "1.3B, 16", "who": "cuda", "seconds": draw}]


def test_a_step_is_compared_as_a_graph_where_it_can_be_one(monkeypatch):
    clock = Clock(CPU, 0.0)
    replayed = {"ours": {"graph_seconds": 1e-3}, "peer": {"graph_seconds": 4e-3}, "no graph": {"graph_reason": "why"}}
    contenders = {who: lambda: lambda: 0.0 for who in replayed}
    for graph, ratios in ((True, [1.0, 4.0, 8.0]), (False, [1.0, 1.0, 1.0])):
        found = iter(replayed.values())
        monkeypatch.setattr(clock, "times", lambda call: [8e-3])
        monkeypatch.setattr(clock, "more", lambda call, taken, graph, energy, found=found: next(found))
        problem = Problem("g", "c", 1e6, 0.0, contenders, lambda y: y, 1.0, graph=graph, tokens=1, ours=("ours",))
        rows = gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf"))
        assert [row["times_ours"] for row in rows] == ratios and [row["seconds"] for row in rows] == [8e-3] * 3
        assert rows[0]["tokens_s"] == pytest.approx(1000.0 if graph else 125.0)
        assert rows[0]["floor_share"] == pytest.approx(1.0 if graph else 0.125)
    assert as_row(rows[2]).note == "no graph: why" and as_row(rows[0]).note == ""


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (rows(0.8e-3, 0.82e-3, 0.3, 3.5e9), [True, True, True, True]),
        (rows(0.8e-3, 0.95e-3, 0.5, 5.0e9), [False, False, False, False]),
        (rows(0.8e-3, 0.82e-3, 0.3, 3.5e9)[1:], [None, None, True, None]),
        (rows(5e-3, 9e-3, 0.3, 3.5e9, 0.8e-3), [True, True, True, True]),  # eager's time is that of the launches
        ([], [None] * 4),
    ],
)
def test_the_claims_of_models(found, met):
    claims = gpu_claims.judge(found, "cuda")
    assert [c["met"] for c in claims if c["what"].startswith("1.3B")] == met
    (first,) = [c for c in claims if c["what"].startswith("first call")]
    assert first["met"] is None  # it is of the operations


class Driver:
    """nvidia-ml-py as far as it is used; energy grows by 2 J at every look."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    millijoules = 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += 2000
        return self.millijoules


def test_the_board_tells_clocks_what_holds_them_back_and_energy(monkeypatch):
    monkeypatch.setattr(gpu_clock, "ENERGY_FOR", 0.1)
    clock = Clock(CPU, 0.0)
    clock.board = gpu_board.Board(Driver(), None)
    calls, row = [], {}
    with clock.watched(row):
        pass
    assert row == {"clock_mhz": 1980, "memory_clock_mhz": 3201, "throttled": ["power cap", "thermal, hardware"]}
    start = time.perf_counter()  # a call is over much sooner than was thought
    found = clock.more(lambda: calls.append(1), 0.1, energy=True)
    assert time.perf_counter() - start >= 0.1 and found == {"joules": pytest.approx(2.0 / len(calls))}
    assert clock.more(lambda: None, 0.1) == clock.more(lambda: None, 3.0, energy=True) == {}
    shown = gpu_check.rows([{"group": "g", "case": "c", "who": "cuda", "seconds": 1.0, "times_ours": 1.0, **row,
                             "floor_share": 0.5, "limit": "memory", "joules": 0.25,
                             "graph_seconds": 5e-6}])  # fmt: skip
    assert "5 us" in shown[0] and "1980 MHz, power cap, thermal, hardware" in shown[0] and "0.25" in shown[0]


def test_what_the_driver_does_not_tell_costs_no_time():
    def refused(*_):
        raise RuntimeError("NVMLError_NotSupported")

    driver, clock = Driver(), Clock(CPU, 0.0)
    driver.nvmlDeviceGetTotalEnergyConsumption = driver.nvmlDeviceGetCurrentClocksThrottleReasons = refused
    clock.board = gpu_board.Board(driver, None)
    problem = Problem("g", "c", 1e6, 0.0, {"torch": lambda: lambda: 0.0}, float, 1.0)
    problem.energy = True
    (row,) = gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf"))
    assert row["seconds"] > 0 and row["clock_mhz"] == 1980 and not {"throttled", "joules", "reason"} & row.keys()
    driver.nvmlDeviceGetClockInfo = refused
    (row,) = gpu_ops.measure(problem, clock, {"copy": 1e9, "matmul": 1e9}, float("inf"))
    assert row["seconds"] > 0 and "clock_mhz" not in row
    assert gpu_check.rows([row])[0][-2:] == ["", ""] and of_the_chip(as_row(row))[2:] == ["", ""]


def test_a_short_call_is_also_timed_as_a_graph_or_says_why_not(monkeypatch):
    clock = Clock(CPU, 0.0)
    clock.cuda = True
    monkeypatch.setattr(clock, "median", lambda call: call())
    monkeypatch.setattr(clock, "_captured", lambda call: lambda: 5e-6)
    assert clock.more(lambda: None, 1e-4) == {"graph_seconds": 5e-6}
    assert clock.more(lambda: None, 1e-2) == {}
    assert clock.more(lambda: None, 1e-2, graph=True) == {"graph_seconds": 5e-6}

    with monkeypatch.context() as patch:
        patch.setattr(gpu_clock, "ENERGY_FOR", 0.01)
        clock.wait, clock.board = lambda: None, gpu_board.Board(Driver(), None)
        launched, replayed = [], []
        patch.setattr(clock, "_captured", lambda call: lambda: replayed.append(1) or 5e-6)
        found = clock.more(lambda: launched.append(1), 1e-4, energy=True)
        assert found == {"graph_seconds": 5e-6, "joules": pytest.approx(2.0 / (len(replayed) - 1))} and not launched
        clock.board = None

    def refused(call):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(clock, "_captured", refused)
    assert clock.more(lambda: None, 1e-4) == {"graph_reason": "operation not permitted"}


def test_a_machine_without_the_driver_has_no_board(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(gpu_board, "import_module", missing)
    assert gpu_board.find(CPU) is None
    there = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid)
    monkeypatch.setattr(gpu_board, "import_module", lambda name: there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-c"))
    assert gpu_board.find(CPU).handle == "GPU-ab-c"


def test_a_graph_that_fails_leaves_the_stream_and_the_generator_as_they_were(monkeypatch):
    clock = Clock(CPU, 0.0)
    clock.stream = "its own"
    graph = SimpleNamespace(replay="replay")
    now = capturing.stand_in(monkeypatch, "here", CUDAGraph=lambda: graph, Stream=lambda: "another")

    def implicit():
        if now.stream == "its own":
            raise RuntimeError("operation would make the legacy stream depend on a capturing stream")

    assert clock._captured(lambda: None) == "replay" and now.captured == ["its own"]
    with pytest.raises(RuntimeError, match="previous error during capture"):
        clock._captured(implicit)
    assert now.stream == "here" and now.draws


def test_an_operation_is_on_one_stream_and_a_problem_that_cannot_be_made_is_told(monkeypatch, tmp_path):
    inside, seen = [], []

    @contextlib.contextmanager
    def beside(clock):
        inside.append(clock)
        yield
        inside.clear()

    def make():
        seen.append(len(inside))
        return lambda: seen.append(len(inside)) or 0.0

    def problems(device):
        seen.append(len(inside))
        yield Problem("g", "c", 1e3, 0.0, {"reference": make}, float, 1.0)
        raise RuntimeError("Offset increment outside graph capture")

    monkeypatch.setattr(Clock, "beside", beside)
    monkeypatch.setitem(gpu_ops.OPERATIONS, "gated_norm", problems)
    monkeypatch.setattr(gpu_check, "child", lambda arguments, *_, **__: gpu_ops.main(arguments[2:]))
    part, found = gpu_check.run_benchmark("gated_norm", tmp_path, 60.0)
    assert set(seen) == {1} and [row["who"] for row in found["rows"] if "seconds" in row] == ["reference"]
    assert part.status == "failed"
    assert part.failures == ["a problem was lost: RuntimeError: Offset increment outside graph capture"]


def test_a_part_that_fails_leaves_the_parts_after_it(tmp_path, monkeypatch):
    def made(name):
        return Problem("g", name, 1e3, 0.0, {"reference": lambda: float}, float, 1.0)

    def several():
        yield made("first")
        raise MemoryError("the second does not fit")

    def none():
        raise ValueError("no such size")

    monkeypatch.setitem(gpu_ops.OPERATIONS, "gated_norm", lambda _: Parts([several, none, lambda: made("last")]))
    monkeypatch.setattr(gpu_check, "child", lambda arguments, *_, **__: gpu_ops.main(arguments[2:]))
    part, found = gpu_check.run_benchmark("gated_norm", tmp_path, 60.0)
    assert [row["case"] for row in found["rows"] if "seconds" in row] == ["first", "last"]
    assert part.status == "failed" and len(part.failures) == 2
    assert "the second does not fit" in part.failures[0] and "no such size" in part.failures[1]
