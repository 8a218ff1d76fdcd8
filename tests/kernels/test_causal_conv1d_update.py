"""causal_conv1d_update: the state in place, as a window or a ring, in slots, against float64 and against the scan."""

import pytest
import torch
from common import DTYPES, assert_within_budget, check, framed, running, same_bits, threads
from hypothesis import given
from hypothesis import strategies as st

from omnimamba_kernels import causal_conv1d_fn, causal_conv1d_update


def oracle(x, state, weight, bias, activation, seqlens, slots):
    """Step by step from the definition. Returns y and the new state."""
    state, y = state.clone(), torch.zeros_like(x)
    w, length = weight.shape[1], state.shape[2]
    for i in range(x.shape[0]):
        slot = i if slots is None else int(slots[i])
        if slot < 0:
            continue
        start = 0 if seqlens is None else int(seqlens[i]) % length
        window = [state[slot, :, (start + k) % length] for k in range(length)]
        for t in range(x.shape[2]):
            window.append(x[i, :, t])
            a = sum(weight[:, k] * window[len(window) - w + k] for k in range(w))
            a = a if bias is None else a + bias
            y[i, :, t] = a / (1 + torch.exp(-a)) if activation else a
            if seqlens is not None:
                state[slot, :, (start + t) % length] = x[i, :, t]
        if seqlens is None:
            state[slot] = torch.stack(window[len(window) - length :], -1)
    return y, state


@given(
    b=st.integers(1, 3), d=st.integers(1, 40), l=st.integers(1, 7), w=st.integers(2, 4), extra=st.integers(0, 3),
    ring=st.booleans(), indexed=st.booleans(), bias=st.booleans(), activation=st.sampled_from([None, "silu"]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), last=st.booleans(), integer=st.booleans(),
)  # fmt: skip
def test_matches_the_definition(run, b, d, l, w, extra, ring, indexed, bias, activation, dtypes, last, integer):
    g = torch.Generator().manual_seed(d + 50 * l)
    slots = b + 2 if indexed else b
    whole = torch.int64 if integer else torch.int32
    x = framed(torch.randn(b, d, l, generator=g).to(dtypes[0]), (0, 2, 1) if last else None)
    values = torch.randn(slots, d, w - 1 + extra, generator=g).to(dtypes[1])
    weight, offset = torch.randn(d, w, generator=g), torch.randn(d, generator=g) if bias else None
    indices = torch.randperm(slots, generator=g)[:b].to(whole) if indexed else None
    if indexed and b > 1:
        indices[0] = -1
    seqlens = torch.randint(0, 100, (b,), generator=g).to(whole) if ring else None
    found = {}
    for name in (run, "reference"):
        state = framed(values, (2, 0, 1) if last else None)
        with running(name):
            y = causal_conv1d_update(x.tensor, state.tensor, weight, offset, activation, seqlens, indices)
        assert state.intact() and x.intact()
        found[name] = y, state.tensor
    y, state = oracle(
        x.tensor.double(), values.double(), weight.double(), bias and offset.double(), activation, seqlens, indices
    )
    assert_within_budget("y", found[run][0], found["reference"][0], y)
    assert_within_budget("state", found[run][1], found["reference"][1], state)
    if indexed:
        untouched = [s for s in range(slots) if s not in indices.tolist()]
        assert same_bits(found[run][1][untouched], values[untouched])
        assert not found[run][0][indices < 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", [0, 1, 2, 10, 11])
@pytest.mark.parametrize("w", [2, 3, 4])
def test_one_input_into_a_state_in_order_and_in_any(run, w, extra, dtype):
    """A channel's state in one piece may be read and written so; the bits are those of any other layout."""
    g = torch.Generator().manual_seed(w)
    b, d = 2, 43
    x, values = torch.randn(b, d, 1, generator=g), torch.randn(b, d, w - 1 + extra, generator=g).to(dtype)
    weight, bias = torch.randn(d, w, generator=g), torch.randn(d, generator=g)
    y, state = oracle(x.double(), values.double(), weight.double(), bias.double(), "silu", None, None)
    for turned in (weight, weight.T.contiguous().T):
        found = {}
        for name, whole in ((run, True), (run, False), ("reference", True)):
            around = torch.full((values.numel() + 128,), float("nan"), dtype=dtype)
            kept = around[64:-64].view_as(values).copy_(values) if whole else framed(values, (2, 0, 1)).tensor
            with running(name):
                out = causal_conv1d_update(x, kept, turned, bias, "silu")
            assert around[:64].isnan().all() and around[-64:].isnan().all()
            found[name, whole] = out, kept
        assert_within_budget("y", found[run, True][0], found["reference", True][0], y)
        assert same_bits(found[run, True][1], state.to(dtype))
        for one, other in zip(found[run, True], found[run, False], strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("ring", [False, True])
def test_steps_are_the_scan(run, ring):
    tensors = {"x": torch.randn(2, 19, 23), "weight": torch.randn(19, 4), "bias": torch.randn(19)}

    def steps(x, weight, bias):
        state, found = x.new_zeros(2, 19, 5), []
        for t in range(23):
            seen = torch.full((2,), t, dtype=torch.int32, device=x.device) if ring else None
            found.append(causal_conv1d_update(x[..., t], state, weight, bias, "silu", seen))
        return torch.stack(found, -1), state

    def latest(x):
        return x[..., -5:].roll(23 % 5, -1) if ring else x[..., -5:]

    def whole(**t):
        return causal_conv1d_fn(**t, activation="silu", backend="reference"), latest(t["x"])

    got = check(run, steps, whole, tensors)
    assert same_bits(got["out 1"], latest(tensors["x"]))


def test_one_call_is_as_many_steps(run):
    x, weight, start = torch.randn(2, 19, 6), torch.randn(19, 3), torch.randn(2, 19, 4)
    once, stepped = start.clone(), start.clone()
    y = causal_conv1d_update(x, once, weight)
    each = torch.stack([causal_conv1d_update(x[..., t], stepped, weight) for t in range(6)], -1)
    assert same_bits(each, y) and same_bits(once, stepped)


def test_expanded_inputs(run):
    """One row of x, one bias and one filter for all, by stride 0."""
    x, weight, bias = torch.randn(1, 1).expand(3, 20), torch.randn(1, 4).expand(20, 4), torch.randn(1).expand(20)
    state, copy = torch.zeros(3, 20, 3), torch.zeros(3, 20, 3)
    y = causal_conv1d_update(x, state, weight, bias, "silu")
    assert same_bits(y, causal_conv1d_update(x.clone(), copy, weight.clone(), bias.clone(), "silu"))
    assert same_bits(state, copy)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_same_bits_at_every_thread_count(run, count):
    x, weight = torch.randn(9, 2000), torch.randn(2000, 4)
    state, again = torch.zeros(9, 2000, 3), torch.zeros(9, 2000, 3)
    first = causal_conv1d_update(x, state, weight, None, "silu")
    with threads(count):
        assert same_bits(causal_conv1d_update(x, again, weight, None, "silu"), first)
    assert same_bits(state, again)


def test_no_rows(run):
    state = torch.randn(2, 5, 3)
    before = state.clone()
    index = torch.zeros(0, dtype=torch.int32)
    assert causal_conv1d_update(torch.zeros(0, 5), state, torch.zeros(5, 4), conv_state_indices=index).shape == (0, 5)
    assert same_bits(state, before)
