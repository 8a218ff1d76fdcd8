"""lora_linear in matrix registers: edges of tiles, panels, slices and blocks; numbers in pieces; who may use them."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from common import assert_within_budget, check, evaluate, running, same_bits, threads

from omnimamba_kernels import lora_linear, native
from omnimamba_kernels.lora_linear.cases import Case, inputs
from omnimamba_kernels.lora_linear.native_impl import BLOCK_ROWS, CHUNK, TILED_ROWS, _matmul

if native.why_not() is not None or not native.has_amx():
    pytest.skip("this processor has no matrix registers, or the system gives none", allow_module_level=True)

RUNS = ["native-avx512"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")
FLOATS = ("x", "weight", "lora_A", "lora_B", "bias")


def oracle(x, weight, lora_A, lora_B, bias, task):
    y = x @ weight.T if bias is None else x @ weight.T + bias
    if lora_A is None:
        return y
    low = torch.einsum("trk,ik->itr", lora_A, x)
    own = torch.nn.functional.one_hot(task + 1, len(lora_A) + 1)[:, 1:].to(x)
    return y + torch.einsum("itr,tor,it->io", low, lora_B, own)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("rows", [3, 4, 5, 6, 8, 9, 10, 11, 15, 16, 17, 20, 21, 33, 64, 65])
def test_rows_around_whole_tiles(run, rows, dtype):
    """Widths and outputs below, at and above whole tiles, odd ones among them."""
    for width, out in ((31, 1), (32, 16), (33, 31), (95, 33)):
        case = Case((rows,), width, out, tasks=2, rank=3, bias=True)
        check(run, lora_linear, oracle, inputs(case, dtype, BF16))


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, BF16), (F32, BF16), (BF16, F16)], ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_products_of_more_than_a_block(run, pair, turned):
    """More rows than a block, columns than a chunk and k than two slices; operands with either side contiguous, and
    every other element of a wider one."""
    m, n, k = BLOCK_ROWS + 37, CHUNK + 41, 2 * 512 + 33
    make = torch.Generator().manual_seed(1)
    a, b = torch.randn(m, k, generator=make).to(pair[0]), (torch.randn(k, n, generator=make) / k**0.5).to(pair[1])
    start = torch.randn(1, n, generator=make)
    exact = start.double() + a.double() @ b.double()
    low = start + a.float() @ b.float()
    a, b = (t.T.contiguous().T if swap else t for t, swap in zip((a, b), turned, strict=True))
    whole = _matmul(a, b, start.expand(m, n))
    assert_within_budget("product", whole, low, exact)
    rounded = _matmul(a, b, start.expand(m, n), dtype=BF16)
    assert same_bits(rounded, whole.to(BF16))
    for count in (1, 3):
        with threads(count):
            assert same_bits(_matmul(a.repeat_interleave(2, 1)[:, ::2], b, start.expand(m, n)), whole)


@pytest.mark.parametrize("rows", [9, 70])
def test_gradients_of_bf16(run, rows):
    case = Case((rows,), 70, 130, tasks=3, rank=3, bias=True)
    check(run, lora_linear, oracle, inputs(case, BF16, BF16), wanted=FLOATS)


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_float32_loses_no_bit_in_pieces(run, rows, exponent):
    """A single product each: all 24 bits of x come through."""
    x = torch.randn(rows, 1) * 2.0**exponent
    weight = torch.tensor([[2.0], [-0.5], [1.0]], dtype=BF16)
    assert same_bits(lora_linear(x, weight), x @ weight.float().T)


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_infinity_and_nan_reach_what_they_should(run, rows, dtype):
    """An infinite weight times x above 0 is infinite, whatever of x is in lower pieces; and the same of x."""
    x, weight = torch.ones(rows, 40), torch.ones(20, 40)
    x[1, 3], x[2, 39], x[3, 5], x[4, 7] = INF, NAN, 0, torch.finfo(dtype).max
    weight[7, 3], weight[8, 5], weight[19, 39] = INF, -INF, NAN
    x, weight = x.to(dtype), weight.to(BF16)
    want = torch.stack([(row.double() * weight.double()).sum(-1) for row in x]).to(dtype)
    got = lora_linear(x, weight)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert got[0, 7] == INF and got[0, 8] == -INF and got[3, 8].isnan() and got[1, 0] == INF


def test_rows_have_the_same_bits_in_any_tile(run):
    for dtype in (BF16, F16, F32):
        t = inputs(Case((19,), 77, 45, tasks=2, rank=3, bias=True), dtype, BF16)
        together = lora_linear(**t)
        for i in range(12):
            part = slice(i, i + TILED_ROWS)
            assert same_bits(lora_linear(**(t | {"x": t["x"][part], "task": t["task"][part]})), together[part])


def test_it_is_another_way_than_that_of_floats(run):
    """Or nothing here was tested: sums in another order differ in a last bit."""
    for rows in (9, 100):
        t = inputs(Case((rows,), 2000, 64, tasks=0), F32, BF16)
        with native.without_amx():
            floats = evaluate(lora_linear, t, ("x",))
        tiles = evaluate(lora_linear, t, ("x",))
        assert not any(same_bits(tiles[name], floats[name]) for name in tiles)


def test_threads_and_forks_that_never_asked():
    t = inputs(Case((70,), 96, 64, tasks=0), BF16, BF16)
    with running("native-avx512"), threads(1):
        want, found = lora_linear(**t), []
        child = os.fork()
        if child == 0:
            os._exit(0 if same_bits(lora_linear(**t), want) else 1)
        assert os.waitpid(child, 0)[1] == 0

    def call():
        with running("native-avx512"):
            found.append(lora_linear(**t))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert same_bits(found[0], want)
