"""Indices and offsets past the end, as the kernels meet them on a GPU, where nobody looks at them before."""

import pytest
import torch
from common import evaluate, framed, runs, same_bits
from test_lora_linear import FLOATS, layer
from test_mamba_mixer_step import ONE, arguments

from omnimamba_kernels import (
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    checks,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    selective_state_update,
)
from omnimamba_kernels.lora_linear.cases import Case as Layer
from omnimamba_kernels.lora_linear.cases import inputs, int8_inputs
from omnimamba_kernels.ssd_scan.cases import Case as Scan
from omnimamba_kernels.state_update.cases import Case as Step

RUNS = [run for run in runs("ssd_scan") if run in ("triton", "cuda", "cuda-emulated", "cuda-emulated90")]
WHOLE = torch.int32, torch.int64
BEYOND_32_BITS = 2**32, 2**32 + 1  # cut to 32 bits these are the first slots


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    for check in ("slots", "offsets", "in_range"):
        monkeypatch.setattr(checks, check, lambda *_: None)


def is_padding(function, states, count, whole):
    """``function(states, slots)`` for two rows gives the same for any slot out of range, and touches its own alone."""
    found = []
    for slot in (-1, count, count + 1, 2**31 - 1, *(BEYOND_32_BITS if whole is torch.int64 else ())):
        frames = {name: framed(t) for name, t in states.items()}
        out = function({name: frame.tensor for name, frame in frames.items()}, torch.tensor([slot, 1], dtype=whole))
        assert all(frame.intact() for frame in frames.values()), slot
        found.append((out, *(frame.tensor for frame in frames.values())))
    assert not found[0][0][0].any() and found[0][0][1].any()
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("whole", WHOLE, ids=str)
@pytest.mark.parametrize("n", [5, 16])
def test_a_slot_of_the_state_update(run, n, whole):
    tensors = Step("", 2, 3, 8, n, slots=3).tensors()
    state = {"state": tensors.pop("state")}
    del tensors["state_batch_indices"]
    is_padding(lambda s, slots: selective_state_update(**s, **tensors, state_batch_indices=slots), state, 3, whole)


@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_a_slot_of_the_convolution(run, whole):
    x, weight = torch.randn(2, 19, 2), torch.randn(19, 4)

    def update(s, slots):
        return causal_conv1d_update(x, s["state"], weight, conv_state_indices=slots)

    is_padding(update, {"state": torch.randn(3, 19, 5)}, 3, whole)


@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_a_slot_of_the_mixers_step(run, whole):
    tensors, plain = arguments(ONE, slots=3)
    tensors["zxbcdt"] = torch.cat((tensors["zxbcdt"], tensors["zxbcdt"].flip(-1)))[:2]
    states = {name: tensors.pop(name) for name in ("conv_state", "ssm_state")}
    is_padding(lambda s, slots: mamba_mixer_step(**tensors, **s, **plain, state_batch_indices=slots), states, 3, whole)


@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_an_offset_of_the_convolutions_states(run, whole):
    """Positions past the end are zeros, whatever lies there."""
    x = framed(torch.randn(7, 19)).tensor
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 3, 9, 12], dtype=whole), 4)
    assert same_bits(states[0], torch.cat((torch.zeros(1, 19), x[:3])).t())
    assert same_bits(states[1], torch.cat((x[5:], torch.zeros(2, 19))).t())
    assert not states[2].any()


@pytest.mark.parametrize("whole", WHOLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offset_of_the_scan(run, dtype, whole):
    """Offsets stop at the end."""
    case = Scan("beyond", 1, 90, 2, 32, n=20, initial_states=True, sequences="cu_seqlens")
    tensors, found = case.tensors(dtype), []

    def scan(**t):
        return mamba_chunk_scan_combined(**t, **case.options)

    beyond = [[0, 40, 2**31 + 5, 2**31 + 9], [0, 40, 2**32, 2**32 + 8]] if whole is torch.int64 else []
    for ends in ([0, 40, 90, 90], [0, 40, 120, 150], [0, 40, 2**31 - 2, 2**31 - 1], *beyond):
        tensors["cu_seqlens"] = torch.tensor(ends, dtype=whole)
        found.append(evaluate(scan, tensors, ("x", "dt", "B", "C", "A", "initial_states")))
    assert all(same_bits(other[name], found[0][name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_task_of_the_lora_layer(run, rows, int8, dtype):
    """Its row has the base alone, and gives the adapters no gradient."""
    case, found = Layer((rows,), 64, 40, rank=4), []
    tensors = int8_inputs(case, dtype) if int8 else inputs(case, dtype, dtype)
    wanted = tuple(name for name in FLOATS if not int8 or name != "weight")
    tensors["lora_B"] = framed(tensors["lora_B"]).tensor
    for task in (-1, 2, 5, 2**31 - 1, *BEYOND_32_BITS, -(2**32)):
        tensors["task"] = torch.tensor([task, *([1] * (rows - 1))])
        found.append(evaluate(layer, tensors, wanted))
    assert all(same_bits(other[name], found[0][name]) for other in found[1:] for name in other)
