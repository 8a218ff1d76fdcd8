"""The Triton kernels of lora_linear: how many launches, dropout and addresses beyond 32 bits, many ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import check, same_bits
from counting import Seen, counted
from test_lora_linear import FLOATS, hashed, layer, oracle
from test_lora_linear_int8 import int8_inputs

from omnimamba_kernels import lora_linear, use_backend
from omnimamba_kernels.cost import Cost
from omnimamba_kernels.lora_linear import cost
from omnimamba_kernels.lora_linear.cases import SMALL, Case, inputs
from omnimamba_kernels.triton_launch import INTERPRETER, TARGETS, interpreting, launch, recording

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from omnimamba_kernels.lora_linear.triton_parts import kept  # noqa: E402

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")


def launched(rows: int, tasks: int, needs: tuple[str, ...] = (), arch: str = "sm_90", **options: object) -> list[str]:
    """Names of the kernels that one call starts, and of those that its backward starts."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    t = {"x": empty(rows, 2048), "weight": empty(8512, 2048), "lora_A": empty(tasks, 8, 2048),
         "lora_B": empty(tasks, 8512, 8), "task": torch.empty(rows, dtype=torch.int32, device="meta")}  # fmt: skip
    if not tasks:
        t |= {"lora_A": None, "lora_B": None, "task": None}
    if options.pop("int8", False):
        t |= {"weight": t["weight"].to(torch.int8), "weight_scale": empty(8512, 32)}
    t |= {key: options.pop(key) for key in ("task",) if key in options}
    for key in needs:
        t[key].requires_grad_()
    with recording(TARGETS[arch]) as found, use_backend("triton"):
        y = lora_linear(**t, **options)
        if needs:
            del found[:]
            y.backward(torch.empty_like(y))
    return [each.kernel.__name__ for each in found]


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("tasks", [0, 2])
def test_few_rows_are_one_launch(rows, tasks):
    assert launched(rows, tasks) == ["few_rows_kernel"]


def test_int8_weights_of_few_rows_are_one_launch_and_of_many_one_more():
    assert launched(4, 2, int8=True) == ["few_rows_kernel"]
    assert launched(8192, 0, int8=True) == ["dequantize_kernel", "matmul_kernel"]
    assert launched(8192, 0, ("x",), int8=True) == ["dequantize_kernel", "matmul_kernel"]
    with_everything = launched(8192, 2, ("x", "lora_A", "lora_B"), int8=True)
    assert with_everything.count("matmul_kernel") == with_everything.count("dequantize_kernel") == 1


def test_many_rows_are_two_launches():
    assert launched(8192, 0) == ["matmul_kernel"]
    assert launched(65536, 2) == ["narrow_kernel", "matmul_kernel"]
    assert launched(65, 2) == ["narrow_kernel", "sum_kernel", "matmul_kernel"]


def test_backward_reads_dy_once_for_the_adapters():
    assert launched(8192, 2, ("lora_B",)) == ["low_backward_kernel", "sum_kernel"]
    assert launched(8192, 0, ("x",)) == ["matmul_kernel"]
    with_everything = launched(8192, 2, ("x", "weight", "lora_A", "lora_B"))
    assert with_everything.count("low_backward_kernel") == 1 and with_everything.count("matmul_kernel") == 2


@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_one_task_of_all_rows_is_a_number(rows):
    """The launches that a task for each row has, and memory for what they write: torch fills nothing."""
    everything = ("x", "weight", "lora_A", "lora_B")
    for one_task in (0, 1):
        with Seen() as seen:
            assert launched(rows, 2, task=one_task) == launched(rows, 2)
        assert seen.names <= {"empty", "empty_like", "new_empty"}, seen.names
        assert launched(rows, 2, everything, task=one_task) == launched(rows, 2, everything)


@interpreted
@pytest.mark.parametrize("case", [Case((4,), 40, 37, tasks=3, rank=4), Case((70,), 40, 37, tasks=3, rank=7),
                                  Case((4,), 40, 37, tasks=3, rank=30)], ids=str)  # fmt: skip
@pytest.mark.parametrize("one_task", [0, 2])
def test_one_task_of_all_rows_has_the_bits_of_a_tensor(case, one_task):
    found = []
    for task in (one_task, torch.full(case.lead, one_task)):
        leaves = {k: t if k == "bias" else t.requires_grad_() for k, t in inputs(case, *[torch.float32] * 2).items()
                  if k != "task"}  # fmt: skip
        with use_backend("triton"):
            y = lora_linear(**leaves, task=task, scale=2.0, dropout_p=0.2, dropout_seed=3)
            y.square().sum().backward()
        found.append([y, *(leaves[k].grad for k in ("x", "weight", "lora_A", "lora_B"))])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert not found[0][3][1].any() and found[0][3][one_task].any()  # only its adapter has a gradient


@interpreted
@pytest.mark.parametrize("case", [Case((4,), 40, 37, tasks=3, rank=30), Case((70,), 40, 37, tasks=3, rank=7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_ranks_than_one_block(case, dtype):
    check("triton", layer, oracle, inputs(case, dtype, dtype), wanted=FLOATS)


@triton.jit
def mask_kernel(out, first_row, first_column, width, seed, threshold, BIG: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    row, column = first_row + i.to(tl.int64)[:, None], first_column + i.to(tl.int64)[None, :]
    keeps = kept(row, column, width, seed, threshold, BIG)
    tl.store(out + i[:, None] * N + i[None, :], keeps.to(tl.int32))


@interpreted
@pytest.mark.parametrize("row, column, width", [(0, 0, 37), (2**31, 5, 3), (2**20 - 2, 4000, 4099), (2**40, 0, 2**20)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7, 2**32 - 3])
def test_dropout_of_positions_beyond_32_bits(row, column, width, seed):
    out = torch.empty(4, 4, dtype=torch.int32)
    threshold, signed = int(0.6 * 2**32), lambda n: (n + 2**31) % 2**32 - 2**31
    launch(mask_kernel, (1,), out, row, column, width, signed(seed), signed(threshold), BIG=row > 0, N=4)
    want = [[hashed((row + i) * width + column + j, seed) >= threshold for j in range(4)] for i in range(4)]
    assert out.bool().tolist() == want


@interpreted
@pytest.mark.parametrize("rows", [2, 65], ids=["few", "many"])
@pytest.mark.parametrize("flip", [False, True], ids=["rows apart", "columns apart"])
def test_operands_wider_than_32_bits(rows, flip):
    """x over more than 2^31 elements of address space, of which only its own are ever touched."""
    case = Case((rows,), 33, 21, tasks=2, rank=3)
    plain = inputs(case, torch.float16, torch.float16)
    step = 2**31 // ((33 if flip else rows) - 1) + 8
    space = torch.from_numpy(np.empty(2**31 + 2**20, dtype=np.float16))
    x = space.as_strided((rows, 33), (1, step) if flip else (step, 1)).copy_(plain["x"])
    assert x.stride(int(flip)) * (x.shape[int(flip)] - 1) >= 2**31
    check("triton", layer, lambda **t: oracle(**t), plain | {"x": x}, wanted=FLOATS)


COUNTED = (*SMALL, Case((4,), 40, 37, tasks=3, rank=30), Case((130,), 70, 37, tasks=3, rank=7, bias=True))


def count(t: dict, **options: object) -> None:
    """Holds the cost model to what the interpreter counts, and to its own floor."""
    by_row = t["task"].flatten().int() if isinstance(t["task"], torch.Tensor) else None
    flat = t | {"x": t["x"].reshape(-1, t["x"].shape[-1]), "task": by_row}
    leaves = {k: v.requires_grad_() if v is not None and k in FLOATS and v.is_floating_point() else v
              for k, v in t.items()}  # fmt: skip
    with use_backend("triton"), counted() as forward:
        y = lora_linear(**leaves, **options)
    assert forward == cost.forward(**flat, **options, save=True, target=INTERPRETER)
    floor = cost.forward_floor(**flat)
    moved = sum(forward.values(), Cost())
    assert moved.loaded >= floor.loaded and moved.stored >= floor.stored and moved.flops >= floor.flops
    with use_backend("triton"), counted() as backward:
        y.backward(torch.ones_like(y))
    assert backward == cost.backward(**flat, target=INTERPRETER)
    floor = cost.backward_floor(**flat)
    moved = sum(backward.values(), Cost())
    assert moved.loaded >= floor.loaded and moved.stored >= floor.stored and moved.flops >= floor.flops


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("pair", [(torch.float32, torch.float32), (torch.float16, torch.float16),
                                  (torch.float32, torch.float16)], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    ("case", "one_task"), [*((c, False) for c in COUNTED), (SMALL[2], True), (COUNTED[-1], True)], ids=str
)
def test_the_cost_model_counts_what_moves(case, pair, dropout_p, one_task):
    t = inputs(case, *pair)
    t |= {"task": case.tasks - 1} if one_task else {}
    count(t, dropout_p=dropout_p, dropout_seed=3)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SMALL[2], Case((4,), 150, 37, rank=4), Case((70,), 150, 37, bias=True)], ids=str)
def test_the_cost_model_counts_int8_weights(case, dtype):
    count(int8_inputs(case, dtype))
