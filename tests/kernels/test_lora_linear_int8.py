"""lora_linear with int8 weights: what they stand for, against a row-by-row oracle; and how they are made."""

from __future__ import annotations

import pytest
import torch
from common import DTYPES, WITHOUT_VNNI, check, evaluate, framed, hostile_memory, runs, same_bits, threads

from omnimamba_kernels import CannotCapture, capture, dequantize_int8, lora_linear, native, quantize_int8
from omnimamba_kernels.lora_linear import cases
from omnimamba_kernels.lora_linear.cases import Case
from omnimamba_kernels.triton_launch import interpreting

RUNS = [*runs("lora_linear_int8"), *[f"native-avx512{WITHOUT_VNNI}"] * (native.why_not() is None and native.has_vnni())]
SCALE = 1.5
SCALES = torch.float16 if interpreting() else torch.bfloat16  # which Triton's interpreter does not compute
FLOATS = ("x", "lora_A", "lora_B", "bias")
CASES = (
    Case((1,), 1, 1, tasks=1, rank=1, bias=True),
    Case((2, 3), 37, 23, tasks=3, rank=5, bias=True),
    Case((4,), 64, 40, rank=4),
    Case((3,), 191, 65, tasks=0, bias=True),
    Case((5, 11), 300, 61, tasks=3, rank=3, bias=True),
    Case((70,), 144, 72, bias=True),
    Case((3,), 1100, 9, rank=2),
)
"""Widths below, at and between multiples of a group of 64, and above 16 of them; few and many rows; whole packs."""


def int8_inputs(case: Case, dtype=torch.float32, scale_dtype=SCALES) -> dict:
    return cases.int8_inputs(case, dtype, scale_dtype)


def layer(**tensors):
    return lora_linear(**tensors, scale=SCALE)


def oracle(x, weight, weight_scale, lora_A, lora_B, bias, task):
    dense = torch.stack([weight[:, k] * weight_scale[:, k // 64] for k in range(weight.shape[1])], dim=1)
    unused = 0 if lora_A is None else 0 * (lora_A.sum() + lora_B.sum())
    rows, out = x.reshape(-1, x.shape[-1]), []
    for i, row in enumerate(rows):
        y = dense.mv(row) + unused
        y = y if bias is None else y + bias
        t = -1 if task is None else int(task.flatten()[i])
        out.append(y if t < 0 else y + SCALE * lora_B[t].mv(lora_A[t].mv(row)))
    return torch.stack(out).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(run, case, dtype):
    check(run, layer, oracle, int8_inputs(case, dtype), wanted=FLOATS)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
def test_scales_of_any_type_and_strides(run, scale_dtype):
    """Weights and scales as views with canaries, every other element of a wider row, transposed."""
    t = int8_inputs(CASES[1], scale_dtype=scale_dtype)
    for order in ((0, 1), (1, 0)):
        frames = {k: framed(t[k], order) for k in ("weight_scale",)}
        wide = torch.full((*t["weight"].shape, 2), 77, dtype=torch.int8)
        wide[..., 0] = t["weight"]
        views = {k: f.tensor for k, f in frames.items()} | {"weight": wide[..., 0]}
        for times in (1, 9, 12):
            rows = {"x": t["x"].repeat(times, 1, 1), "task": t["task"].repeat(times, 1)}
            check(run, layer, oracle, t | rows | views, wanted=FLOATS)
        assert all(f.intact() for f in frames.values())


def test_without_vnni_weights_meet_floats():
    """In whole numbers of 30 bits an activation loses what is below 2^-30 of its neighbour; in floats nothing."""
    if native.why_not() is not None or not native.has_vnni():
        pytest.skip("this processor has no AVX-512 VNNI")
    x, weight = torch.tensor([[1.0, 2.0**-40]]), torch.tensor([[0, 1]], dtype=torch.int8)
    with native.use_instruction_set("avx512"):
        call = lambda: lora_linear(x, weight, weight_scale=torch.ones(1, 1), backend="native").item()  # noqa: E731
        integers = call()
        with native.without_vnni():
            floats = call()
    assert (integers, floats) == (0.0, 2.0**-40)


def test_a_scale_a_row(run):
    t = int8_inputs(CASES[4])
    t["weight_scale"] = t["weight_scale"][:, :1].expand(-1, 5)
    check(run, layer, oracle, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_round_no_weight(run, dtype):
    """Whole numbers times 129 / 128, which 16 bits of bfloat16 could not hold: exact until the result is rounded."""
    make = torch.Generator().manual_seed(5)
    x = torch.randint(-4, 5, (5, 160), generator=make)
    weight = torch.randint(-128, 128, (24, 160), generator=make)
    y = lora_linear(x.to(dtype), weight.to(torch.int8), weight_scale=torch.full((24, 3), 129 / 128).to(SCALES))
    assert same_bits(y.cpu(), (x.cpu() @ weight.cpu().T * (129 / 128)).to(dtype))


@pytest.mark.parametrize(("rows", "width", "out"), [(0, 70, 5), (3, 0, 5), (3, 70, 0), (90, 0, 5), (90, 70, 0)])
def test_nothing_of_one_size(run, rows, width, out):
    x = torch.ones(rows, width, requires_grad=True)
    bias = torch.arange(out, dtype=torch.float32)
    scale = torch.ones(out, -(-width // 64))
    y = lora_linear(x, torch.ones(out, width, dtype=torch.int8), bias=bias, weight_scale=scale)
    assert same_bits(y.detach(), (x.detach() @ torch.ones(width, out) + bias))
    assert same_bits(torch.autograd.grad(y.sum(), x)[0], torch.full((rows, width), float(out)))


def test_rows_alone_and_thread_counts_give_the_same_bits(run):
    t = int8_inputs(Case((5,), 200, 131, tasks=2))
    together = evaluate(layer, t)["out 0"]
    if run != "reference":
        for i, task in enumerate(t["task"].tolist()):
            assert same_bits(layer(**(t | {"x": t["x"][i : i + 1], "task": task}))[0], together[i])
    for count in (2, 3) if run != "reference" else ():
        with threads(count):
            assert same_bits(layer(**t), together)


def test_activations_within_a_fraction_of_their_largest_neighbour(run):
    """One weight a row, so that an output is one activation: within 2^-30 of its group's largest, and roundings."""
    make = torch.Generator().manual_seed(4)
    x = torch.randn(2, 150, generator=make) * torch.logspace(-9, 9, 150)[torch.randperm(150, generator=make)]
    weight = 127 * torch.eye(150, dtype=torch.int8)
    weight[::2] *= -1
    y = lora_linear(x, weight, weight_scale=torch.full((150, 3), 2.0**-7))
    largest = torch.stack([group.abs().amax(-1) for group in x.split(64, -1)], -1).repeat_interleave(64, -1)[:, :150]
    exact = x.double() * weight.diag().double() / 128
    assert ((y.double() - exact).abs() <= 2.0**-30 * largest + 2.0**-22 * exact.abs()).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-15, 1e34], ids=str)
def test_rows_of_any_size(run, size):
    """Each by itself under the budget, and beside others with the same bits."""
    t = int8_inputs(Case((7,), 200, 20, tasks=0))
    t["x"][2] *= size
    t["x"][5, 64:] *= size
    for row in (t["x"][2:3], t["x"][5:6]):
        check(run, layer, oracle, t | {"x": row})
    if run != "reference":
        together = layer(**t)
        assert all(same_bits(layer(**(t | {"x": t["x"][i : i + 1]}))[0], together[i]) for i in range(7))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_stays_so(run, bad):
    t = int8_inputs(Case((6,), 130, 20, tasks=0))
    clean = layer(**t)
    t["x"][1, 70], t["x"][4, 129] = bad, bad
    got, expected = layer(**t), layer(**t, backend="reference")
    assert not torch.isfinite(expected[[1, 4]]).any()
    assert torch.equal(got.nan_to_num(1, 2, 3)[[1, 4]], expected.nan_to_num(1, 2, 3)[[1, 4]])
    if run != "reference":
        assert same_bits(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_replayed_with_the_same_bits(run):
    t = int8_inputs(Case((2,), 130, 40, tasks=0))
    weights = {k: t[k] for k in ("weight", "weight_scale")}
    if not run.startswith("native"):
        with pytest.raises(CannotCapture):
            capture(lambda x: lora_linear(x, **weights), t["x"])
        return
    for x in (t["x"], t["x"].repeat(40, 1)):
        assert same_bits(capture(lambda x: lora_linear(x, **weights), x)(x), lora_linear(x, **weights))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 1), (2, 64), (7, 200)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_quantized_within_half_a_scale(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[:1], weight[1:2] = weight[:1] * (1e-3 if dtype is torch.float16 else 1e-30), 0
    with hostile_memory():
        q, scale = quantize_int8(weight)
    assert q.shape == shape and q.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert scale.shape == (shape[0], -(-shape[1] // 64)) and (scale > 0).all() and (q != -128).all()
    each = scale.double().repeat_interleave(64, -1)[:, : shape[1]]
    assert ((dequantize_int8(q, scale, torch.float64) - weight.double()).abs() <= 0.5001 * each).all()
    assert (q[:, :1].abs() > 0).any() or not weight.numel()


def test_quantized_again_is_the_same():
    q, scale = quantize_int8(torch.randn(8, 130, generator=torch.Generator().manual_seed(1)))
    again, same = quantize_int8(dequantize_int8(q, scale))
    assert (again.int() - q.int()).abs().max() <= 1 and torch.allclose(same.float(), scale.float(), rtol=0.01)


def wrong(**changes):
    return {"x": torch.randn(2, 65), "weight": torch.zeros(5, 65, dtype=torch.int8),
            "weight_scale": torch.ones(5, 2)} | changes  # fmt: skip


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, wrong(weight_scale=None)),
        (TypeError, wrong(weight=torch.zeros(5, 65))),
        (TypeError, wrong(weight=torch.zeros(5, 65, dtype=torch.uint8))),
        (TypeError, wrong(weight_scale=torch.ones(5, 2, dtype=torch.int32))),
        (ValueError, wrong(weight_scale=torch.ones(5, 1))),
        (ValueError, wrong(weight_scale=torch.ones(2, 5))),
        (ValueError, wrong(weight_scale=torch.ones(5, 2, device="meta"))),
    ],
)
def test_errors_name_the_argument(error, arguments):
    with pytest.raises(error, match="weight"):
        lora_linear(**arguments)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2).int(), torch.tensor([[1.0, torch.inf]])], ids=str)
def test_quantize_refuses(bad):
    with pytest.raises((TypeError, ValueError), match="weight"):
        quantize_int8(bad)
