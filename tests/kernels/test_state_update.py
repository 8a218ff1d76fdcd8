"""selective_state_update: output and state against float64, on hostile memory, at any strides and thread count."""

import math

import pytest
import torch
from common import DTYPES, THREAD_COUNTS, assert_within_budget, check, double, framed, here, running, same_bits, threads
from hypothesis import given
from hypothesis import strategies as st

from omnimamba_kernels import mamba_chunk_scan_combined, selective_state_update
from omnimamba_kernels.state_update.cases import CASES, Case

PAIRS = ((torch.bfloat16, torch.float32), (torch.float32, torch.float16))  # of x's storage and the state's


def oracle(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """Row by row and head by head, from the definition. Returns out and the new state."""
    state, out = state.clone(), torch.zeros_like(x)
    heads = x.dim() == 3
    for i in range(x.shape[0]):
        slot = i if state_batch_indices is None else int(state_batch_indices[i])
        if slot < 0:
            continue
        for h in range(x.shape[1]) if heads else [...]:
            group = h // (x.shape[1] // B.shape[1]) if heads else ...
            step = dt[i][h] + (0 if dt_bias is None else dt_bias[h])
            step = torch.log1p(torch.exp(step)) if dt_softplus else step
            new = torch.exp(step[:, None] * A[h]) * state[slot][h] + torch.outer(step * x[i][h], B[i][group])
            y = new @ C[i][group] + (0 if D is None else D[h] * x[i][h])
            out[i][h] = y if z is None else y * z[i][h] / (1 + torch.exp(-z[i][h]))
            state[slot][h] = new
    return out, state


def step(run, tensors, **options):
    """One step on ``run``: the output and the new state, the given state left as it was."""
    state = tensors["state"].clone(memory_format=torch.preserve_format)
    with running(run):
        out = selective_state_update(**{**tensors, "state": state}, **options)
    return out, state


def assert_right(out, state, tensors, **options):
    """``out`` and the new ``state`` are within the budget of a step with ``tensors``."""
    low = step("reference", tensors, **options)
    exact = oracle(**{k: double(t) for k, t in tensors.items()}, **options)
    for name, *three in zip(("out", "state"), (out, state), low, exact, strict=True):
        assert_within_budget(name, *three)


@pytest.mark.parametrize("d, n", [(0, 5), (4, 0)], ids=["no channels", "no states"])
def test_a_head_without_channels_or_states(run, d, n):
    tensors = Case("empty", 2, 3, d, n).tensors()
    assert_right(*step(run, tensors), tensors)


def test_one_group_or_head_needs_no_dimension_of_its_own(run):
    tensors = Case("one group", 3, 4, 5, 6).tensors()
    want = step(run, tensors)
    flat = {name: tensors[name].squeeze(1) for name in ("B", "C")}
    assert all(map(same_bits, step(run, tensors | flat), want))

    tensors = Case("one head", 3, 1, 5, 6).tensors()
    want, state = step(run, tensors)
    parameters = {name: tensors[name].squeeze(0) for name in ("A", "D", "dt_bias")}
    flat = {name: tensors[name].squeeze(1) for name in ("x", "dt", "B", "C", "z")} | parameters
    assert all(map(same_bits, step(run, tensors | flat), (want, state)))
    out, got = step(run, tensors | {"state": tensors["state"].squeeze(1)})
    assert same_bits(out, want.squeeze(1)) and same_bits(got, state.squeeze(1))


@pytest.mark.parametrize("dtype, state", [*zip(DTYPES, DTYPES, strict=True), *PAIRS], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition(run, case, dtype, state):
    tensors = case.tensors(dtype, state)
    got = step(run, tensors, **case.options)
    assert_right(*got, tensors, **case.options)
    indices = tensors["state_batch_indices"]
    if indices is not None:
        untouched = [s for s in range(case.slots) if s not in indices.tolist()]
        assert same_bits(got[1][untouched], tensors["state"][untouched])
        assert not got[0][indices < 0].any()


@given(
    b=st.integers(0, 3), h=st.integers(1, 4), d=st.integers(1, 20), n=st.integers(1, 40), general=st.booleans(),
    order=st.permutations((0, 1, 2, 3)), last=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(run, b, h, d, n, general, order, last):
    """Enough draws together: of few values the reference's worst error, which the budget stands on, is luck."""
    draws = []
    for seed in range(min(8, 1 + 512 // max(1, b * h * d)) if b else 1):
        tensors = Case("", b, h, d, n, g=h, tied=not general).tensors(seed=seed)
        frames = {}
        for name, t in tensors.items():
            if name == "state":
                frames[name] = framed(t, tuple(order))
            elif t is not None:
                frames[name] = framed(t, tuple(reversed(range(t.dim()))) if last else None)
        views = {k: frames[k].tensor if k in frames else None for k in tensors}
        out = selective_state_update(**views, dt_softplus=True)
        for name, frame in frames.items():
            assert frame.intact(), name
            assert name == "state" or same_bits(frame.tensor, tensors[name]), name
        exact = oracle(**{k: double(t) for k, t in tensors.items()}, dt_softplus=True)
        draws.append(((out, views["state"]), step("reference", tensors, dt_softplus=True), exact))
    got, low, exact = ([torch.stack(draw) for draw in zip(*each, strict=True)] for each in zip(*draws, strict=True))
    for name, *three in zip(("out", "state"), got, low, exact, strict=True):
        assert_within_budget(name, *three)


def test_steps_are_the_scan(run):
    g = torch.Generator().manual_seed(1)
    b, l, h, p, n = 2, 11, 4, 8, 16
    tensors = {name: torch.randn(b, l, h, p, generator=g) for name in ("x", "z")}
    tensors |= {
        name: torch.randn(b, l, *shape, generator=g) for name, shape in dict(dt=(h,), B=(2, n), C=(2, n)).items()
    }
    tensors |= {name: torch.randn(h, generator=g) for name in ("A", "D", "dt_bias")}
    tensors["A"] = -tensors["A"].abs()

    def steps(x, z, dt, B, C, A, D, dt_bias):
        state, found, wide = x.new_zeros(b, h, p, n), [], (h, p)
        for t in range(l):
            found.append(selective_state_update(
                state, x[:, t], dt[:, t, :, None].expand(b, *wide), A[:, None, None].expand(*wide, n), B[:, t], C[:, t],
                D[:, None].expand(wide), z[:, t], dt_bias[:, None].expand(wide), dt_softplus=True,
            ))  # fmt: skip
        return torch.stack(found, 1), state

    def scan(**t):
        return mamba_chunk_scan_combined(
            **t, chunk_size=4, dt_softplus=True, return_final_states=True, backend="reference"
        )

    check(run, steps, scan, tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_at_every_run_thread_count_and_batch(run, case):
    if run == "reference":
        pytest.skip("torch's own kernels promise less")
    tensors = case.tensors()
    found = []
    for count in THREAD_COUNTS:
        with threads(count):
            found.append(step(run, tensors, **case.options))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))
    rows = ("x", "dt", "B", "C", "z", "state_batch_indices", *(() if case.slots else ("state",)))
    alone = {k: t[-1:] if k in rows and t is not None else t for k, t in tensors.items()}
    assert same_bits(step(run, alone, **case.options)[0], found[0][0][-1:])


def test_mixed_dtypes(run):
    """Whatever of x's companions has another dtype than x, the answer has x's."""
    tensors = CASES[1].tensors()
    mixed = {**tensors, "x": tensors["x"].bfloat16(), "dt": tensors["dt"].half(), "A": tensors["A"].bfloat16()}
    out, state = step(run, mixed, dt_softplus=True)
    assert out.dtype == torch.bfloat16
    assert_right(out, state, mixed, dt_softplus=True)


@pytest.mark.parametrize("value", [-1e4, -90.0, 25.0, 1e4])
def test_extreme_steps(run, value):
    """A step near 0 keeps the state, a huge one forgets it; nothing overflows."""
    tensors = {
        "state": torch.ones(1, 1, 2, 3), "x": torch.zeros(1, 1, 2), "dt": torch.full((1, 1, 2), value),
        "A": -torch.ones(1, 2, 3), "B": torch.ones(1, 1, 3), "C": torch.ones(1, 1, 3),
    }  # fmt: skip
    kept = math.exp(-(max(value, 0.0) + math.log1p(math.exp(-abs(value)))))
    got, low = (step(name, tensors, dt_softplus=True) for name in (run, "reference"))
    for name, factor, *two in zip(("out", "state"), (3, 1), got, low, strict=True):
        assert_within_budget(name, *two, torch.full(two[0].shape, factor * kept, dtype=torch.float64))


def test_rows_that_share_a_slot_are_refused_untouched(run):
    if here().type != "cpu":
        pytest.skip("values are not read back from a GPU")
    tensors = Case("", 4, 2, 8, 16, slots=6).tensors()
    tensors["state_batch_indices"] = torch.tensor([2, 1, 2, -1])
    before = tensors["state"].clone()
    with pytest.raises(ValueError, match="state_batch_indices: got .* each row at most once"):
        selective_state_update(**tensors, dt_softplus=True)
    assert same_bits(tensors["state"], before)


def test_garbage_in_a_padding_row_stays_there(run):
    """Its output is 0, whatever it and the first slot hold."""
    x, B, A = torch.randn(2, 1, 4), torch.randn(2, 1, 3), -torch.rand(1, 4, 3)
    state = torch.full((2, 1, 4, 3), float("nan"))
    state[1] = 1.0
    x[1], B[1] = float("nan"), float("inf")
    before, slots = state.clone(), torch.tensor([1, -1])
    out = selective_state_update(state, x, x.abs(), A, B, B, state_batch_indices=slots)
    assert out[0].isfinite().all() and not out[1].any()
    assert same_bits(state[0], before[0]) and state[1].isfinite().all()


def test_output_aliases_nothing(run):
    tensors = CASES[1].tensors()
    before = {k: t.clone() for k, t in tensors.items() if t is not None}
    out = selective_state_update(**tensors, dt_softplus=True)
    assert out.untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in tensors.values() if t is not None
    }
    changed = {k for k in before if not same_bits(before[k], tensors[k])}
    assert changed == {"state"}
