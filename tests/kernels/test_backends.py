"""Choosing a back end: by name, by block, by what can run, always with the reason."""

import pytest
import torch
from common import device_of, here, hostile_memory, running, runs, same_bits

from omnimamba_kernels import (
    backends,
    mamba_chunk_scan_combined,
    native,
    rmsnorm_fn,
    selective_state_update,
    use_backend,
)
from omnimamba_kernels.backends import NAMES, choose
from omnimamba_kernels.gated_norm import native_impl, reference

X, WEIGHT = torch.ones(2, 4), torch.ones(4)
needs_native = pytest.mark.skipif(backends()["native"] is not None, reason=str(backends()["native"]))


def test_every_name_has_a_reason_or_none():
    assert tuple(backends()) == NAMES
    assert backends()["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in backends().values())


def test_every_instruction_set_has_a_reason_or_none():
    sets = native.instruction_sets()
    assert set(sets) == {"avx512", "avx2", "neon", "generic"}
    native_runs = [run for run in runs() if run.startswith("native-")]
    assert [f"native-{name}" for name, reason in sets.items() if reason is None] == native_runs


@needs_native
def test_the_best_that_can_run_is_chosen():
    assert choose("gated_norm", None, X, WEIGHT) is native_impl
    assert choose("gated_norm", None, X.double(), WEIGHT.double()) is reference
    assert choose("gated_norm", None, X.to("meta"), WEIGHT.to("meta")) is reference


@needs_native
def test_native_names_the_dtype_it_cannot_take():
    with pytest.raises(RuntimeError, match="gated_norm: backend 'native' cannot run: .*float64"):
        rmsnorm_fn(X.double(), WEIGHT.double(), None, backend="native")


def test_a_name_runs_or_raises_with_the_reason():
    for name, reason in backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run"):
                rmsnorm_fn(X, WEIGHT, None, backend=name)
    with pytest.raises(ValueError, match="backend: got 'fastest', expected one of cuda"):
        rmsnorm_fn(X, WEIGHT, None, backend="fastest")
    with pytest.raises(ValueError, match="fastest"), use_backend("fastest"):
        pass


def test_a_refused_backend_leaves_the_state():
    state = torch.ones(1, 2, 3)
    before = state.clone()
    with pytest.raises(RuntimeError):
        selective_state_update(
            state, torch.ones(1, 2), torch.ones(1, 2), -torch.ones(2, 3), *torch.ones(2, 1, 3), backend="triton"
        )
    assert same_bits(state, before)


def test_blocks_nest_and_end():
    with use_backend("reference"):
        assert choose("gated_norm", None, X, WEIGHT) is reference
        with use_backend(None):
            best = choose("gated_norm", None, X, WEIGHT)
        assert choose("gated_norm", None, X, WEIGHT) is reference
    assert choose("gated_norm", None, X, WEIGHT) is best
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose("gated_norm", None, X, WEIGHT) is best


@needs_native
def test_instruction_sets_by_block():
    best = native.instruction_set()
    for name, reason in native.instruction_sets().items():
        if reason is None:
            with native.use_instruction_set(name):
                assert native.instruction_set() == name
        else:
            with pytest.raises(RuntimeError, match=name), native.use_instruction_set(name):
                pass
        assert native.instruction_set() == best
    with pytest.raises(RuntimeError, match="sse9"), native.use_instruction_set("sse9"):
        pass


def test_the_tests_own_memory_is_hostile():
    with hostile_memory():
        assert torch.empty(3).isnan().all() and torch.ones(2, 3).new_empty(3, 2).isnan().all()
        assert torch.empty_like(torch.ones(2), dtype=torch.bfloat16).isnan().all()


def test_the_tests_runs_differ():
    """Each run is what it says: the widths of the modules tell them apart."""
    widths = {"avx512": 16, "avx2": 8, "generic": 4, "neon": 4}
    for name in runs():
        with running(name):
            if name.startswith("native-"):
                module = native._load(native.instruction_set())
                assert module.vector_width == widths[name.partition("-")[2]]
            else:
                module = choose("gated_norm", None, X.to(device_of(name)), WEIGHT.to(device_of(name)))
                assert module.__name__.rpartition(".")[2].removesuffix("_impl") == name.partition("-")[0]


def test_autocast_leaves_the_arithmetic_in_float32(run):
    x, dt = torch.randn(1, 30, 2, 4), torch.rand(1, 30, 2)
    A, B = -torch.rand(2), torch.randn(1, 30, 1, 8)
    want = mamba_chunk_scan_combined(x, dt, A, B, B, 16)
    with torch.autocast(here().type, torch.bfloat16):
        got = mamba_chunk_scan_combined(x, dt, A, B, B, 16)
    assert same_bits(got, want)


def test_a_device_without_kernels_is_refused_by_name():
    class Elsewhere:
        device = torch.device("mps")

    with pytest.raises(RuntimeError, match="none is written for mps devices.*backend='reference'"):
        choose("ssd_scan", None, Elsewhere())
