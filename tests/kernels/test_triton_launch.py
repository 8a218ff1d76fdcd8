"""triton_launch: reasons, launch tables, the start of kernels, and what a recording notes."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path
from threading import Barrier, get_ident
from types import SimpleNamespace

import pytest
import torch

from omnimamba_kernels import backends, rmsnorm_fn, triton_launch
from omnimamba_kernels.backends import choose
from omnimamba_kernels.report.calls import calls
from omnimamba_kernels.triton_launch import (
    TARGETS,
    Target,
    cannot_store,
    interpreting,
    launch,
    recording,
    settings,
    target_of,
    together,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
X, WEIGHT = torch.ones(2, 4), torch.ones(4)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason="Triton kernels can run here")
def test_without_a_gpu_the_reason_says_so():
    assert "need a GPU" in backends()["triton"] and "TRITON_INTERPRET" in backends()["triton"]
    with pytest.raises(RuntimeError, match="gated_norm: backend 'triton' cannot run: .*need a GPU"):
        rmsnorm_fn(X, WEIGHT, None, backend="triton")


def test_kernels_have_no_defaults():
    """Triton 3.6 takes a default for no constant: the call that leaves it out does not compile."""
    files = sorted(Path(triton_launch.__file__).parent.glob("*/triton_*.py"))
    kernels = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert len(kernels) > 100
    assert not [node.name for node in kernels if node.args.defaults or node.args.kw_defaults]


def test_atomics_draw_the_steps_tickets_and_nothing_else():
    """A sum that programs add up as they come differs from run to run, but not where they are interpreted."""
    files = sorted(Path(triton_launch.__file__).parent.glob("*/triton_*.py"))
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    atomics = [call for call in calls if "atomic" in ast.unparse(call.func)]
    assert [ast.unparse(call.args[0]) for call in atomics] == ["ticket", "ticket"]


@pytest.mark.skipif(not interpreting(), reason="Triton is not interpreting")
def test_a_cpu_tensor_is_interpreted_only_where_it_is_asked_for():
    assert backends()["triton"] is None
    assert choose("gated_norm", None, X, WEIGHT).__name__.endswith(("native_impl", "reference"))
    assert choose("gated_norm", "triton", X, WEIGHT).__name__.endswith("triton_impl")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        choose("gated_norm", "triton", X.bfloat16(), WEIGHT)
    assert target_of(X).arch == "interpreter"


def test_what_kernels_cannot_store_is_named():
    with recording(TARGETS["sm_90"]):
        meta = torch.empty(2, device="meta")
        assert cannot_store(meta, None, meta.half(), meta.bfloat16(), meta.int(), meta.long()) is None
        assert "torch.float64" in cannot_store(meta.double())
        assert "negated view" in cannot_store(torch.conj(torch.ones(2, dtype=torch.complex64)).imag)
    with recording(Target("sm_75", 40, 65_536)):
        assert "sm_75" in cannot_store(meta)
    assert "meta" in cannot_store(meta)


def test_the_first_rule_that_fits_is_used(monkeypatch):
    rules = [
        {"arch": ["sm_9"], "when": {"l": [1, 64], "d": [16, 16]}, "use": {"BLOCK": 1}},
        {"arch": ["sm_", "gfx"], "when": {"l": [1, 64]}, "use": {"BLOCK": 2}},
        {"when": {"l": [65, 128]}, "use": {"BLOCK": 3}},
        {"use": {"BLOCK": 4}},
    ]
    monkeypatch.setattr(triton_launch, "table", lambda op: {"kernel": rules})
    triton_launch._settings.cache_clear()

    def block(arch, l, d=16):
        return settings("op", "kernel", Target(arch, 1, 1), l=l, d=d)["BLOCK"]

    assert [block("sm_90", l) for l in (1, 64, 65, 128, 129)] == [1, 1, 3, 3, 4]
    assert block("sm_90", 1, 17) == 2 and block("gfx942", 1) == 2 and block("interpreter", 1) == 4
    settings("op", "kernel", Target("sm_90", 1, 1), l=1, d=16)["BLOCK"] = 9
    assert block("sm_90", 1) == 1
    triton_launch._settings.cache_clear()


class Kernel:
    arg_names = ("x", "y", "M", "stride", "one", "eps", "bias", "BLOCK")
    __name__ = "kernel"
    started = ()

    def __getitem__(self, grid):
        self.started += (grid,)
        return lambda *args, **named: None


def test_a_recording_notes_what_specialisation_sees():
    x = torch.empty(64, dtype=torch.float16, device="meta")
    kernel, big = Kernel(), 2**31
    with recording(TARGETS["gfx942"]) as launches:
        assert target_of(x) is TARGETS["gfx942"]
        triton_launch.launch(kernel, (3, 2), x, x[1:], 48, big + 1, 1, 0.5, None, BLOCK=1, num_warps=4)
        triton_launch.launch(kernel, (0, 2), x)
    (noted,) = launches
    assert noted.grid == (3, 2) and not kernel.started
    assert dict(noted.kinds) == {"x": "*fp16 16", "y": "*fp16", "M": "i32 16", "stride": "i64", "eps": "fp32"}
    assert dict(noted.constants) == {"one": 1, "bias": None, "BLOCK": 1}
    assert dict(noted.options) == {"num_warps": 4}


@needs_triton
@pytest.mark.skipif(interpreting(), reason="Triton's interpreter knows no specialisation")
def test_what_a_kernel_does_not_specialise_is_noted_by_its_type():
    """One and multiples of 16 too: Triton compiles the same code for them."""
    from triton_kernels import add_both

    x = torch.empty(64, device="meta")
    with recording(TARGETS["sm_90"]) as launches:
        for number in (1, 16, 7):
            launch(add_both, (1,), x, number, number)
    assert [dict(noted.kinds).get("m") for noted in launches] == [None, "i32 16", "i32"]
    assert [dict(noted.kinds).get("n") for noted in launches] == ["i32"] * 3
    assert [noted.constants for noted in launches] == [(("m", 1),), (), ()]


def test_launch_starts_what_is_not_empty_and_fits():
    kernel = Kernel()
    for grid in ((3,), (0,), (2, 0)):
        triton_launch.launch(kernel, grid, X)
    assert kernel.started == ((3,),)
    with pytest.raises(RuntimeError, match="kernel: grid .* larger than 65535"):
        triton_launch.launch(kernel, (1, 65_536), X)


MOST = {
    "causal_conv1d": ["forward_kernel", "backward_kernel", "sum_kernel", "update_kernel", "varlen_states_kernel"],
    "state_update": ["_update"],
    "gated_norm": ["_forward", "_backward", "_total"],
    "mamba_mixer": ["step_kernel"],
}


@needs_triton
@pytest.mark.parametrize("op", MOST)
def test_no_call_starts_a_kernel_twice(op):
    """One launch forward, at most two backward; LoRA's launches are counted in its own tests."""
    most, found = Counter(MOST[op]), set()
    for call in calls(op):
        if not call.name.startswith("sequence"):  # made of other operations
            started = [noted.kernel.__name__ for noted in call.launches(TARGETS["sm_90"])]
            assert Counter(started) <= most, call.name
            found |= set(started)
    assert found == set(most)


@needs_triton
@pytest.mark.parametrize("op", MOST | {"ssd_scan": [], "lora_linear": []})
def test_every_kernel_starts_as_its_table_says(op, monkeypatch):
    """What no table could have is none of a kernel's options."""
    look_up = triton_launch._settings
    monkeypatch.setattr(triton_launch, "_settings", lambda *asked: {**look_up(*asked), "num_warps": 64})
    found = [noted for call in calls(op) if call.large for noted in call.launches(TARGETS["sm_90"])]
    assert {dict(noted.options).get("num_warps") for noted in found} == {64}


@needs_triton
@pytest.mark.parametrize("op", MOST | {"ssd_scan": [], "lora_linear": []})
def test_every_rule_is_asked_for_by_a_call_of_the_report(op, monkeypatch):
    """What none asks for would be compiled by nobody before it runs on a GPU."""
    look_up, asked = triton_launch._settings.__wrapped__, []
    monkeypatch.setattr(triton_launch, "_settings", lambda *given: asked.append(look_up(*given)) or asked[-1])
    for call in calls(op):
        for target in TARGETS.values():
            call.launches(target)
    found = {id(use) for use in asked}
    rules = [(kernel, rule) for kernel, rules in triton_launch.table(op).items() for rule in rules]
    unused = [each for each in rules if each[1].get("arch") != ["interpreter"] and id(each[1]["use"]) not in found]
    assert not unused


@needs_triton
def test_host_code_runs_on_meta_tensors():
    x, weight = torch.empty(6, 48, device="meta", requires_grad=True), torch.empty(48, device="meta")
    with recording(TARGETS["sm_90"]) as launches:
        rmsnorm_fn(x, weight, None, backend="triton").sum().backward()
    assert [noted.kernel.__name__ for noted in launches] == ["_forward", "_backward", "_total"]
    assert x.grad.shape == x.shape and x.grad.device.type == "meta"
    with pytest.raises(RuntimeError):
        rmsnorm_fn(x, weight, None, backend="triton")


class Chip:
    """A driver of Triton's for a chip that is not here: kernels are compiled for it, none is started."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The kernels that are started, by name, where an H200 is made believe and Triton's cache is empty."""
    import triton

    found = []
    monkeypatch.setattr(triton_launch, "_start", lambda kernel, *_: found.append(kernel.fn.__name__))
    monkeypatch.setattr(triton_launch, "_compiled", set())
    monkeypatch.setattr(triton.runtime.driver, "_active", Chip())
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield found


def two_kernels():
    """Kernels of this call alone, which Triton has not compiled yet."""
    import triton
    import triton_kernels

    return triton.jit(triton_kernels.double.fn), triton.jit(triton_kernels.square.fn)


@needs_triton
@pytest.mark.skipif(interpreting(), reason="Triton interprets kernels in this process and compiles none")
def test_new_kernels_compile_side_by_side_and_start_in_order(started):
    import triton

    double, square = two_kernels()
    threads, meet = [], Barrier(2, timeout=60)  # passed by two that are compiled at the same time, or not at all

    def compiled(**_):
        threads.append(get_ident())
        meet.wait()

    triton.knobs.compilation.listener = compiled
    for _ in range(2):
        with together():
            launch(double, (1,), X, N=8)
            launch(square, (1,), X, N=8)
            launch(double, (1,), X, N=8)
        assert started == ["double", "square", "double"]
        del started[:]
    assert len(set(threads)) == 2 and get_ident() not in threads  # once each, neither in this one


@needs_triton
@pytest.mark.skipif(interpreting(), reason="Triton interprets kernels in this process and compiles none")
def test_known_kernels_start_at_once_and_those_of_a_failed_block_do_not(started):
    double, square = two_kernels()
    with together():
        launch(double, (1,), X, N=8)
        with together():  # one within another belongs to it
            launch(square, (1,), X, N=8)
        assert not started
    with together():
        launch(double, (1,), X, N=8)
        assert started[2:] == ["double"]
        launch(double, (1,), X, N=16)
        launch(square, (1,), X, N=8)
        assert started[3:] == []  # a new one, and what comes after it, wait
    assert started[3:] == ["double", "square"]
    with pytest.raises(ValueError, match="no"), together():
        launch(double, (1,), X, N=32)
        raise ValueError("no")
    assert len(started) == 5


@needs_triton
@pytest.mark.skipif(not interpreting(), reason="Triton is not interpreting")
def test_masks_of_numbers_and_rows_reach_the_interpreter_as_booleans(monkeypatch):
    """Triton 3.9's refuses others."""
    from triton.runtime import interpreter
    from triton_kernels import double_first

    memory, kinds = interpreter._interpreter, []

    def noted(name):
        def call(*arguments):
            kinds.append(arguments[{"load": 1, "store": 2}[name]].dtype)
            return getattr(memory, name)(*arguments)

        return call

    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=noted("load"), store=noted("store")))
    x = torch.ones(8)
    launch(double_first, (2,), x, N=8)
    assert x.tolist() == [2.0] * 8 and {str(kind) for kind in kinds} == {"bool"} and len(kinds) == 4


@pytest.mark.parametrize("n", [16, 128, 256, 1024])
@pytest.mark.parametrize("channels", [64, 2**20])
def test_a_program_of_the_step_is_one_wave_on_amd(n, channels):
    """Whose ticket publishes the stores of its own wave only."""
    assert settings("mamba_mixer", "step", TARGETS["gfx942"], n=n, channels=channels)["num_warps"] == 1
