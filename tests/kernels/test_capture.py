"""capture: replayed kernels give the bits of the calls they were recorded from, and nothing else is let in."""

from __future__ import annotations

import gc

import pytest
import torch
from common import same_bits, threads
from torch import Tensor

from omnimamba_kernels import CannotCapture, add_rmsnorm, capture, lora_linear, mamba_mixer_step, rmsnorm_fn
from omnimamba_kernels.mamba_mixer.cases import SMALL, weights

CASE = SMALL[3]
WIDTH, STATES = 29, ("conv_state", "ssm_state")


class Layer:
    """Norm, projection with adapters, decode step, projection back, residual: weights and states by name."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        make = torch.Generator().manual_seed(1)
        columns = 2 * CASE.extra + CASE.dim + CASE.channels + CASE.h
        shapes = {
            "norm": (WIDTH,), "into": (columns, WIDTH), "down": (2, 3, WIDTH), "up": (2, columns, 3),
            "back": (WIDTH, CASE.extra + CASE.dim), "conv_state": (CASE.b, CASE.channels, CASE.w - 1),
            "ssm_state": (CASE.b, CASE.h, CASE.p, CASE.n),
        }  # fmt: skip
        draw = {name: 0.3 * torch.randn(shape, generator=make) for name, shape in shapes.items()}
        self.own = {k: v.to(dtype) if k in ("into", "down", "up", "back") else v for k, v in draw.items()}
        self.mixer = {k: v.float() for k, v in weights(CASE, torch.float32).items()}

    def __call__(self, residual: Tensor) -> Tensor:
        t = self.own
        row = rmsnorm_fn(residual, t["norm"], None)
        row = lora_linear(row, t["into"], t["down"], t["up"], scale=2.0, task=1)
        states = {name: t[name] for name in STATES}
        row = mamba_mixer_step(row, **states, **self.mixer, headdim=CASE.p, ngroups=CASE.g)
        return add_rmsnorm(residual, lora_linear(row, t["back"]), t["norm"])


def tokens(count: int) -> list[Tensor]:
    return list(torch.randn(count, CASE.b, WIDTH, generator=torch.Generator().manual_seed(2)))


def native_only(run: str) -> None:
    if not run.startswith("native"):
        pytest.skip("only native kernels are recorded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_replays_give_the_bits_of_the_calls(run, dtype, mode):
    native_only(run)
    with mode():
        plain, recorded = Layer(dtype), Layer(dtype)
        replay = capture(recorded, tokens(1)[0])
        for token in tokens(4):
            assert same_bits(replay(token), plain(token.clone()))
            assert all(same_bits(recorded.own[name], plain.own[name]) for name in STATES)


def test_capture_itself_computes_nothing(run):
    native_only(run)
    layer, before = Layer(), Layer()
    token = tokens(1)[0]
    replay = capture(layer, token)
    assert all(same_bits(layer.own[name], before.own[name]) for name in layer.own)
    assert same_bits(token, tokens(1)[0])
    replay(token)
    assert not same_bits(layer.own["ssm_state"], before.own["ssm_state"])
    assert same_bits(token, tokens(1)[0]), "the input is copied"


def test_outputs_are_not_overwritten_and_values_may_change(run):
    native_only(run)
    x, weight = torch.randn(2, 7), torch.randn(5, 7)
    replay = capture(lambda x: lora_linear(x, weight), x)
    first = replay(x)
    kept = first.clone()
    weight.mul_(3)
    second = replay(x)
    assert same_bits(first, kept)
    assert same_bits(second, lora_linear(x, weight))


def test_a_replay_keeps_its_memory_alive(run):
    native_only(run)
    layer, plain = Layer(), Layer()
    replay = capture(layer, tokens(1)[0])
    del layer
    gc.collect()
    noise = [torch.full((n,), float("nan")) for n in range(1, 400)]
    assert same_bits(replay(tokens(1)[0]), plain(tokens(1)[0])), len(noise)


def test_threads_follow_torch_at_every_replay(run):
    native_only(run)
    x, weight = torch.randn(3, 256), torch.randn(300, 256).bfloat16()
    replay = capture(lambda x: lora_linear(x, weight), x)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(replay(x))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda x, w: lora_linear(x, w) + 1, "add"),
        (lambda x, w: lora_linear(x * 2, w), "mul"),
        (lambda x, w: lora_linear(x.double(), w), "_to_copy"),
        (lambda x, w: lora_linear(x, w, backend="reference"), "mm|matmul"),
    ],
)
def test_other_operations_are_refused_by_name(run, function, named):
    native_only(run)
    x, weight = torch.randn(2, 7), torch.randn(5, 7)
    with pytest.raises(CannotCapture, match=named):
        capture(lambda x: function(x, weight), x)
    assert same_bits(lora_linear(x, weight), lora_linear(x, weight.clone())), "kernels run again after a refusal"


def test_another_back_end_cannot_be_captured(run):
    if run.startswith("native"):
        pytest.skip("native kernels can")
    layer, before, weight = Layer(), Layer(), torch.ones(7)
    # A GPU's kernels are no torch operations: they must be refused where they start.
    named = {
        "triton": "the Triton kernel .* is not a native kernel",
        "cuda": "the CUDA kernel .* is not a native kernel",
    }.get(run.partition("-")[0], "not a native kernel")
    with pytest.raises(CannotCapture, match=named):
        capture(lambda x: rmsnorm_fn(x, weight, None), torch.randn(2, 7))
    with pytest.raises(CannotCapture, match=named):
        capture(layer, tokens(1)[0])
    assert all(same_bits(layer.own[name], before.own[name]) for name in STATES), "a refusal moves no state"


@pytest.mark.parametrize("wrong", [torch.randn(3, 7), torch.randn(2, 7).double()], ids=["shape", "dtype"])
def test_a_replay_wants_the_inputs_it_was_made_for(run, wrong):
    native_only(run)
    weight = torch.randn(5, 7)
    replay = capture(lambda x: lora_linear(x, weight), torch.randn(2, 7))
    with pytest.raises(ValueError, match="input 0: got .* as at capture"):
        replay(wrong)
