"""lora_linear: against a row-by-row oracle; routing, dropout; independence of memory, threads and neighbours."""

from __future__ import annotations

import pytest
import torch
from common import (
    DTYPES,
    THREAD_COUNTS,
    WITHOUT_AMX,
    assert_within_budget,
    check,
    device_of,
    evaluate,
    framed,
    hostile_memory,
    running,
    runs,
    same_bits,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

from omnimamba_kernels import lora_linear, native
from omnimamba_kernels.lora_linear.cases import LARGE, SMALL, Case, inputs
from omnimamba_kernels.lora_linear.native_impl import TILED_ROWS
from omnimamba_kernels.lora_linear.reference import dropout_mask

RUNS = [*runs("lora_linear"), *[f"native-avx512{WITHOUT_AMX}"] * (native.why_not() is None and native.has_amx())]
SCALE = 1.5
FLOATS = ("x", "weight", "lora_A", "lora_B", "bias")
MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + MIXED
FEW, MANY = Case((5,), 45, 33, tasks=3, rank=3, bias=True), Case((71,), 45, 33, tasks=3, rank=3, bias=True)


def layer(**tensors):
    return lora_linear(**tensors, scale=SCALE)


def oracle(x, weight, lora_A, lora_B, bias, task, keep=None):
    """One row at a time; ``unused`` gives adapters that no row uses their zero gradient."""
    rows = x.reshape(-1, x.shape[-1])
    tasks = [-1] * len(rows) if task is None else task.flatten().tolist()
    unused = 0 if lora_A is None else 0 * (lora_A.sum() + lora_B.sum())
    out = []
    for i, t in enumerate(tasks):
        y = weight.mv(rows[i]) + unused
        if bias is not None:
            y = y + bias
        if t >= 0:
            u = rows[i] if keep is None else rows[i] * keep[i]
            y = y + SCALE * lora_B[t].mv(lora_A[t].mv(u))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def name(pair):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_forward_and_gradients(run, case, pair):
    check(run, layer, oracle, inputs(case, *pair), wanted=FLOATS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_enough_rows_for_a_whole_gpu(run, dtype):
    """The emulator shows in test_lora_linear_sm90.py that such a product is left to Hopper's own kernel."""
    if device_of(run).type != "cuda":
        pytest.skip("a real GPU alone chooses its kernels by its size")
    check(run, layer, oracle, inputs(LARGE, dtype, dtype), wanted=FLOATS)


@pytest.mark.parametrize("pair", PAIRS[:4], ids=name)
def test_dropout_forward_and_gradients(run, pair):
    """The oracle gets the mask as a constant, so the gradients show that the backward used the same one."""
    tensors = inputs(MANY, *pair)
    keep = dropout_mask(*tensors["x"].shape, 0.3, 11, torch.device("cpu")).double() / 0.7
    check(
        run,
        lambda **t: lora_linear(**t, scale=SCALE, dropout_p=0.3, dropout_seed=11),
        lambda **t: oracle(**t, keep=keep),
        tensors,
        wanted=FLOATS,
    )


def observed_mask(rows, width, p, seed):
    """Which inputs pass, and what they are multiplied by, seen from outside."""
    eye = torch.eye(width)[None]
    return lora_linear(
        torch.ones(rows, width), torch.zeros(width, width), eye, eye, dropout_p=p, dropout_seed=seed, task=0
    )


def hashed(counter, seed):
    """The documented hash in plain integers."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    return mix(counter % 2**32 ^ mix(counter >> 32 ^ mix(seed % 2**32)))


@pytest.mark.parametrize("seed", [0, 5, 2**31 + 7, 2**40 + 1, -3])
def test_dropout_mask_is_the_documented_hash(run, seed):
    mask = observed_mask(7, 13, 0.4, seed)
    want = torch.tensor([hashed(i, seed) >= int(0.4 * 2**32) for i in range(7 * 13)]).view(7, 13)
    assert torch.equal(mask != 0, want)
    exact = torch.full((int(want.sum()),), 1 / 0.6, dtype=torch.float64)
    assert_within_budget("kept", mask[want], exact.float(), exact)


def test_dropout_statistics(run):
    rows, width, p = 256, 64, 0.25
    kept = torch.stack([observed_mask(rows, width, p, seed) != 0 for seed in range(8)]).double()
    spread = (p * (1 - p)) ** 0.5  # the bounds are five standard deviations of chance, not of rounding
    assert abs(kept.mean() - (1 - p)) < 5 * spread / kept.numel() ** 0.5
    for axes in ((0, 1), (0, 2), (1, 2)):  # no column, row or seed is favoured
        part = kept.mean(axes)
        assert (part - (1 - p)).abs().max() < 5 * spread / (kept.numel() / part.numel()) ** 0.5
    centred = kept - kept.mean()
    for a, b in ((kept[0], kept[1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])):
        correlation = ((a - kept.mean()) * (b - kept.mean())).mean() / centred.square().mean()
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_no_dropout_without_an_adapter(run):
    t = inputs(FEW, torch.float32, torch.float32)
    base = lora_linear(t["x"], t["weight"])
    assert same_bits(
        lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], task=-1, dropout_p=0.5, dropout_seed=1), base
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_tasks_equal_each_alone(run, dtype):
    """Few rows: to the last bit, whatever the neighbours and their number. Matrix registers take bf16 weights, and
    TILED_ROWS rows and more: there a row has that many beside it, all of its task."""
    if run == "reference":
        pytest.skip("torch's own products promise less")
    t = inputs(FEW, dtype, dtype)
    together = layer(**t)
    tiled = run == "native-avx512" and dtype == torch.bfloat16 and native.may_use_amx()
    rows = TILED_ROWS if tiled else 1
    for i, task in enumerate(t["task"].tolist()):
        first = min(i, len(together) - rows)
        alone = layer(**(t | {"x": t["x"][first : first + rows], "task": task}))
        assert same_bits(alone[i - first], together[i])


@pytest.mark.parametrize("case", [FEW, MANY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0, 2], ids=["one value", "every other"])
def test_a_bias_of_any_stride(run, case, dtype, step):
    t = inputs(case, torch.float32, dtype)
    wide = t["bias"].repeat_interleave(2) if step else t["bias"][:1]
    bias = wide.as_strided(t["bias"].shape, (step,))
    check(run, layer, oracle, t | {"bias": bias})


@pytest.mark.parametrize("case", [FEW, MANY], ids=str)
def test_task_minus_one_is_the_base(run, case):
    t = inputs(case, torch.float32, torch.float32)
    base = lora_linear(t["x"], t["weight"], bias=t["bias"])
    assert same_bits(layer(**(t | {"task": -1})), base)
    own = t["task"] < 0
    assert own.any() and not own.all()
    mixed = layer(**t)
    assert same_bits(mixed[own], base[own])
    assert not torch.isclose(mixed[~own], base[~own]).all(-1).any()  # apart by more than any rounding


def test_task_of_one_adapter_may_be_left_out(run):
    t = inputs(Case((3,), 10, 12, tasks=1), torch.float32, torch.float32)
    assert same_bits(layer(**(t | {"task": None})), layer(**(t | {"task": 0})))
    assert same_bits(layer(**(t | {"task": torch.zeros(3, dtype=torch.int32)})), layer(**(t | {"task": 0})))


@given(data=st.data())
def test_any_strides(run, data):
    """Every operand transposed, sliced out of a wider row or every other element of one; canaries stay."""
    case = Case((data.draw(st.sampled_from([1, 3, 51])),), 35, 21, tasks=2, rank=3, bias=True)
    dtype, weight_dtype = data.draw(st.sampled_from(PAIRS))
    plain = inputs(case, dtype, weight_dtype)
    frames = {}
    for key, value in plain.items():
        if data.draw(st.booleans(), label=f"{key} every other"):
            value = value.repeat_interleave(2, -1)[..., ::2]
        order = data.draw(st.permutations(range(value.dim())))
        frames[key] = framed(value, tuple(order))
        if data.draw(st.booleans(), label=f"{key} plain"):
            frames[key].tensor = value
    check(run, layer, oracle, {k: f.tensor for k, f in frames.items()}, wanted=FLOATS)
    assert all(f.intact() for f in frames.values())


@pytest.mark.parametrize("case", [*SMALL, Case((3000,), 2, 1, tasks=2, rank=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_every_run_and_thread_count(run, case, dtype):
    """torch's own products, and so the reference, keep their bits only at one thread count."""
    tensors = inputs(case, torch.float32, dtype)
    results = []
    for count in (1, 1) if run == "reference" else THREAD_COUNTS:
        with threads(count):
            results.append(evaluate(layer, tensors, FLOATS))
    for result in results[1:]:
        assert all(same_bits(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)], ids=str)
def test_empty(run, lead):
    t = inputs(Case(lead, 8, 5), torch.float32, torch.float32)
    got = evaluate(layer, t, ("x", "weight", "lora_A", "lora_B"))
    assert got["out 0"].shape == (*lead, 5)
    assert all((got[f"grad {key}"] == 0).all() for key in ("weight", "lora_A", "lora_B"))


def test_one_vector(run):
    t = inputs(Case((1,), 8, 5), torch.float32, torch.float32)
    assert same_bits(layer(**(t | {"x": t["x"][0], "task": 1})), layer(**(t | {"task": 1}))[0])


@pytest.mark.parametrize("case", [FEW, MANY], ids=str)
def test_inputs_stay_and_outputs_are_new(run, case):
    t = inputs(case, torch.float32, torch.float32)
    before = {k: v.clone() for k, v in t.items()}
    got = evaluate(layer, t, FLOATS)
    assert all(same_bits(t[k], before[k]) for k in t)
    owned = {v.untyped_storage().data_ptr() for v in t.values()}
    assert not owned & {v.untyped_storage().data_ptr() for v in got.values()}


def test_gradient_of_what_is_asked_only(run):
    t = inputs(MANY, torch.float32, torch.float32)
    whole = evaluate(layer, t, FLOATS)
    for key in FLOATS:
        assert same_bits(evaluate(layer, t, (key,))[f"grad {key}"], whole[f"grad {key}"])


def test_hostile_memory_is_hostile():
    with hostile_memory():
        assert torch.empty(3).isnan().all()


def wrong(**changes):
    return {"x": torch.randn(2, 8), "weight": torch.randn(5, 8), "lora_A": torch.randn(2, 3, 8),
            "lora_B": torch.randn(2, 5, 3), "task": 0} | changes  # fmt: skip


ERRORS = [
    ("x", ValueError, wrong(x=torch.randn(2, 9))),
    ("x", ValueError, wrong(x=torch.tensor(1.0))),
    ("x", TypeError, wrong(x=[1.0])),
    ("x", TypeError, wrong(x=torch.ones(2, 8, dtype=torch.int32))),
    ("weight", ValueError, wrong(weight=torch.randn(5, 8, 1))),
    ("weight", TypeError, wrong(weight=torch.ones(5, 8, dtype=torch.int8))),
    ("lora_A", ValueError, wrong(lora_A=torch.randn(2, 3, 7))),
    ("lora_A", ValueError, wrong(lora_A=torch.randn(3, 8))),
    ("lora_B", ValueError, wrong(lora_B=torch.randn(2, 5, 4))),
    ("lora_B", ValueError, wrong(lora_B=torch.randn(1, 5, 3))),
    ("lora_B", ValueError, wrong(lora_B=None)),
    ("bias", ValueError, wrong(bias=torch.randn(4))),
    ("task", ValueError, wrong(task=2)),
    ("task", ValueError, wrong(task=-2)),
    ("task", ValueError, wrong(task=None)),
    ("task", ValueError, wrong(task=torch.zeros(3, dtype=torch.int32))),
    ("task", ValueError, wrong(task=torch.tensor([0, 2]))),
    ("task", ValueError, wrong(task=torch.tensor([0, -2]))),
    ("task", ValueError, wrong(lora_A=None, lora_B=None, task=torch.tensor([0, -1]))),
    ("task", TypeError, wrong(task=torch.zeros(2))),
    ("dropout_p", ValueError, wrong(dropout_p=1.0, dropout_seed=1)),
    ("dropout_p", ValueError, wrong(dropout_p=float("nan"), dropout_seed=1)),
    ("dropout_seed", ValueError, wrong(dropout_p=0.5)),
    ("weight", ValueError, wrong(weight=torch.randn(5, 8, device="meta"))),
]


@pytest.mark.parametrize(
    ("argument", "error", "arguments"), ERRORS, ids=[f"{a}-{i}" for i, (a, *_) in enumerate(ERRORS)]
)
def test_errors_name_the_argument(run, argument, error, arguments):
    with pytest.raises(error, match=argument):
        lora_linear(**arguments)


def test_float64_is_refused_by_name_on_native():
    x, weight = torch.randn(2, 3).double(), torch.randn(4, 3).double()
    with running("native"), pytest.raises(RuntimeError, match="float64"):
        lora_linear(x, weight)
    assert lora_linear(x, weight).dtype == torch.float64
