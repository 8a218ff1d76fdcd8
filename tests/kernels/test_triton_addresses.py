"""Addresses beyond 2^31 elements: on a GPU with the memory for it, and interpreted over memory that is not there.

The interpreter's kernels compute the true addresses. Tensors are views into sparse files whose rows lie more than 2^31
elements apart, so an offset that wraps in 32 bits leaves the tensor, which is noticed before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from common import assert_within_budget, device_of, double, placing, running, same_bits, skip_if_not_offered
from torch import Tensor

from omnimamba_kernels import (
    backends,
    causal_conv1d_fn,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    rmsnorm_fn,
    selective_state_update,
)
from omnimamba_kernels.triton_launch import interpreting

FAR = 2**31 + 2**20
interpreted = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: set TRITON_INTERPRET=1")


@contextmanager
def guarded() -> Iterator[None]:
    """Within the block interpreted kernels may touch their arguments' memory only, and no storage is copied."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, start = builder.create_masked_load, builder.create_masked_store, executor.__call__
    ranges: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        active = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)]
        known = np.zeros(active.shape, bool)
        for first, last in ranges:
            known |= (active >= first) & (active < last)
        assert known.all(), "a kernel left its tensors: an address wrapped"

    def checked_load(self, pointers, mask, *rest, **named):
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self, pointers, value, mask, *rest, **named):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def checked_start(self, *args, **named):
        ranges[:] = [
            (a.untyped_storage().data_ptr(), a.untyped_storage().data_ptr() + a.untyped_storage().nbytes())
            for a in args
            if isinstance(a, Tensor)
        ]
        return start(self, *args, **named)

    with (
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
        mock.patch.object(executor, "__call__", checked_start),
        mock.patch.object(executor, "_restore_args_dev", lambda *_: None),
    ):
        yield


def spread(t: Tensor, folder: Path) -> Tensor:
    """t with its first dimension's rows more than 2^31 elements apart, in a file with holes."""
    strides = (FAR, *t.contiguous().stride()[1:])
    size = (t.shape[0] - 1) * FAR + t[0].numel()
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    far = torch.from_file(str(path), shared=True, size=size, dtype=t.dtype).as_strided(t.shape, strides)
    return far.copy_(t)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


B, L, H, P, G, N, W = 2, 20, 2, 16, 1, 16, 4
DIM, CHANNELS = H * P, H * P + 2 * G * N
CALLS = {
    "rmsnorm_fn": (lambda **t: rmsnorm_fn(**t, bias=None), lambda: dict(x=normal(B, L, DIM), z=normal(B, L, DIM)),
                   lambda: dict(weight=torch.rand(DIM))),
    "causal_conv1d_fn": (lambda x, **t: causal_conv1d_fn(x.transpose(1, 2), **t, activation="silu"),
                         lambda: dict(x=normal(B, L, DIM)), lambda: dict(weight=torch.rand(DIM, W))),
    "mamba_chunk_scan_combined": (
        lambda **t: mamba_chunk_scan_combined(**t, chunk_size=16, dt_softplus=True),
        lambda: dict(x=normal(B, L, H, P), dt=normal(B, L, H), B=normal(B, L, G, N), C=normal(B, L, G, N),
                     z=normal(B, L, H, P), initial_states=torch.randn(B, H, P, N)),
        lambda: dict(A=-torch.rand(H))),
    "selective_state_update": (
        lambda **t: (selective_state_update(**t, dt_softplus=True), t["state"]),
        lambda: dict(state=torch.randn(B, H, P, N), x=normal(B, H, P), dt=normal(B, H, P), B=normal(B, G, N),
                     C=normal(B, G, N)),
        lambda: dict(A=-torch.rand(H, P, N))),
    "lora_linear": (lambda **t: lora_linear(**t, task=1), lambda: dict(x=normal(B, 32), weight=normal(19, 32)),
                    lambda: dict(lora_A=normal(2, 3, 32), lora_B=normal(2, 19, 3))),
    "lora_linear of int8 weights": (
        lora_linear, lambda: dict(x=normal(B, 70), weight=torch.randint(-128, 128, (19, 70), dtype=torch.int8),
                                  weight_scale=torch.rand(19, 2).half()), dict),
    "mamba_mixer_step": (
        lambda **t: (mamba_mixer_step(**t, headdim=P, ngroups=G), t["conv_state"], t["ssm_state"]),
        lambda: dict(zxbcdt=normal(B, DIM + CHANNELS + H), conv_state=normal(B, CHANNELS, W - 1),
                     ssm_state=torch.randn(B, H, P, N)),
        lambda: dict(conv1d_weight=torch.rand(CHANNELS, W), conv1d_bias=None, dt_bias=torch.rand(H),
                     A=-torch.rand(H), D=torch.rand(H))),
}  # fmt: skip


def outputs(function: Any, tensors: dict[str, Tensor | None], wanted: tuple[str, ...]) -> list[Tensor]:
    """What the call returns, and for functions with gradients those of ``wanted``."""
    leaves = {k: t.detach().requires_grad_() if k in wanted else t for k, t in tensors.items()}
    found = function(**leaves)
    if isinstance(found, tuple):
        return [t.detach().clone() for t in found]
    upstream = torch.linspace(-1, 1, found.numel()).view(found.shape).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, [leaves[k] for k in wanted], upstream)]


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_triton_reads_and_writes_rows_far_apart(name, tmp_path):
    torch.use_deterministic_algorithms(False)  # whose filling of new memory would write the holes
    function, batched, shared = CALLS[name]
    near, constants = batched(), shared()
    far = {k: spread(t, tmp_path) for k, t in near.items()}
    learned = tuple(k for k, t in near.items() if t.is_floating_point() and k != "weight_scale")
    wanted = () if name in ("selective_state_update", "mamba_mixer_step") else learned
    try:
        with running("triton"), guarded():
            got = outputs(function, far | constants, wanted)
            want = outputs(function, {k: t.clone() for k, t in near.items()} | constants, wanted)
    except RuntimeError as error:
        skip_if_not_offered(error)
        raise
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(got, want, strict=True))


@interpreted
def test_triton_writes_rows_beyond_two_to_the_31():
    """Only the last program runs; what it writes is what the last rows alone give."""
    from triton.runtime import interpreter

    torch.use_deterministic_algorithms(False)
    d, rows, last = 32_768, 2**16 + 8, 4
    try:
        x = torch.empty(rows, d, dtype=torch.float16)  # 4 GiB of which a few pages are touched
        x[-last:] = torch.randn(last, d).half()
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    weight, builder, executor = torch.ones(d), interpreter.interpreter_builder, interpreter.GridExecutor
    move, resize = builder.set_grid_idx, builder.set_grid_dim

    def last_program(self, *args, **named):
        (programs,), self.grid = self.grid, (1,)
        with (
            mock.patch.object(builder, "set_grid_dim", lambda *_: resize(programs, 1, 1)),
            mock.patch.object(builder, "set_grid_idx", lambda x, y, z: move(x + programs - 1, y, z)),
        ):
            return guarded_start(self, *args, **named)

    with running("triton"), guarded():
        want = rmsnorm_fn(x[-last:], weight, None)
        guarded_start = executor.__call__
        with mock.patch.object(executor, "__call__", last_program):
            y = rmsnorm_fn(x, weight, None)
    assert y.numel() > 2**31 and same_bits(y[-last:], want)


GPU = [name for name in ("triton", "cuda") if backends()[name] is None and device_of(name).type == "cuda"]


@pytest.mark.skipif(not GPU, reason="no GPU whose kernels could be asked")
@pytest.mark.parametrize("gpu", GPU)
@pytest.mark.parametrize("name", ["rmsnorm_fn", "causal_conv1d_fn", "mamba_chunk_scan_combined"])
def test_more_than_two_to_the_31_elements(gpu, name):
    """The last row of so large a batch is that row alone."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("less than 48 GiB of GPU memory are free")
    torch.use_deterministic_algorithms(False)
    function, _, _ = CALLS[name]
    l, h, p, n = 2048, 64, 64, 16
    rows = 2**31 // (l * h * p) + 1
    with placing(device_of(gpu)), running(gpu), torch.no_grad():
        on = {"device": device_of(gpu), "dtype": torch.bfloat16}
        x = torch.randn(rows, l, h, p, **on) if name.startswith("mamba") else torch.randn(rows, l, h * p, **on)
        small = [torch.randn(rows, l, 1, n, **on) for _ in range(2)]
        shared = {
            "rmsnorm_fn": dict(weight=torch.rand(h * p)),
            "causal_conv1d_fn": dict(weight=torch.rand(h * p, W)),
            "mamba_chunk_scan_combined": dict(A=-torch.rand(h)),
        }[name]
        batch = {"x": x}
        if name.startswith("mamba"):
            batch |= {"dt": torch.randn(rows, l, h, **on), "B": small[0], "C": small[1]}
        got = function(**batch, **shared)[-1:].cpu()
    assert x.numel() > 2**31
    alone = {k: t.cpu() for k, t in ({k: t[-1:] for k, t in batch.items()} | shared).items()}
    with placing(torch.device("cpu")), running("reference"), torch.no_grad():
        low, exact = function(**alone), function(**{k: double(t) for k, t in alone.items()})
    assert_within_budget("the last row", got, low, exact)
