"""What surrounds a call must not change its result: default dtype and device, inference mode, threads, forward mode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from common import here, same_bits
from torch import Tensor
from torch.autograd import forward_ad

from omnimamba_kernels import (
    causal_conv1d_fn,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    native,
    rmsnorm_fn,
    selective_state_update,
    use_backend,
)
from omnimamba_kernels.ssd_scan.native_impl import _cut_evenly

H, P, G, N, W = 2, 4, 1, 16, 4
DIM, CHANNELS = H * P, H * P + 2 * G * N


def inputs(l: int = 70) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = dict(
        x=(1, l, H, P), dt=(1, l, H), A=(H,), B=(1, l, G, N), row=(2, DIM + CHANNELS + H), filter=(CHANNELS, W),
        weight=(9, DIM), down=(2, 3, DIM), up=(2, 9, 3), many=(60, DIM),
    )  # fmt: skip
    made = {k: torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for k, s in shapes.items()}
    return {k: t.to(here()) for k, t in made.items()}


def scan(t: dict[str, Tensor]) -> Tensor:
    return mamba_chunk_scan_combined(t["x"], t["dt"], -t["A"].abs(), t["B"], t["B"], 16, dt_softplus=True)


def packed_scan(t: dict[str, Tensor]) -> Tensor:
    ids = torch.tensor([[0] * 30 + [-1] * 5 + [1] * (t["x"].shape[1] - 35)], dtype=torch.int32, device=t["x"].device)
    return mamba_chunk_scan_combined(t["x"], t["dt"], -t["A"].abs(), t["B"], t["B"], 16, seq_idx=ids, dt_softplus=True)


def convolve(t: dict[str, Tensor]) -> Tensor:
    return causal_conv1d_fn(t["x"].flatten(2).transpose(1, 2), t["filter"][:DIM], activation="silu")


def norm(t: dict[str, Tensor]) -> Tensor:
    return rmsnorm_fn(t["x"].flatten(2), t["weight"][0], None)


def few_rows(t: dict[str, Tensor]) -> Tensor:
    return lora_linear(t["many"][:2], t["weight"], t["down"], t["up"], scale=2.0, task=1)


def many_rows(t: dict[str, Tensor]) -> Tensor:
    return lora_linear(t["many"], t["weight"], t["down"], t["up"], scale=2.0, task=1, dropout_p=0.5, dropout_seed=1)


def mixer_step(t: dict[str, Tensor]) -> Tensor:
    states = t["row"].new_zeros(2, CHANNELS, W), t["row"].new_zeros(2, H, P, N)
    return mamba_mixer_step(t["row"], *states, t["filter"], None, t["A"], -t["A"].abs(), t["A"], headdim=P)


CALLS = [scan, packed_scan, convolve, norm, few_rows, many_rows, mixer_step]
every_call = pytest.mark.parametrize("function", CALLS, ids=[f.__name__ for f in CALLS])


@cache
def undisturbed(run: str, function: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
    return with_gradients(function)


def with_gradients(function: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
    t = {k: v.requires_grad_() for k, v in inputs().items()}
    y = function(t)
    if y.requires_grad:
        y.sum().backward()
    return [y.detach(), *(v.grad for v in t.values() if v.grad is not None)]


@every_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype(run, function, dtype):
    want = undisturbed(run, function)
    torch.set_default_dtype(dtype)
    try:
        got = with_gradients(function)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@every_call
def test_default_device(run, function):
    if run == "reference":
        pytest.skip("plain PyTorch follows the default device")
    want = undisturbed(run, function)
    _cut_evenly.cache_clear()
    with torch.device("meta"):
        got = with_gradients(function)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@every_call
def test_training_after_inference_of_the_same_shape(run, function):
    with torch.inference_mode():
        function(inputs(83))
    t = {k: v.requires_grad_() for k, v in inputs(83).items()}
    function(t).sum()


@pytest.mark.parametrize("function", [scan, norm, convolve, few_rows], ids=lambda f: f.__name__)
def test_forward_mode_is_refused_not_dropped(run, function):
    if run == "reference":
        pytest.skip("plain PyTorch has forward-mode derivatives")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        function({k: forward_ad.make_dual(v, torch.ones_like(v)) for k, v in inputs().items()})


def test_negated_views_are_read_with_their_sign():
    x = torch.conj(torch.randn(2, 3, 4, dtype=torch.complex64)).imag
    assert x.is_neg()
    state, A, B = torch.randn(2, 3, 4, 5), -torch.rand(3, 4, 5), torch.randn(2, 1, 5)
    with use_backend("reference"):  # what is chosen for a negated view
        want = selective_state_update(state.clone(), x.resolve_neg(), x.resolve_neg(), A, B, B, dt_softplus=True)
    got = selective_state_update(state.clone(), x, x, A, B, B, dt_softplus=True)
    assert same_bits(got, want)
    if native.why_not() is None:
        with use_backend("native"), pytest.raises(RuntimeError, match="negated view"):
            selective_state_update(state, x, x, A, B, B)


@pytest.mark.skipif(native.why_not() is not None, reason="no native kernels")
def test_backward_runs_on_the_instruction_set_of_its_forward():
    names = [name for name, why in native.instruction_sets().items() if why is None]
    t = inputs()
    for first in names:
        x = t["x"].clone().requires_grad_()
        with native.use_instruction_set(first):
            scan({**t, "x": x}).sum().backward()
        want = x.grad
        for second in names:
            x = t["x"].clone().requires_grad_()
            with native.use_instruction_set(first):
                y = scan({**t, "x": x})
            with native.use_instruction_set(second):
                y.sum().backward()
            assert same_bits(x.grad, want), (first, second)


@pytest.mark.skipif(native.why_not() is not None, reason="no native kernels")
def test_threads_choose_their_own_instruction_sets():
    names = [name for name, why in native.instruction_sets().items() if why is None]
    t, want, wrong = inputs(), {}, []
    for name in names:
        with native.use_instruction_set(name):
            want[name] = scan(t)

    def work(name: str) -> None:
        for _ in range(30):
            with native.use_instruction_set(name):
                if not same_bits(scan(t), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_task_ids_do_not_wrap(run):
    if here().type != "cpu":
        pytest.skip("values are not read back from a GPU")
    t = inputs()
    with pytest.raises(ValueError, match="task: got values"):
        lora_linear(t["many"][:1], t["weight"], t["down"], t["up"], task=torch.tensor([2**32]))


def test_a_gate_of_another_type_is_not_rounded(run):
    x, weight = torch.randn(6, 32).bfloat16(), torch.randn(32)
    z = torch.randn(6, 32)
    want = rmsnorm_fn(x.double(), weight.double(), None, z.double(), backend="reference")
    got = rmsnorm_fn(x, weight, None, z)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all()
