"""rmsnorm_fn: forward and gradients against float64, on hostile memory, at any strides and thread count."""

import pytest
import torch
from common import DTYPES, THREAD_COUNTS, check, evaluate, framed, same_bits, threads
from hypothesis import given
from hypothesis import strategies as st

from omnimamba_kernels import add_rmsnorm, rmsnorm_fn
from omnimamba_kernels.gated_norm.cases import CASES

GRADS = ("x", "weight", "bias", "z")


def oracle(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """Group by group, from the definition."""
    gate = 1 if z is None else z / (1 + torch.exp(-z))
    u = x if norm_before_gate else x * gate
    size = group_size or x.shape[-1]
    groups = [part / (part.pow(2).mean(-1, keepdim=True) + eps).sqrt() for part in u.split(size, -1)]
    y = torch.cat(groups, -1) * weight + (0 if bias is None else bias)
    return y * gate if norm_before_gate else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition(run, case, dtype):
    options = case.options
    check(run, lambda **t: rmsnorm_fn(**t, **options), lambda **t: oracle(**t, **options), case.tensors(dtype), GRADS)


@given(
    leading=st.lists(st.integers(0, 3), max_size=3), size=st.integers(3, 40), groups=st.integers(1, 3),
    step=st.integers(1, 2), gate=st.sampled_from([None, True, False]), bias=st.booleans(), swap=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(run, leading, size, groups, step, gate, bias, swap):
    d = size * groups
    g = torch.Generator().manual_seed(d)

    def rows():
        t = torch.randn(*leading, d * step, generator=g)[..., ::step]
        return t.transpose(0, -2).contiguous().transpose(0, -2) if swap and len(leading) > 1 else t

    tensors = {
        "x": rows(),
        "weight": torch.randn(d, 2, generator=g)[:, 1],
        "bias": torch.randn(d, generator=g) if bias else None,
        "z": None if gate is None else rows(),
    }
    options = {"group_size": size, "norm_before_gate": bool(gate)}
    if 0 in leading:
        got = evaluate(lambda **t: rmsnorm_fn(**t, **options), tensors, GRADS)
        assert got["out 0"].shape == (*leading, d) and not got["grad weight"].any()
        return
    check(run, lambda **t: rmsnorm_fn(**t, **options), lambda **t: oracle(**t, **options), tensors, GRADS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_stays_inside_its_memory(run, case):
    tensors = case.tensors()
    frames = {k: framed(t) for k, t in tensors.items() if t is not None}
    views = {k: frames[k].tensor if k in frames else None for k in tensors}
    check(run, lambda **t: rmsnorm_fn(**t, **case.options), lambda **t: oracle(**t, **case.options), views, GRADS)
    for name, frame in frames.items():
        assert frame.intact() and same_bits(frame.tensor, tensors[name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_at_every_run_thread_count_and_batch(run, case):
    if run == "reference":
        pytest.skip("torch's own kernels promise less")
    tensors = case.tensors()

    def at(count):
        with threads(count):
            return evaluate(lambda **t: rmsnorm_fn(**t, **case.options), tensors, GRADS)

    first, *others = map(at, THREAD_COUNTS)
    for other in others:
        assert all(same_bits(first[name], other[name]) for name in first)
    if len(case.shape) > 1:
        row = {k: t[-1:] if k in ("x", "z") and t is not None else t for k, t in tensors.items()}
        assert same_bits(rmsnorm_fn(**row, **case.options), first["out 0"][-1:])


def test_groups_of_one(run):
    """Each value over its own magnitude: the sign, and a gradient that cancels to almost nothing."""
    x = torch.cat([torch.tensor([-3.0, 0.5, 2.0]), torch.linspace(1e-3, 2e-3, 61)])[None]
    tensors = {"x": x, "weight": torch.ones(64), "bias": None}
    options = {"group_size": 1, "eps": 1e-12}
    check(run, lambda **t: rmsnorm_fn(**t, **options), lambda **t: oracle(**t, **options), tensors, ("x",))


@pytest.mark.parametrize("rows, group", [(1, 16), (9, 48), (5, 300)])
@pytest.mark.parametrize("before", [True, False])
def test_without_an_eps(run, rows, group, before):
    """No number of rows is a multiple of what a program has of them: those past the end have no magnitude."""
    tensors = {"x": torch.randn(rows, 2 * group), "weight": torch.randn(2 * group), "bias": torch.randn(2 * group)}
    tensors["z"] = torch.randn(rows, 2 * group)
    options = {"group_size": group, "eps": 0.0, "norm_before_gate": before}
    check(run, lambda **t: rmsnorm_fn(**t, **options), lambda **t: oracle(**t, **options), tensors, GRADS)


def test_gate_of_another_dtype(run):
    x, z, weight = torch.randn(4, 24), torch.randn(4, 24).bfloat16(), torch.randn(24).half()
    got = check(run, rmsnorm_fn, oracle, {"x": x, "weight": weight, "bias": None, "z": z}, GRADS)
    assert got["out 0"].dtype == torch.float32 and got["grad z"].dtype == torch.bfloat16


def test_expanded_gradient(run):
    """The gradient of a sum is one number, expanded."""

    def of_the_sum(function):
        def gradient(x, weight, bias):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x, weight, bias).sum(), x)[0]

        return gradient

    tensors = {"x": torch.randn(3, 5, 16), "weight": torch.randn(16), "bias": None}
    check(run, of_the_sum(rmsnorm_fn), of_the_sum(oracle), tensors)


@pytest.mark.parametrize("before", [True, False])
def test_zeros_tiny_and_huge_rows(run, before):
    x = torch.tensor([0.0, 1e-30, 1e15])[:, None].expand(3, 48).clone().requires_grad_()
    z = torch.tensor([-1e4, 0.0, 1e4]).repeat(16).expand(3, 48).clone().requires_grad_()
    y = rmsnorm_fn(x, torch.ones(48), None, z, norm_before_gate=before)
    assert torch.isfinite(y).all() and not y[0].any()
    grads = torch.autograd.grad(y.sum(), (x, z))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_output_aliases_nothing(run):
    x, z, weight = torch.randn(2, 16), torch.randn(2, 16), torch.randn(16)
    before = [t.clone() for t in (x, z, weight)]
    y = rmsnorm_fn(x, weight, None, z)
    assert len({t.untyped_storage().data_ptr() for t in (x, z, weight, y)}) == 4
    assert all(same_bits(a, b) for a, b in zip(before, (x, z, weight), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 37), (2, 3, 16), (2, 2, 3, 5)], ids=str)
def test_add_rmsnorm_adds_in_place_and_norms_the_sum(run, shape, dtype):
    g = torch.Generator().manual_seed(4)
    update, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(shape[-1], generator=g)
    tensors = {"residual": torch.randn(shape, generator=g).to(dtype), "update": update, "weight": weight}

    def both(residual, update, weight):
        residual = residual.clone()
        return add_rmsnorm(residual, update, weight, 1e-5), residual

    def exact(residual, update, weight):
        total = residual + update
        rounded = total.to(dtype).to(total.dtype)  # the residual's own rounding comes before the norm
        return oracle(rounded, weight, eps=1e-5), total

    check(run, both, exact, tensors)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_add_rmsnorm_at_any_stride(run, order):
    residual, update = torch.randn(3, 20), torch.randn(3, 20)
    frame, other = framed(residual, order), framed(update, order)
    y = add_rmsnorm(frame.tensor, other.tensor, torch.ones(20))
    assert frame.intact() and same_bits(frame.tensor, residual + update) and same_bits(other.tensor, update)
    assert same_bits(y, rmsnorm_fn(residual + update, torch.ones(20), None))


def test_add_rmsnorm_takes_an_update_of_another_dtype(run):
    residual, update = torch.randn(2, 9), torch.randn(2, 9).bfloat16()
    total = residual + update
    y = add_rmsnorm(residual, update, torch.ones(9))
    assert same_bits(residual, total) and y.dtype == torch.float32
    assert same_bits(y, rmsnorm_fn(total, torch.ones(9), None))


@pytest.mark.parametrize(
    "wrong, error, named",
    [
        ({"update": torch.randn(2, 8)}, ValueError, "update"),
        ({"weight": torch.randn(8)}, ValueError, "weight"),
        ({"update": torch.ones(2, 9, dtype=torch.int32)}, TypeError, "update"),
        ({"eps": -1.0}, ValueError, "eps"),
    ],
)
def test_add_rmsnorm_refuses_untouched(run, wrong, error, named):
    given = {"residual": torch.randn(2, 9), "update": torch.randn(2, 9), "weight": torch.randn(9)} | wrong
    before = given["residual"].clone()
    with pytest.raises(error, match=named):
        add_rmsnorm(**given)
    assert same_bits(given["residual"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_of_a_long_group_gives_no_gradient(run, dtype):
    """Of any length that a kernel keeps its sums of in registers, or does not."""
    tensors = {"x": torch.empty(0, 9001, dtype=dtype), "weight": torch.ones(9001), "bias": torch.ones(9001)}
    got = evaluate(rmsnorm_fn, tensors, ("x", "weight", "bias"))
    assert not got["grad weight"].any() and not got["grad bias"].any()
