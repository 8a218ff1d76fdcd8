"""Memory of large results: large pages, used again when no tensor lies in it and never before, bounded."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from omnimamba_kernels import capture, causal_conv1d_fn, large_pages, native, rmsnorm_fn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory itself on Linux only")
COUNT = 4 * large_pages.LARGE // 4
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    large_pages.release()
    yield
    large_pages.release()


def in_large_pages(address: int) -> int:
    """Bytes in large pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    return 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return native.empty(shape, dtype)


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no large pages")
def test_large_results_lie_in_large_pages():
    t = empty(COUNT).fill_(1.0)
    assert in_large_pages(t.data_ptr() + t.nbytes // 2) >= t.nbytes // 2  # all, but where memory is in pieces


def test_the_last_part_of_a_page_takes_no_large_one():
    t = empty(COUNT + 100).fill_(1.0)
    assert in_large_pages(t.data_ptr() + t.nbytes - 1) == 0


def test_small_results_are_the_c_librarys():
    t = empty(large_pages.LARGE // 4 - 1)
    t.resize_(COUNT)  # memory of this module could not grow
    del t
    assert not large_pages._idle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_shape_and_dtype_are_as_asked(dtype):
    t = empty(2, 3, large_pages.LARGE, dtype=dtype)
    assert (t.shape, t.dtype, t.is_contiguous(), t._is_view()) == ((2, 3, large_pages.LARGE), dtype, True, False)
    t[-1, -1, -1] = 3  # the last element is there
    with torch.device("meta"):
        assert empty(COUNT).device.type == "cpu"


def test_it_begins_with_a_large_page_wherever_the_system_maps_it(monkeypatch):
    """Whole large pages Linux may map at the bounds of them by itself; a little more it does not."""
    mapped = large_pages._Memory
    monkeypatch.setattr(large_pages, "_Memory", lambda fd, size, flags: mapped(fd, size + 4096, flags))
    tensors = [empty(COUNT) for _ in range(3)]
    assert all(t.data_ptr() % large_pages.PAGE == 0 for t in tensors)


def test_memory_is_lent_again_only_when_no_tensor_lies_in_it():
    first = empty(COUNT)
    address, part = first.data_ptr(), first[5:7]
    part.fill_(7.0)
    del first
    second = empty(COUNT).fill_(1.0)
    assert second.data_ptr() != address and part.tolist() == [7.0, 7.0]
    lent = len(large_pages._lent)
    del part
    assert len(large_pages._lent) == lent - 1
    third = empty(COUNT)
    assert third.data_ptr() == address
    half = empty(COUNT)
    assert len({t.data_ptr() for t in (second, third, half)}) == 3


def test_memory_much_too_large_is_not_lent():
    wide = empty(3 * COUNT)
    address = wide.data_ptr()
    del wide
    assert empty(5 * COUNT // 2).data_ptr() != address
    assert empty(14 * COUNT // 5).data_ptr() == address


def test_what_is_kept_is_bounded():
    enough = large_pages.KEPT // (4 * COUNT) + 3
    tensors = [empty(COUNT) for _ in range(enough)]
    addresses = {t.data_ptr() for t in tensors}
    while tensors:
        del tensors[0]
        assert sum(map(len, large_pages._idle)) <= large_pages.KEPT
    one = len(large_pages._idle[0])
    assert sum(map(len, large_pages._idle)) > large_pages.KEPT - one, "as many are kept as may be"
    assert empty(COUNT).data_ptr() in addresses
    del one
    large_pages.release()
    assert not large_pages._idle


def test_what_could_not_be_kept_alone_leaves_the_others():
    small, wide = empty(COUNT), empty(large_pages.KEPT // 4 + 1)
    del small
    del wide
    assert len(large_pages._idle) == 1


def test_where_no_memory_is_left_what_is_kept_goes_back_and_torch_is_asked(monkeypatch):
    first = empty(COUNT)
    del first

    def none_left(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(large_pages, "_Memory", none_left)
    t = empty(3 * COUNT).fill_(1.0)
    assert t.numel() == 3 * COUNT and not large_pages._idle


def test_it_is_filled_where_torch_fills_its_own():
    torch.use_deterministic_algorithms(True)
    try:
        assert empty(COUNT).isnan().all()
        assert (empty(4 * COUNT, dtype=torch.int8) == 127).all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(native.why_not() is not None, reason="nothing was compiled")
def test_results_of_a_kernel_are_apart_and_may_be_changed_in_place():
    x = torch.randn(1, COUNT // 64, 64).transpose(1, 2).requires_grad_()
    weight = torch.randn(64, 2)
    first = causal_conv1d_fn(x, weight, activation="silu", backend="native")
    second = causal_conv1d_fn(x, weight, activation="silu", backend="native")
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    kept = first.detach()[0, :, -1].clone()
    second.mul_(0.0)
    (gradient,) = torch.autograd.grad(first.sum() + second.sum(), x)
    assert torch.equal(first[0, :, -1], kept) and gradient.isfinite().all()


@pytest.mark.skipif(native.why_not() is not None, reason="nothing was compiled")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiler_traces_large_results_without_memory(dynamic):
    torch._dynamo.reset()
    x, weight = torch.randn(1, 1024, COUNT // 1024), torch.randn(1024, 2)
    compiled = torch.compile(
        lambda x: causal_conv1d_fn(x, weight, activation="silu", backend="native"),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    assert torch.equal(compiled(x), causal_conv1d_fn(x, weight, activation="silu", backend="native"))


@pytest.mark.skipif(native.why_not() is not None, reason="nothing was compiled")
def test_large_results_can_be_recorded():
    x, weight = torch.randn(COUNT // 1024, 1024), torch.randn(1024)
    replay = capture(lambda x: rmsnorm_fn(x, weight, None, backend="native"), x)
    assert torch.equal(replay(x), rmsnorm_fn(x, weight, None, backend="native"))
    assert not large_pages._idle or len(large_pages._idle) == 1  # the last call's alone: a recording keeps its own
