"""Bad input: an error that names the argument, and in-place state as it was."""

import pytest
import torch
from common import same_bits

from omnimamba_kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    rmsnorm_fn,
    selective_state_update,
)

NAN = float("nan")


def conv():
    return {"x": torch.randn(2, 6, 9), "weight": torch.randn(6, 4), "bias": torch.randn(6)}


def update():
    return {"x": torch.randn(2, 6), "conv_state": torch.randn(3, 6, 4), "weight": torch.randn(6, 4),
            "bias": torch.randn(6), "conv_state_indices": torch.tensor([2, 0])}  # fmt: skip


def norm():
    return {"x": torch.randn(3, 12), "weight": torch.randn(12), "bias": None, "z": torch.randn(3, 12)}


def step():
    return {
        "state": torch.randn(3, 4, 5, 6), "x": torch.randn(2, 4, 5), "dt": torch.randn(2, 4, 5),
        "A": -torch.rand(4, 5, 6), "B": torch.randn(2, 2, 6), "C": torch.randn(2, 2, 6), "D": torch.randn(4, 5),
        "z": torch.randn(2, 4, 5), "dt_bias": torch.randn(4, 5), "state_batch_indices": torch.tensor([1, 2]),
    }  # fmt: skip


def packed():
    return {"x": torch.randn(7, 3), "cu_seqlens": torch.tensor([0, 3, 7]), "state_len": 2}


FUNCTIONS = {
    conv: causal_conv1d_fn,
    update: causal_conv1d_update,
    norm: rmsnorm_fn,
    step: selective_state_update,
    packed: causal_conv1d_varlen_states,
}

# What is wrong: the call, the argument, what it becomes, the error, the name that the message must hold.
WRONG_SHAPES = [
    (conv, "x", torch.randn(6, 9), "x"),
    (conv, "x", torch.randn(2, 7, 9), "weight"),
    (conv, "weight", torch.randn(6), "weight"),
    (conv, "weight", torch.randn(6, 1), "width"),
    (conv, "weight", torch.randn(6, 5), "width"),
    (conv, "bias", torch.randn(5), "bias"),
    (conv, "bias", torch.randn(6, 1), "bias"),
    (conv, "seq_idx", torch.zeros(2, 8, dtype=torch.int32), "seq_idx"),
    (conv, "initial_states", torch.randn(2, 6, 4), "initial_states"),
    (conv, "final_states_out", torch.randn(2, 6, 2), "final_states_out"),
    (conv, "activation", "relu", "activation"),
    (conv, "weight", torch.randn(6, 4, device="meta"), "weight"),
    (update, "x", torch.randn(2, 6, 1, 1), "x"),
    (update, "conv_state", torch.randn(3, 6, 2), "conv_state"),
    (update, "conv_state", torch.randn(3, 7, 4), "conv_state"),
    (update, "conv_state_indices", None, "conv_state"),
    (update, "conv_state_indices", torch.tensor([0, 3]), "conv_state_indices"),
    (update, "conv_state_indices", torch.tensor([0, 1, 2]), "conv_state_indices"),
    (update, "conv_state_indices", torch.zeros(2, dtype=torch.int64, device="meta"), "conv_state_indices"),
    (update, "cache_seqlens", torch.tensor([1]), "cache_seqlens"),
    (update, "cache_seqlens", torch.tensor([1, -1]), "cache_seqlens"),
    (update, "bias", torch.randn(6, device="meta"), "bias"),
    (norm, "x", torch.tensor(1.0), "x"),
    (norm, "weight", torch.randn(11), "weight"),
    (norm, "bias", torch.randn(1), "bias"),
    (norm, "z", torch.randn(3, 11), "z"),
    (norm, "group_size", 5, "group_size"),
    (norm, "group_size", 0, "group_size"),
    (norm, "group_size", -3, "group_size"),
    (norm, "z", torch.randn(3, 12, device="meta"), "z"),
    (step, "state", torch.randn(3, 4, 6), "x"),
    (step, "state", torch.randn(3, 4, 7, 6), "state"),
    (step, "x", torch.randn(2, 4), "x"),
    (step, "dt", torch.randn(2, 4), "dt"),
    (step, "A", torch.randn(4), "A"),
    (step, "B", torch.randn(2, 3, 6), "C"),
    (step, "C", torch.randn(2, 2, 7), "C"),
    (step, "D", torch.randn(4), "D"),
    (step, "z", torch.randn(2, 5, 4), "z"),
    (step, "dt_bias", torch.randn(5), "dt_bias"),
    (step, "state_batch_indices", torch.tensor([0, 3]), "state_batch_indices"),
    (step, "state_batch_indices", torch.tensor([0]), "state_batch_indices"),
    (step, "state_batch_indices", None, "state"),
    (step, "z", torch.randn(2, 4, 5, device="meta"), "z"),
    (packed, "x", torch.randn(7), "x"),
    (packed, "cu_seqlens", torch.tensor([0, 3, 8]), "cu_seqlens"),
    (packed, "cu_seqlens", torch.tensor([0, 5, 3, 7]), "cu_seqlens"),
    (packed, "cu_seqlens", torch.tensor([1, 7]), "cu_seqlens"),
    (packed, "cu_seqlens", torch.tensor([[0, 7]]), "cu_seqlens"),
    (packed, "cu_seqlens", torch.zeros(0, dtype=torch.int32), "cu_seqlens"),
    (packed, "state_len", 0, "state_len"),
]
WRONG_TYPES = [
    (conv, "x", torch.ones(2, 6, 9, dtype=torch.int32), "x"),
    (conv, "x", [[1.0]], "x"),
    (conv, "weight", torch.ones(6, 4, dtype=torch.complex64), "weight"),
    (conv, "seq_idx", torch.full((2, 9), NAN), "seq_idx"),
    (update, "conv_state", torch.zeros(3, 6, 4, dtype=torch.int8), "conv_state"),
    (update, "conv_state_indices", torch.tensor([0.0, NAN]), "conv_state_indices"),
    (update, "cache_seqlens", torch.tensor([NAN, 0.0]), "cache_seqlens"),
    (norm, "x", torch.ones(3, 12, dtype=torch.int64), "x"),
    (norm, "x", None, "x"),
    (norm, "z", torch.ones(3, 12, dtype=torch.bool), "z"),
    (step, "state", torch.zeros(3, 4, 5, 6, dtype=torch.int32), "state"),
    (step, "B", torch.zeros(2, 2, 6, dtype=torch.int32), "B"),
    (step, "state_batch_indices", torch.tensor([NAN, 0.0]), "state_batch_indices"),
    (packed, "cu_seqlens", torch.tensor([0.0, NAN]), "cu_seqlens"),
    (packed, "x", torch.ones(7, 3, dtype=torch.int32), "x"),
]


def label(value):
    return getattr(value, "__name__", value if isinstance(value, str) else "")


def assert_refused(call, argument, value, error, named):
    arguments = call()
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error) as caught:
        FUNCTIONS[call](**{**arguments, argument: value})
    assert named in str(caught.value), str(caught.value)
    assert "expected" in str(caught.value) or "multiple" in str(caught.value), "it says what would have been right"
    for name, t in before.items():
        assert same_bits(arguments[name], t), f"{name} changed"


@pytest.mark.parametrize("call, argument, value, named", WRONG_SHAPES, ids=label)
def test_wrong_shapes_and_values(run, call, argument, value, named):
    assert_refused(call, argument, value, ValueError, named)


@pytest.mark.parametrize("call, argument, value, named", WRONG_TYPES, ids=label)
def test_wrong_types(run, call, argument, value, named):
    assert_refused(call, argument, value, TypeError, named)


NOT_DENSE = [
    (conv, "weight", lambda t: t.to_sparse()),
    (conv, "x", lambda t: torch.nested.nested_tensor(list(t))),
    (update, "conv_state_indices", lambda t: t.to_sparse()),
    (norm, "z", lambda t: t.to_sparse_csr()),
    (norm, "z", lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)),
    (step, "D", lambda t: t.to_sparse()),
    (step, "state", lambda t: t.to_sparse()),
    (packed, "x", lambda t: t.to_sparse()),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call, argument, made", NOT_DENSE, ids=lambda v: v if isinstance(v, str) else "")
def test_tensors_that_are_not_dense(run, call, argument, made):
    FUNCTIONS[call](**call())  # the same shape, dtype and device, which are checked once
    with pytest.raises(TypeError, match=f"^{argument}: got a tensor of layout .*expected a dense one"):
        FUNCTIONS[call](**{**call(), argument: made(call()[argument])})


def test_final_states_whose_elements_share_memory(run):
    with pytest.raises(ValueError, match="final_states_out: got strides"):
        causal_conv1d_fn(**conv(), final_states_out=torch.zeros(1).expand(2, 6, 3))


def test_heads_that_groups_do_not_divide(run):
    arguments = step()
    state = arguments["state"].clone()
    with pytest.raises(ValueError, match="heads h = 4 .* groups g = 3"):
        selective_state_update(**{**arguments, "B": torch.randn(2, 3, 6), "C": torch.randn(2, 3, 6)})
    assert same_bits(arguments["state"], state)


@pytest.mark.parametrize("call", FUNCTIONS, ids=label)
def test_the_calls_above_are_right_as_they_stand(run, call):
    FUNCTIONS[call](**call())
