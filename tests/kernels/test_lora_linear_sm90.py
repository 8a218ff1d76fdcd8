"""The matrix product of lora_linear for Hopper (csrc/lora_linear/cuda_sm90.cu), emulated: tiles, layouts, adapters."""

from __future__ import annotations

import emulated
import pytest
import torch
from common import check, placing, running, same_bits
from test_lora_linear import layer, oracle

from omnimamba_kernels import lora_linear
from omnimamba_kernels.lora_linear.cases import LARGE, SMALL, Case, inputs
from omnimamba_kernels.lora_linear.reference import dropout_mask

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = [("k", "k"), ("k", "n"), ("m", "n")]


@pytest.fixture(autouse=True)
def _emulated():
    with running("cuda-emulated90"), placing(torch.device("cpu")):
        yield
    emulated.configure()


def whole(make, *shape):
    """Small whole numbers: sums of their products are exact in every order."""
    return torch.randint(-4, 5, shape, generator=make)


def in_memory(matrix, along_rows):
    """The matrix with that dimension contiguous, in rows of whole packs behind NaN: no copy may read beyond its end."""
    matrix = matrix if along_rows else matrix.t()
    rows, width = matrix.shape
    memory = torch.full((rows, -(-width // 8) * 8 + 8), float("nan"), dtype=matrix.dtype)
    memory[:, :width] = matrix
    return memory[:, :width] if along_rows else memory[:, :width].t()


def product(m, n, k, layout=LAYOUTS[0], dtype=BF16, out=F32, ranks=(0, 0), up=BF16, bias=False, chip=0):
    """c = a b + bias + low up by the kernel, and what it should be; ``chip``: its multiprocessors."""
    make = torch.Generator().manual_seed(m + n + k)
    a, b = whole(make, m, k).to(dtype), whole(make, k, n).to(dtype)
    given = {"a": in_memory(a, layout[0] == "k"), "b": in_memory(b, layout[1] == "n"),
             "c": torch.full((m, n), float("nan"), dtype=out)}  # fmt: skip
    want, (tasks, rank) = a.float() @ b.float(), ranks
    if tasks:
        given |= {"low": whole(make, m, tasks * rank).float(), "up": whole(make, tasks, rank, n).to(up)}
        want = want + given["low"] @ given["up"].float().flatten(0, 1)
    if bias:
        given["bias"] = whole(make, n).to(dtype)
        want = want + given["bias"].float()
    sizes = {"m": m, "n": n, "k": k, "tasks": tasks, "rank": rank, "multiprocessors": chip}
    emulated.module().kernels["lora_matmul"](**given, **sizes)
    return given["c"], want.to(out)


def hopper():
    """Whether the last kernel was Hopper's own."""
    return emulated.latest() == "matmul_sm90_kernel"


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 1),  # nearly nothing
        (64, 64, 64),  # one warpgroup, narrow
        (129, 65, 72),  # one row of the second block, one column too many for a narrow tile
        (300, 320, 330),  # two pairs of tiles, a short last row and column of them; stages more than the ring
        (321, 328, 72),  # one row too many for a short row
        (256, 512, 128),  # whole tiles
    ],
    ids=str,
)
def test_products_are_exact_in_every_layout(shape, layout):
    c, want = product(*shape, layout)
    assert torch.equal(c, want) and hopper()


@pytest.mark.parametrize("n", [264, 266, 267], ids=["packs", "pairs", "single elements"])
@pytest.mark.parametrize("dtype, out", [(BF16, BF16), (F16, F16), (F16, F32)], ids=str)
def test_rows_of_any_type_and_length(n, dtype, out):
    c, want = product(70, n, 40, dtype=dtype, out=out, ranks=(2, 3), bias=True)
    assert torch.equal(c, want) and hopper()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 8), (3, 7), (2, 16), (5, 8), (1, 70)], ids=str)
@pytest.mark.parametrize("up", [BF16, F16, F32], ids=str)
def test_adapters_of_any_rank_and_type(ranks, up):
    """In one pass and in several, of one part of up and of two."""
    c, want = product(140, 330, 72, ranks=ranks, up=up)
    assert torch.equal(c, want) and hopper()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_threads_and_copies(seed):
    """Two clusters with several tiles each: stages and adapters go round their rings, across the ends of tiles."""
    emulated.configure(seed)
    c, want = product(300, 576, 200, LAYOUTS[seed % 3], ranks=(2, 8), chip=4)
    assert torch.equal(c, want) and hopper()


def test_the_blocks_of_a_cluster_start_and_end_in_any_order():
    for seed in range(16):
        emulated.configure(seed)
        c, want = product(129, 8, 8)
        assert torch.equal(c, want) and hopper()


def test_the_bits_depend_on_no_chip_and_no_order():
    tensors = inputs(Case((300,), 136, 576), BF16, BF16)
    want = None
    for seed, chip in enumerate((0, 2, 4, 6)):
        emulated.configure(seed)
        c = torch.empty(300, 576, dtype=BF16)
        b = tensors["weight"].T
        emulated.module().kernels["lora_matmul"](a=tensors["x"], b=b, c=c, m=300, n=576, k=136, multiprocessors=chip)
        want = c if want is None else want
        assert same_bits(c, want) and hopper()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_layer_and_its_gradients(dtype):
    """All three products are large enough for this kernel."""
    case = Case((136,), 264, 264, tasks=3, rank=12, bias=True)
    check("cuda-emulated90", layer, oracle, inputs(case, dtype, dtype), wanted=("x", "weight"))
    assert hopper()


@pytest.mark.parametrize("rank", [8, 20], ids=["one pass", "by the other kernel"])
def test_dropout_masks_the_adapters_part_alone(rank):
    tensors = inputs(Case((136,), 264, 72, rank=rank), BF16, BF16)
    keep = dropout_mask(*tensors["x"].shape, 0.3, 11, torch.device("cpu")).double() / 0.7
    check(
        "cuda-emulated90",
        lambda **t: lora_linear(**t, scale=1.5, dropout_p=0.3, dropout_seed=11),
        lambda **t: oracle(**t, keep=keep),
        tensors,
        wanted=("x",),
    )
    assert hopper() == (rank == 8)


def test_infinite_adapters_stay_infinite():
    """low in two parts: what is left of an infinite one is no NaN."""
    t = inputs(Case((400,), 8, 264, tasks=1, rank=1), BF16, BF16)
    t["x"][3, 0] = float("inf")
    t["lora_A"].fill_(1.0), t["weight"].fill_(1.0), t["lora_B"].fill_(1.0)
    assert (lora_linear(**(t | {"task": 0}))[3] == float("inf")).all() and hopper()


def odd_address(t):
    """The same rows one element further in memory."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    memory[1:] = t.reshape(-1)
    return memory[1:].view(t.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.float(), b.float()),
        lambda a, b: (a, b.half()),
        lambda a, b: (odd_address(a), b),
        lambda a, b: (a[:, :65].contiguous(), b[:65]),  # rows of 130 bytes
        lambda a, b: (a[:1].expand(300, -1), b),
    ],
    ids=["float32", "two types", "address", "stride", "overlapping rows"],
)
def test_other_kernels_take_what_bulk_copies_cannot(change):
    make = torch.Generator().manual_seed(0)
    a, b = change(whole(make, 300, 72).to(BF16), whole(make, 72, 264).to(BF16))
    c = torch.empty(300, 264)
    emulated.module().kernels["lora_matmul"](a=a, b=b, c=c, m=300, n=264, k=a.shape[1])
    assert torch.equal(c, a.float() @ b.float()) and not hopper()


def test_small_products_are_left_to_smaller_tiles():
    for chip, own in ((16, True), (132, False)):
        c, want = product(140, 264, 72, chip=chip)
        assert torch.equal(c, want) and hopper() == own


@pytest.mark.parametrize("rows, own", [(LARGE.lead[0], True), (SMALL[-1].lead[0], False)])
def test_what_a_whole_gpu_is_given_reaches_this_kernel(rows, own):
    """The shapes that test_lora_linear.py runs on a real one: an H200 has 132 multiprocessors."""
    c, want = product(rows, LARGE.out, LARGE.width, ranks=(LARGE.tasks, LARGE.rank), bias=True, chip=132)
    assert torch.equal(c, want) and hopper() == own


def test_other_chips_never_take_hoppers_kernel():
    with running("cuda-emulated"):
        c, want = product(300, 264, 72)
    assert torch.equal(c, want) and emulated.latest() == "matmul16_kernel"
