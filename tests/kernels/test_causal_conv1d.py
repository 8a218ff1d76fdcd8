"""causal_conv1d_fn: forward and gradients against float64, on hostile memory, at any strides and thread count."""

import pytest
import torch
from common import DTYPES, THREAD_COUNTS, check, evaluate, framed, same_bits, threads
from hypothesis import given
from hypothesis import strategies as st

from omnimamba_kernels import causal_conv1d_fn, causal_conv1d_varlen_states
from omnimamba_kernels.causal_conv1d.cases import CASES, packed_ids

GRADS = ("x", "weight", "bias", "initial_states")


def oracle(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None, return_final_states=False):
    """Position by position, from the definition."""
    b, d, l = x.shape
    w = weight.shape[1]
    past = x.new_zeros(b, d, w - 1) if initial_states is None else initial_states
    inputs = torch.cat([past, x], -1)
    ids = torch.zeros(b, l, dtype=torch.long) if seq_idx is None else seq_idx.long()
    ids = torch.cat([ids[:, :1].expand(b, w - 1), ids], -1) if l else ids.new_zeros(b, w - 1)
    rows = []
    for i in range(b):
        columns = []
        for t in range(w - 1, w - 1 + l):
            if ids[i, t] < 0:
                columns.append(x.new_zeros(d))
                continue
            own = [s for s in range(t - w + 1, t + 1) if ids[i, s] == ids[i, t]]
            a = sum(inputs[i, :, s] * weight[:, s - t + w - 1] for s in own)
            a = a if bias is None else a + bias
            columns.append(a if activation is None else a / (1 + torch.exp(-a)))
        rows.append(torch.stack(columns, -1) if columns else x.new_zeros(d, 0))
    y = torch.stack(rows)
    if not return_final_states:
        return y
    last = ids[:, -1:]
    kept = (ids[:, l:] == last) & (last >= 0)
    return y, torch.where(kept[:, None], inputs[..., l:], 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition(run, case, dtype):
    options = case.options

    def function(**tensors):
        return causal_conv1d_fn(**tensors, **options)

    check(run, function, lambda **tensors: oracle(**tensors, **options), case.tensors(dtype), GRADS)


def test_float64_goes_to_the_reference():
    case = CASES[5]
    tensors = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in case.tensors().items()}
    got = evaluate(lambda **t: causal_conv1d_fn(**t, **case.options), tensors, GRADS)
    exact = evaluate(lambda **t: oracle(**t, **case.options), tensors, GRADS)
    for name in exact:  # both in float64: there is nothing of lower precision to take a budget from
        torch.testing.assert_close(got[name], exact[name], rtol=1e-12, atol=1e-12)


@given(
    b=st.integers(0, 2), d=st.integers(0, 40), l=st.integers(0, 40), w=st.integers(2, 4),
    order=st.permutations((0, 1, 2)), step=st.integers(1, 3), packed=st.booleans(), initial=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(run, b, d, l, w, order, step, packed, initial):
    g = torch.Generator().manual_seed(b + 3 * d + 41 * l)
    wide = torch.randn([(b, d, step * l)[i] for i in order], generator=g)
    x = wide.permute([order.index(i) for i in range(3)])[..., ::step]
    tensors = {
        "x": x,
        "weight": torch.randn(w, d, generator=g).t(),
        "bias": torch.randn(d, 2, generator=g)[:, 0],
        "seq_idx": packed_ids(b, l, g).long() if packed else None,
        "initial_states": torch.randn(b, w - 1, d, generator=g).transpose(1, 2) if initial else None,
    }
    options = {"activation": "silu", "return_final_states": True}
    if b * d * l == 0:
        y, final = causal_conv1d_fn(**tensors, **options)
        assert y.shape == (b, d, l) and final.shape == (b, d, w - 1)
        return
    check(run, lambda **t: causal_conv1d_fn(**t, **options), lambda **t: oracle(**t, **options), tensors, GRADS)


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2), (2, 0, 1)], ids=str)
def test_stays_inside_its_memory(run, order):
    case = CASES[3]
    tensors = case.tensors()
    frames = {
        k: framed(t, order if k in ("x", "initial_states") else None) if t is not None else None
        for k, t in tensors.items()
    }
    before = {k: t.clone() for k, t in tensors.items() if t is not None}
    views = {k: f and f.tensor for k, f in frames.items()}
    check(run, lambda **t: causal_conv1d_fn(**t, **case.options), lambda **t: oracle(**t, **case.options), views, GRADS)
    for name, frame in frames.items():
        assert frame is None or (frame.intact() and same_bits(frame.tensor, before[name])), name


def test_output_keeps_the_layout_and_aliases_nothing(run):
    x = torch.randn(2, 9, 24).transpose(1, 2)
    weight = torch.randn(24, 4)
    y, final = causal_conv1d_fn(x, weight, return_final_states=True)
    assert y.stride(1) == 1 or run == "reference"
    storages = {t.untyped_storage().data_ptr() for t in (x, weight, y, final)}
    assert len(storages) == 4
    assert causal_conv1d_fn(x.contiguous(), weight).stride(2) == 1


@pytest.mark.parametrize("layout", ["channel-last", "contiguous"])
def test_garbage_in_the_padding_stays_there(run, layout):
    g = torch.Generator().manual_seed(5)
    x, weight, bias = torch.randn(2, 20, 43, generator=g), torch.randn(20, 4, generator=g), torch.randn(20, generator=g)
    ids = packed_ids(2, 43, g)
    dy = torch.randn(2, 20, 43, generator=g)
    found = []
    for garbage in (0.0, float("nan")):
        filled = torch.where((ids < 0)[:, None], garbage, x)
        if layout == "channel-last":
            filled = filled.transpose(1, 2).contiguous().transpose(1, 2)
        leaves = [t.clone().requires_grad_() for t in (filled, weight, bias)]
        y, final = causal_conv1d_fn(*leaves, ids, activation="silu", return_final_states=True)
        found.append((y, final, *torch.autograd.grad((y, final), leaves, (dy, torch.ones_like(final)))))
    assert int((ids < 0).sum()) > 0
    for clean, dirty in zip(*found, strict=True):
        assert same_bits(clean, dirty)
    assert not found[0][0].mT[ids < 0].any()


@pytest.mark.parametrize("layout", ["channel-last", "slice", "contiguous"])
def test_segments_continue_as_one(run, layout):
    case = next(c for c in CASES if c.layout == layout and c.l > 30 and not c.sequences)
    tensors = {name: case.tensors()[name] for name in ("x", "weight", "bias")}

    def segmented(x, weight, bias):
        parts, state = [], x.new_zeros(case.b, case.d, case.w - 1)
        for part in x.split([1, 2, 17, case.l - 20], -1):
            y, state = causal_conv1d_fn(part, weight, bias, None, state, True, activation="silu")
            parts.append(y)
        return torch.cat(parts, -1), state

    got = check(run, segmented, lambda **t: oracle(**t, activation="silu", return_final_states=True), tensors)
    assert same_bits(got["out 1"], tensors["x"][..., case.l - (case.w - 1) :].contiguous())


def test_packed_sequences_are_each_alone(run):
    g = torch.Generator().manual_seed(2)
    lengths = [1, 6, 2, 13]
    tensors = {
        "x": torch.randn(1, 18, sum(lengths), generator=g),
        "weight": torch.randn(18, 4, generator=g),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
    }

    def each_alone(x, weight, seq_idx):
        return torch.cat([oracle(part, weight, activation="silu") for part in x.split(lengths, -1)], -1)

    check(run, lambda **t: causal_conv1d_fn(**t, activation="silu"), each_alone, tensors)


def test_sequences_that_return_are_joined_by_their_id(run):
    """Equality of ids counts, not neighbourhood: 0 1 0 joins the first and the last."""
    x, weight = torch.ones(1, 1, 3), torch.tensor([[1.0, 10.0, 100.0]])
    ids = torch.tensor([[5, 7, 5]])
    assert causal_conv1d_fn(x, weight, None, ids).flatten().tolist() == [100.0, 100.0, 101.0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_at_every_run_thread_count_and_batch(run, case):
    if run == "reference":
        pytest.skip("torch's own kernels promise less")
    tensors = case.tensors()

    def at(count):
        with threads(count):
            return evaluate(lambda **t: causal_conv1d_fn(**t, **case.options), tensors, GRADS)

    first, *others = map(at, THREAD_COUNTS)
    for other in others:
        assert all(same_bits(first[name], other[name]) for name in first)
    row = {k: t[-1:] if k in ("x", "seq_idx", "initial_states") and t is not None else t for k, t in tensors.items()}
    alone = evaluate(lambda **t: causal_conv1d_fn(**t, **case.options), row)
    assert all(same_bits(alone[name], first[name][-1:]) for name in alone)


def test_only_the_gradients_that_were_asked_for(run):
    x, weight = torch.randn(1, 4, 9), torch.randn(4, 3, requires_grad=True)
    y, final = causal_conv1d_fn(x, weight, return_final_states=True)
    y.sum().backward()
    assert weight.grad is not None and not final.requires_grad or run != "reference"
    x.requires_grad_()
    _, final = causal_conv1d_fn(x, weight, return_final_states=True)
    (grad,) = torch.autograd.grad(final.sum(), x)
    assert grad.sum() == 8 and not grad[..., :7].any()


def test_final_states_out_receives_them_in_place(run):
    x, weight, out = torch.randn(2, 5, 7), torch.randn(5, 4), torch.full((2, 5, 3), float("nan"))
    y, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final.data_ptr() == out.data_ptr() and same_bits(out, x[..., 4:])
    out.fill_(float("nan"))
    assert same_bits(causal_conv1d_fn(x, weight, final_states_out=out), y) and same_bits(out, x[..., 4:])


@pytest.mark.parametrize("first", [0, 3, -1])
def test_initial_states_belong_to_the_first_positions_sequence(run, first):
    """Whatever its index, and to no other: a row that starts with padding has no use for them."""
    w, lengths = 4, (2, 3, 4)
    x = torch.randn(1, sum(lengths), 16).transpose(1, 2)
    weight, past = torch.randn(16, w), torch.randn(1, 16, w - 1)
    ids = torch.repeat_interleave(torch.tensor([first, 4, 5]), torch.tensor(lengths))[None]
    y = causal_conv1d_fn(x, weight, seq_idx=ids, initial_states=past)
    alone = x.split(lengths, -1)
    begun = causal_conv1d_fn(alone[0], weight, initial_states=past)
    expected = [begun if first >= 0 else torch.zeros_like(begun), *(causal_conv1d_fn(a, weight) for a in alone[1:])]
    torch.testing.assert_close(y, torch.cat(expected, -1))


def test_extreme_inputs_stay_finite(run):
    weight = torch.tensor([[0.0, 1.0]]).expand(16, 2)
    for value in (-1e30, -80.0, -30.0, 0.0, 30.0, 100.0, 1e30):  # each its own budget
        tensors = {"x": torch.full((1, 16, 7), value), "weight": weight}
        check(run, lambda **t: causal_conv1d_fn(**t, activation="silu"), lambda **t: oracle(**t, activation=1), tensors)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.sampled_from([0, 3]),
    d=st.integers(1, 20),
    keep=st.integers(1, 6),
)
def test_varlen_states(run, lengths, padding, d, keep):
    for dtype in DTYPES:
        x = framed(torch.randn(sum(lengths) + padding, d).to(dtype), (1, 0))
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        states = causal_conv1d_varlen_states(x.tensor, cu, keep)
        expected = torch.zeros(len(lengths), d, keep, dtype=dtype)
        for i, part in enumerate(x.tensor[: sum(lengths)].split(lengths)):
            kept = part[max(0, len(part) - keep) :]
            expected[i, :, keep - len(kept) :] = kept.t()
        assert same_bits(states, expected) and x.intact()


def test_offsets_beyond_32_bits(run):
    """Two rows 2^31 + 64 elements apart: 4 GiB of addresses, of which two pages are ever touched."""
    far, d = 2**31 + 64, 16
    torch.use_deterministic_algorithms(False)  # or every page would be filled
    x = torch.empty(far + d, dtype=torch.bfloat16).as_strided((1, d, 2), (0, 1, far))
    x.copy_(torch.randn(1, d, 2))
    weight = torch.randn(d, 2)
    assert same_bits(
        causal_conv1d_fn(x, weight), causal_conv1d_fn(x.transpose(1, 2).contiguous().transpose(1, 2), weight)
    )


def test_initial_states_that_begin_where_the_input_begins(run):
    """Two views of one row: what is asked of one's address says nothing of the other."""
    row, weight = torch.randn(2, 5, 11), torch.randn(5, 4)
    x, before = row[..., :8], row[..., :3]
    apart = causal_conv1d_fn(x.clone(), weight, initial_states=before.clone())
    assert same_bits(causal_conv1d_fn(x, weight, initial_states=before), apart)
