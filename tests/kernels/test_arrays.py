"""The compiled kernels on arrays of other libraries: whatever speaks DLPack is read and written where it lies."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import emulated
import numpy as np
import pytest
import torch
from common import same_bits

from omnimamba_kernels import cuda, native, rmsnorm_fn, use_backend

EPS = 1e-5


def on_emulator(kernel, **fields):
    with emulated.emulated():
        return cuda.call(kernel, torch.device("cpu"), **fields)


CALLS = [
    pytest.param("native", native.call, marks=pytest.mark.skipif(native.why_not() is not None, reason="not built")),
    pytest.param("cuda", on_emulator, marks=pytest.mark.skipif(emulated.why_not() is not None, reason="no emulator")),
]
on_both = pytest.mark.parametrize("backend, call", CALLS)


class Foreign:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, tensor, place=None):
        self.tensor, self.place = tensor, place

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.place or self.tensor.__dlpack_device__()


def norm(call, x, weight, y, rows, width):
    sizes = dict(outer=rows, inner=1, width=width, group_size=width)
    call("gated_norm_forward", x=x, weight=weight, y=y, eps=EPS, **sizes)


def expected(backend, x, weight):
    with use_backend(backend), emulated.emulated() if backend == "cuda" else use_backend(backend):
        return rmsnorm_fn(x, weight, None, eps=EPS)


@on_both
def test_numpy_arrays_and_slices_of_them(backend, call):
    wide = np.random.default_rng(0).standard_normal((6, 40), np.float32)
    x, weight = wide[::2, 3:36], np.linspace(0.5, 2, 33, dtype=np.float32)
    y = np.full((3, 33), np.nan, np.float32)
    norm(call, x, weight, y, *y.shape)
    assert same_bits(torch.from_numpy(y), expected(backend, torch.from_numpy(x), torch.from_numpy(weight)))


@on_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arrays_of_any_library_with_dlpack(backend, call, dtype):
    x, weight, y = torch.randn(3, 33).to(dtype), torch.rand(33), torch.full((3, 33), torch.nan, dtype=dtype)
    held = sys.getrefcount(y)
    norm(call, Foreign(x), weight, Foreign(y), *y.shape)  # torch's tensors and others in one call
    assert same_bits(y, expected(backend, x, weight))
    assert sys.getrefcount(y) == held, "the array is given back"


@on_both
def test_what_is_no_array_is_refused_and_the_next_call_runs(backend, call):
    x, weight, y = (np.ones(shape, np.float32) for shape in ((2, 8), 8, (2, 8)))
    with pytest.raises(TypeError, match="kernels take torch tensors and arrays with __dlpack__, not list"):
        norm(call, x, [1.0] * 8, y, 2, 8)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        norm(call, x.astype(np.float64), weight, y, 2, 8)
    with pytest.raises(ValueError, match="truth value"):
        call("gated_norm_forward", x=x, weight=weight, y=y, group_size=8, norm_before_gate=np.ones(2))
    norm(call, x, weight, y, *y.shape)
    assert same_bits(torch.from_numpy(y), expected(backend, torch.from_numpy(x), torch.from_numpy(weight)))


@pytest.mark.skipif(native.why_not() is not None, reason="not built")
def test_a_program_keeps_the_arrays_that_it_works_on():
    x, weight, y = np.full((2, 8), 3, np.float32), np.ones(8, np.float32), np.zeros((2, 8), np.float32)
    recording = native.Recording()
    held = sys.getrefcount(y)
    with recording.on():
        norm(native.call, x, weight, y, 2, 8)
    assert sys.getrefcount(y) > held and not y.any()
    recording.run()
    assert same_bits(torch.from_numpy(y), expected("native", torch.from_numpy(x), torch.from_numpy(weight)))


@pytest.mark.skipif(emulated.why_not() is not None, reason="no emulator")
@pytest.mark.parametrize("array", [torch.ones(8, device="meta"), Foreign(torch.ones(8), (2, 1))], ids=["torch", "any"])
def test_an_array_that_lies_elsewhere_is_named(array):
    """Read by a kernel, the memory of another device would end the process."""
    x, y = torch.ones(2, 8), torch.empty(2, 8)
    with pytest.raises(ValueError, match=r"_forward: weight: got an array on (meta|cuda:1), expected one on cpu"):
        norm(on_emulator, x, array, y, 2, 8)


@pytest.mark.parametrize("place, there", [((2, 1), True), ((2, 0), False), ((1, 0), False), ((13, 0), True)])
def test_a_device_without_a_number_is_the_current_one(place, there, monkeypatch):
    """13: managed memory, which lies wherever it is read."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with nullcontext() if there else pytest.raises(ValueError, match="expected one on cuda:1"):
        cuda._check_places("k", torch.device("cuda"), {"x": Foreign(None, place), "rows": 2})


def test_a_call_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: "there is no GPU")
    with pytest.raises(RuntimeError, match="norm: the CUDA kernels cannot run: there is no GPU"):
        cuda.call("norm", torch.device("cuda", 0))
