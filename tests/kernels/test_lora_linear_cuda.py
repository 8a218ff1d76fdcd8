"""The CUDA kernels of lora_linear where they differ from the others: tiles, layouts, numbers of rows and of ranks."""

from __future__ import annotations

import emulated
import pytest
import torch
from common import check, placing, running, same_bits
from test_lora_linear import FLOATS, layer, oracle
from test_lora_linear_int8 import FLOATS as BUT_WEIGHTS
from test_lora_linear_int8 import int8_inputs
from test_lora_linear_int8 import oracle as int8_oracle

from omnimamba_kernels import dequantize_int8, lora_linear
from omnimamba_kernels.lora_linear.cases import Case, inputs

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
SHORT = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulated():
    with running("cuda-emulated"), placing(torch.device("cpu")):
        yield
    emulated.configure()


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((30,), 72, 40, rank=8),  # one more tile of ranks, two and four of rows
        Case((64,), 296, 40, rank=8, bias=True),
        Case((3,), 64, 24, tasks=3, rank=7),  # too many ranks for one launch
        Case((66,), 64, 24, tasks=5, rank=8),  # two blocks of ranks
        Case((70,), 64, 24, tasks=1, rank=1),
    ],
    ids=str,
)
def test_rows_of_whole_packs(case, dtype):
    check("cuda-emulated", layer, oracle, inputs(case, dtype, dtype), wanted=FLOATS)


@pytest.mark.parametrize("case", [Case((8,), 40, 8456, tasks=1, rank=2), Case((9,), 40, 8456, tasks=0)], ids=str)
def test_wide_blocks(case):
    check("cuda-emulated", layer, oracle, inputs(case, torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("case", [Case((5,), 64, 40, rank=8), Case((70,), 64, 40, rank=8)], ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.float16], ids=str)
def test_adapters_of_another_type(case, adapters):
    tensors = inputs(case, torch.bfloat16, torch.bfloat16)
    tensors |= {key: tensors[key].to(adapters) for key in ("lora_A", "lora_B")}
    check("cuda-emulated", layer, oracle, tensors, wanted=FLOATS)


INT8 = [
    Case((3,), 1104, 40, tasks=0, bias=True),  # 18 groups go round eight warps, the last has 16
    Case((12,), 272, 24, rank=8),
    Case((30,), 64, 40, tasks=1, rank=3, bias=True),
    Case((64,), 208, 24, rank=8),
    Case((3,), 64, 24, tasks=3, rank=7),  # too many ranks for one launch
    Case((3,), 72, 24),  # packs of x, none of the weights
]


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("case", INT8, ids=str)
def test_int8_weights_in_packs(case, dtype):
    check("cuda-emulated", layer, int8_oracle, int8_inputs(case, dtype), wanted=BUT_WEIGHTS)
    emulated.started()
    layer(**int8_inputs(case, dtype))
    assert any("few_rows_int8_kernel" in name for name in emulated.started()) == (case.width % 16 == 0)


def test_wide_blocks_of_int8_weights():
    check("cuda-emulated", layer, int8_oracle, int8_inputs(Case((8,), 80, 8456, tasks=1, rank=2), torch.bfloat16))


def test_no_order_of_threads_changes_a_bit_of_int8_products():
    tensors = int8_inputs(Case((20,), 720, 40, rank=8), torch.bfloat16)
    want = layer(**tensors)
    for seed in range(3):
        emulated.configure(seed)
        assert same_bits(layer(**tensors), want)


@pytest.mark.parametrize("rows", [3, 12, 30])
def test_a_row_beside_int8_weights_is_the_same_among_any_others(rows):
    t = int8_inputs(Case((64,), 80, 40, rank=8), torch.bfloat16)
    some = t | {"x": t["x"][:rows], "task": t["task"][:rows]}
    assert same_bits(layer(**some), layer(**t)[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
@pytest.mark.parametrize("width", [144, 130])
def test_dense_weights(width, dtype):
    """Every int8 there is, rounded once, to the last bit and no further."""
    weight = (torch.arange(6 * width) % 256 - 128).to(torch.int8).view(6, width)
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    frame = torch.full((8, width), 7.0, dtype=dtype)
    given = {"dense": frame[1:7], "weight": weight, "weight_scale": scale, "out": 6, "in": width}
    emulated.module().kernels["int8_weight_dequantize"](**given)
    assert same_bits(frame[1:7], dequantize_int8(weight, scale).to(dtype))
    assert (frame[0] == 7).all() and (frame[7] == 7).all()


def product(m, n, k, a_along, b_along, dtype=torch.bfloat16):
    """c = a b of small whole numbers, exact in every order; which dimension of a and b is contiguous."""
    make = torch.Generator().manual_seed(m + n + k)
    a = torch.randint(-4, 5, (m, k), generator=make).to(dtype)
    b = torch.randint(-4, 5, (k, n), generator=make).to(dtype)
    a = a if a_along == "k" else a.t().contiguous().t()
    b = b if b_along == "n" else b.t().contiguous().t()
    c = torch.empty(m, n, dtype=torch.float32)
    emulated.module().kernels["lora_matmul"](a=a, b=b, c=c, m=m, n=n, k=k)
    return c, a.float() @ b.float()


LAYOUTS = [("k", "k"), ("k", "n"), ("m", "n"), ("m", "k")]


@pytest.mark.parametrize("a_along, b_along", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(8, 8, 8), (72, 136, 200), (130, 8264, 24)], ids=["one", "small tiles", "large tiles"]
)
def test_products_are_exact_in_every_layout(shape, a_along, b_along):
    if shape[0] % 8 and a_along == "m":
        shape = (136, *shape[1:])
    c, want = product(*shape, a_along, b_along)
    assert torch.equal(c, want)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("early", [False, True])
def test_any_order_of_threads_and_copies(seed, early):
    """Seven stages of the depth go round a ring of four, with copies that land at once or as late as they may."""
    emulated.configure(seed, early)
    for along in LAYOUTS[:3]:
        c, want = product(64, 64, 224, *along)
        assert torch.equal(c, want)


@pytest.mark.parametrize("case", [Case((20,), 264, 40, rank=8), Case((70,), 96, 40, rank=8)], ids=str)
def test_no_order_of_threads_changes_a_bit(case):
    tensors = inputs(case, torch.bfloat16, torch.bfloat16)
    want = layer(**tensors)
    for seed in range(3):
        emulated.configure(seed)
        assert same_bits(layer(**tensors), want)


@pytest.mark.parametrize("out", [40, 41], ids=["packs", "no packs"])
@pytest.mark.parametrize("rows", [3, 17, 64])
def test_a_row_is_the_same_among_any_others(out, rows):
    t = inputs(Case((64,), 72, out, rank=8), torch.bfloat16, torch.bfloat16)
    some = t | {"x": t["x"][:rows], "task": t["task"][:rows]}
    assert same_bits(layer(**some), layer(**t)[:rows])


def test_infinite_adapters_stay_infinite():
    """low in two parts: what is left of an infinite one is no NaN."""
    t = inputs(Case((65,), 8, 8, tasks=1, rank=1), torch.bfloat16, torch.bfloat16)
    t["x"][3, 0] = float("inf")
    t["lora_A"].fill_(1.0), t["weight"].fill_(1.0), t["lora_B"].fill_(1.0)
    assert (lora_linear(**(t | {"task": 0}))[3] == float("inf")).all()


def test_the_rows_of_a_gradient_are_cut_into_no_more_parts_than_a_grid_has():
    v, gradient = torch.empty(1, 8), torch.empty(2, 4, 8)
    sizes = dict(v=v, gradient=gradient, width=8, tasks=2, rank=4)
    floats = emulated.module().kernels["lora_outer_workspace"]
    a_part = floats(rows=1, **sizes)
    assert floats(rows=2**28, **sizes) == 65535 * a_part > floats(rows=2**20, **sizes) > a_part
