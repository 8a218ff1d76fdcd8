"""mamba_chunk_scan_combined: forward and gradients against float64, at any strides and thread count."""

import emulated
import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, THREAD_COUNTS, check, evaluate, framed, runs, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from omnimamba_kernels import mamba_chunk_scan_combined
from omnimamba_kernels.ssd_scan.cases import CASES, Case, packed_ids
from omnimamba_kernels.triton_launch import interpreting

RUNS = runs()  # few of these shapes suit the kernel for Hopper, which test_ssd_scan_cuda.py tries on its own
GRADS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
CROSSED = (
    Case("narrow heads, packed by offsets", 1, 170, 3, 40, n=40, skip=1, initial_states=True, sequences="cu_seqlens"),
    Case("no D", 2, 131, 2, 32, n=96, limit=(0.02, 0.1)),
)
"""Where what crosses a position, of which the gradients of A and dt_bias are made, is small beside what does not."""


def oracle(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, *,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_varlen_states=False, **_,
):  # fmt: skip
    """Position by position, from the definition: y, the last state, and the state after each packed sequence."""
    b, l, h, p = x.shape
    per_group = h // B.shape[2]
    B, C = (t.repeat_interleave(per_group, 2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    if cu_seqlens is not None and seq_idx is None:
        seq_idx = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        seq_idx = F.pad(seq_idx, (0, l - len(seq_idx)), value=-1)[None]
    ids = torch.zeros(b, l, dtype=torch.long) if seq_idx is None else seq_idx.long()
    state = x.new_zeros(b, h, p, B.shape[3]) if initial_states is None else initial_states
    before, ys, ended = torch.zeros(b, dtype=torch.long), [], {0: state}
    for t in range(l):
        state = torch.where((ids[:, t] == before)[:, None, None, None], state, 0.0)
        pushed = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + pushed
        state = torch.where((ids[:, t] >= 0)[:, None, None, None], state, 0.0)
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        y = y if D is None else y + x[:, t] * (D[:, None] if D.dim() == 1 else D)
        y = y if z is None else y * F.silu(z[:, t])
        ys.append(torch.where((ids[:, t] >= 0)[:, None, None], y, 0.0))
        before = ids[:, t]
        ended[t + 1] = state
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    if not return_varlen_states:
        return y, state
    first = [initial_states[0] if initial_states is not None else torch.zeros_like(state[0])]
    blank = [torch.zeros_like(state[0])] * len(cu_seqlens)
    spans = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    starts = first + blank
    return y, state, torch.stack([ended[e][0] if e > s else starts[i] for i, (s, e) in enumerate(spans)])


def skip_if_slow(run, case):
    """Skips what is there for the native kernels' slabs where each of hundreds of programs or blocks is interpreted."""
    if case is CASES[5] and (run == "cuda-emulated" or (run == "triton" and interpreting())):
        pytest.skip("too many programs to interpret")


def scan(options):
    return lambda **tensors: mamba_chunk_scan_combined(**tensors, **options)


def exact(options):
    return lambda **tensors: oracle(**tensors, **options)


@pytest.mark.parametrize(
    "case, dtype",
    [(case, dtype) for i, case in enumerate(CASES) for dtype in (DTYPES if i in (1, 3, 8) else (torch.float32,))],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_matches_the_recurrence(run, case, dtype):
    skip_if_slow(run, case)
    check(run, scan(case.options), exact(case.options), case.tensors(dtype), GRADS)


@pytest.mark.parametrize(
    "case, dtype, seed",
    [(CROSSED[0], torch.bfloat16, 0), (CROSSED[0], torch.float32, 1), (CROSSED[1], torch.bfloat16, 0)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_gradients_of_small_sums(run, case, dtype, seed):
    if not run.startswith("native"):
        pytest.skip("kernels of a GPU sum otherwise; Hopper's are asked in test_ssd_scan_cuda.py")
    check(run, scan(case.options), exact(case.options), case.tensors(dtype, seed), GRADS)


@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.name)
def test_without_gradients(run, case):
    """Nothing is kept for a backward, and very short sequences take another path."""
    check(run, scan(case.options), exact(case.options), case.tensors())


@settings(max_examples=8)
@given(
    b=st.integers(1, 2), l=st.integers(1, 70), g=st.integers(1, 2), per_group=st.integers(1, 3), p=st.integers(1, 34),
    n=st.integers(1, 34), skip=st.integers(0, 2), gate=st.booleans(), initial=st.booleans(), packed=st.booleans(),
    turned=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(run, b, l, g, per_group, p, n, skip, gate, initial, packed, turned):
    case = Case("drawn", b, l, g * per_group, p, g, n, skip=skip, gate=gate, initial_states=initial,
                sequences="seq_idx" if packed else None)  # fmt: skip
    tensors = case.tensors(seed=l)
    if turned:
        order = {"x": (3, 1, 0, 2), "B": (2, 3, 1, 0), "dt": (2, 0, 1), "initial_states": (3, 2, 1, 0)}
        for name, dims in order.items():
            if tensors[name] is not None:
                tensors[name] = framed(tensors[name], dims).tensor
    # One number a head (A, D, dt_bias) is too few to measure the reference's rounding by; CASES have them.
    wanted = ("x", "dt", "B", "C", "z", "initial_states")
    check(run, scan(case.options), exact(case.options), tensors, wanted)


@pytest.mark.parametrize("case", [CASES[3], CASES[8], CASES[9]], ids=lambda c: c.name)
def test_stays_inside_its_memory(run, case):
    tensors = case.tensors()
    frames = {name: framed(t) for name, t in tensors.items() if t is not None and name not in ("seq_idx", "cu_seqlens")}
    views = tensors | {name: frame.tensor for name, frame in frames.items()}
    check(run, scan(case.options), exact(case.options), views, GRADS)
    for name, frame in frames.items():
        assert frame.intact() and same_bits(frame.tensor, tensors[name]), name


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5], CASES[8], CASES[9]], ids=lambda c: c.name)
def test_same_bits_at_any_thread_count(run, case):
    if run == "reference":
        pytest.skip("torch's own kernels split sums by thread")
    skip_if_slow(run, case)
    found = []
    for count in (2, 1) if run in ("triton", "cuda-emulated") else THREAD_COUNTS:
        if run == "cuda-emulated":  # on one thread of the CPU, but the GPU's threads in another order
            emulated.configure(seed=count, early_copies=count == 2)
        with threads(count):
            found.append(evaluate(scan(case.options), case.tensors(), GRADS))
    for other in found[1:]:
        for name in other:
            assert same_bits(other[name], found[0][name]), name


@pytest.mark.parametrize("length, heads, headdim", [(1025, 1, 1024), (4097, 8, 8)])
def test_the_next_slab_waits_beside_the_one_at_work(run, length, heads, headdim):
    """Threads prepare chunks ahead of those being scanned, which heads this wide keep others at for long; and where
    heads are side by side they begin the next slab while others are at this one."""
    if not run.startswith("native"):
        pytest.skip("these slabs are the native kernels' own")
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (heads, headdim), "dt": (heads,), "B": (1, 128), "C": (1, 128)}
    tensors = {name: torch.randn(1, length, *shape, generator=make) for name, shape in shapes.items()}
    tensors["A"] = -torch.rand(heads)
    run_once = scan({"chunk_size": 64, "dt_softplus": True})
    with threads(1):
        alone = run_once(**tensors)
    with threads(8):  # more threads than scan, so that the next slab begins at once
        assert all(same_bits(run_once(**tensors), alone) for _ in range(6))


LONG = (
    Case("long", 1, 1025, 4, 16, g=2, skip=1, gate=True, initial_states=True),
    Case("long and packed", 1, 1300, 4, 16, g=2, skip=2, gate=True, initial_states=True, sequences="seq_idx"),
    Case("long, of few states", 1, 4097, 2, 8, n=8, skip=1, initial_states=True),
)


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_long_sequences_and_their_gradients(run, case):
    """Many slabs of chunks, against the reference in float64: the recurrence would take its time."""
    if not run.startswith("native"):
        pytest.skip("these slabs are the native kernels' own")
    tensors = case.tensors()

    def reference(**given):
        return mamba_chunk_scan_combined(**given, **case.options, backend="reference")

    check(run, scan(case.options), reference, tensors, GRADS)


def test_saving_for_a_backward_changes_no_bit(run):
    case = CASES[4]
    tensors = case.tensors()
    plain, recorded = evaluate(scan(case.options), tensors), evaluate(scan(case.options), tensors, GRADS)
    assert all(same_bits(plain[name], recorded[name]) for name in plain)


def test_segmented_is_whole(run):
    case = CASES[4]
    tensors = case.tensors()

    def segmented(**given):
        cuts, parts, state = (0, 1, 5, 60, 69, 70), [], None
        for start, end in zip(cuts, cuts[1:], strict=False):
            part = {k: t[:, start:end] if k in ("x", "dt", "B", "C") else t for k, t in given.items()}
            out, state = mamba_chunk_scan_combined(**part | {"initial_states": state}, **case.options)
            parts.append(out)
        return torch.cat(parts, 1), state

    check(run, segmented, exact(case.options), tensors)


def test_a_batch_row_alone_is_the_same(run):
    if run == "reference":
        pytest.skip("torch's own products promise less")
    case = CASES[8]
    tensors = case.tensors()
    y, final = mamba_chunk_scan_combined(**tensors, **case.options)
    alone = {k: t[1:] if t is not None and k not in ("A", "D", "dt_bias") else t for k, t in tensors.items()}
    y1, final1 = mamba_chunk_scan_combined(**alone, **case.options)
    assert same_bits(y1, y[1:]) and same_bits(final1, final[1:])


def test_garbage_in_the_padding_stays_there(run):
    case = CASES[8]
    tensors = case.tensors()
    padded = tensors["seq_idx"] < 0
    assert padded.any()
    dirty = dict(tensors)
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = tensors[name].clone()
        dirty[name][padded] = float("nan")
    got, plain = evaluate(scan(case.options), dirty, GRADS), evaluate(scan(case.options), tensors, GRADS)
    for name in plain:
        assert same_bits(got[name], plain[name]), name
    assert not got["out 0"][padded].any()


@pytest.mark.parametrize("own", [True, False], ids=["of the offsets", "others"])
def test_sequences_by_index_and_states_by_offsets(run, own):
    """As mamba_ssm's layer asks for them: where both are given the index says what a sequence is."""
    case = Case("both", 1, 90, 2, 8, n=8, skip=1, initial_states=True, sequences="cu_seqlens", padding=9)
    tensors = case.tensors()
    offsets = tensors["cu_seqlens"]
    ids = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().cpu())
    ids = F.pad(ids, (0, 9), value=-1)[None] if own else packed_ids(1, 90, torch.Generator().manual_seed(1))
    wanted = ("x", "dt", "B", "C", "initial_states")  # of one number a head there are too few
    check(run, scan(case.options), exact(case.options), tensors | {"seq_idx": ids.int()}, wanted)


@pytest.mark.parametrize("b, l", [(1, 0), (0, 5), (2, 0)])
def test_empty(run, b, l):
    case = Case("empty", b, l, 2, 8, skip=1, gate=True, initial_states=True)
    tensors = case.tensors()
    check(run, scan(case.options), exact(case.options), tensors)
    leaf = tensors["initial_states"].requires_grad_()
    y, final = mamba_chunk_scan_combined(**tensors, **case.options)
    final.sum().backward()
    assert y.shape == (b, l, 2, 8) and torch.equal(leaf.grad, torch.ones_like(leaf))


def test_mixed_types_follow_x(run):
    case = CASES[7]
    tensors = case.tensors()
    tensors["x"], tensors["B"] = tensors["x"].bfloat16(), tensors["B"].half()
    check(run, scan(case.options), exact(case.options), tensors, GRADS)


@pytest.mark.parametrize("index", range(3))
def test_gradient_through_one_output_alone(run, index):
    case = CASES[9]
    wanted = ("x", "dt", "A", "B", "initial_states")

    def one(function):
        return lambda **tensors: function(**tensors)[index]

    check(run, one(scan(case.options)), one(exact(case.options)), case.tensors(), wanted)


def test_native_names_float64_as_its_limit():
    with pytest.raises(RuntimeError, match="float64"):
        mamba_chunk_scan_combined(**Case("", 1, 4, 1, 4).tensors(torch.float64), chunk_size=4, backend="native")


def call(**changes):
    tensors = Case("", 1, 12, 4, 8, g=2).tensors() | changes
    return mamba_chunk_scan_combined(**{"chunk_size": 4, **tensors})


@pytest.mark.parametrize(
    "error, name, changes",
    [
        (ValueError, "x", dict(x=torch.zeros(1, 12, 32))),
        (ValueError, "dt", dict(dt=torch.zeros(1, 12, 3))),
        (ValueError, "A", dict(A=torch.zeros(5))),
        (ValueError, "C", dict(C=torch.zeros(1, 12, 2, 5))),
        (ValueError, "groups", dict(B=torch.zeros(1, 12, 3, 16), C=torch.zeros(1, 12, 3, 16))),
        (ValueError, "D", dict(D=torch.zeros(4, 9))),
        (ValueError, "z", dict(z=torch.zeros(1, 12, 4, 9))),
        (ValueError, "initial_states", dict(initial_states=torch.zeros(1, 4, 16, 8))),
        (ValueError, "chunk_size", dict(chunk_size=0)),
        (ValueError, "dt_limit", dict(dt_limit=(1.0, 0.0))),
        (ValueError, "cu_seqlens", dict(cu_seqlens=torch.tensor([0, 5, 13]))),
        (TypeError, "x", dict(x=torch.zeros(1, 12, 4, 8, dtype=torch.int32))),
        (TypeError, "seq_idx", dict(seq_idx=torch.zeros(1, 12))),
    ],
)
def test_bad_arguments(error, name, changes):
    with pytest.raises(error, match=name):
        call(**changes)


@pytest.mark.parametrize("name", GRADS)
def test_one_tensor_may_be_of_another_dtype(run, name):
    """It counts as the number that it holds."""
    case = Case("all", 2, 70, 2, 16, n=16, skip=2, gate=True, initial_states=True)
    function, tensors = scan(case.options), case.tensors()
    narrow = tensors[name].bfloat16()
    found, expected = (function(**(tensors | {name: t}))[0] for t in (narrow, narrow.float()))
    assert found.dtype is (narrow.dtype if name == "x" else torch.float32)
    margin = 2**-7 if name == "x" else 2**-17
    torch.testing.assert_close(found.float(), expected, rtol=margin, atol=margin)


@pytest.mark.parametrize("name", ["B", "C", "z"])
def test_one_wider_tensor_keeps_its_digits(run, name):
    case = Case("all", 2, 70, 2, 16, n=16, skip=2, gate=True, initial_states=True)
    function, wide = scan(case.options), case.tensors()
    narrow = case.tensors(torch.bfloat16) | {name: wide[name]}
    expected = function(**{k: t.float() for k, t in narrow.items() if t is not None})[0]
    assert same_bits(function(**narrow)[0], expected.bfloat16())


def test_the_gradient_of_a_wider_gate_keeps_its_digits(run):
    """It is made of y before the gate, which is not handed out and need not be rounded as y is."""
    case = Case("gate", 1, 70, 2, 16, n=16, skip=1, gate=True)
    tensors = case.tensors(torch.float16) | {"z": case.tensors()["z"]}
    check(run, lambda **t: scan(case.options)(**t)[0], lambda **t: exact(case.options)(**t)[0], tensors, ("z",))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation of torch returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.size = max(self.size, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


def test_the_reference_writes_out_nothing_larger_than_its_scores():
    """Not each position's share of the state, which is p x n numbers of every head."""
    tensors = Case("several chunks", 1, 64, 4, 16, n=32).tensors()
    with Largest() as largest:
        mamba_chunk_scan_combined(**tensors, chunk_size=16, backend="reference")
    assert largest.size == 64 * 4 * 16  # x's
