"""Under torch.compile each public function is one operator: no graph break, eager values, true schemas."""

from __future__ import annotations

import pytest
import torch
from common import assert_within_budget, double, evaluate, moved, not_placing, same_bits

from omnimamba_kernels import (
    add_rmsnorm,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_state_update,
)

B, L, H, P, G, N, W = 2, 19, 4, 6, 2, 5, 4
DIM, CHANNELS = H * P, H * P + 2 * G * N


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scan(x, dt, A, B, C, D, initial_states):
    return mamba_chunk_scan_combined(
        x, dt, -A.exp(), B, C, 8, D=D, initial_states=initial_states, dt_softplus=True, return_final_states=True
    )


def convolve(x, weight, bias, initial_states):
    x = x.transpose(1, 2)
    return causal_conv1d_fn(x, weight, bias, initial_states=initial_states, return_final_states=True, activation="silu")


def norm(x, weight, z):
    return rmsnorm_fn(x, weight, None, z, group_size=DIM // G, norm_before_gate=False)


def adapt(x, weight, lora_A, lora_B):
    return lora_linear(x, weight, lora_A, lora_B, scale=2.0, task=1, dropout_p=0.25, dropout_seed=5)


def adapt_mixed(x, weight, lora_A, lora_B):
    task = torch.arange(B * L, device=x.device).view(B, L) % 3 - 1
    return lora_linear(x, weight, lora_A, lora_B, scale=2.0, task=task)


def mix(zxbcdt, conv1d_weight, dt_bias, A, D, rmsnorm_weight):
    return mamba_split_conv1d_scan_combined(
        zxbcdt, conv1d_weight, None, dt_bias, -A.exp(), D, 8, rmsnorm_weight=rmsnorm_weight, headdim=P, ngroups=G
    )


ADAPTED = dict(x=(B, L, DIM), weight=(11, DIM), lora_A=(2, 3, DIM), lora_B=(2, 11, 3))
DIFFERENTIABLE = [
    (
        scan,
        dict(x=(B, L, H, P), dt=(B, L, H), A=(H,), B=(B, L, G, N), C=(B, L, G, N), D=(H,), initial_states=(B, H, P, N)),
    ),
    (convolve, dict(x=(B, L, DIM), weight=(DIM, W), bias=(DIM,), initial_states=(B, DIM, W - 1))),
    (norm, dict(x=(B, L, DIM), weight=(DIM,), z=(B, L, DIM))),
    (adapt, ADAPTED),
    (adapt_mixed, ADAPTED),
    (
        mix,
        dict(
            zxbcdt=(B, L, DIM + CHANNELS + H),
            conv1d_weight=(CHANNELS, W),
            dt_bias=(H,),
            A=(H,),
            D=(H,),
            rmsnorm_weight=(DIM,),
        ),
    ),
]


@pytest.mark.parametrize("function, shapes", DIFFERENTIABLE, ids=[f.__name__ for f, _ in DIFFERENTIABLE])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager_in_one_graph(run, function, shapes, dynamic):
    torch._dynamo.reset()
    given = tensors(**shapes)
    eager = evaluate(function, given, tuple(shapes))
    with not_placing():
        compiled = evaluate(
            torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic), given, tuple(shapes)
        )
    assert eager.keys() == compiled.keys()
    if run != "reference":
        assert all(same_bits(eager[name], compiled[name]) for name in eager)
        return
    exact = evaluate(function, {name: double(t) for name, t in given.items()}, tuple(shapes))
    for name in eager:  # compiled, plain PyTorch may take another of torch's kernels
        assert_within_budget(name, compiled[name], eager[name], exact[name])


def step_arguments() -> dict[str, torch.Tensor]:
    return tensors(state=(B, H, P, N), x=(B, H, P), dt=(B, H, P), A=(H, P, N), B=(B, G, N), C=(B, G, N), D=(H, P))


def update_arguments() -> dict[str, torch.Tensor]:
    return tensors(x=(B, DIM), conv_state=(B, DIM, W), weight=(DIM, W), bias=(DIM,))


def mixer_arguments() -> dict[str, torch.Tensor]:
    return tensors(
        zxbcdt=(B, DIM + CHANNELS + H),
        conv_state=(B, CHANNELS, W),
        ssm_state=(B, H, P, N),
        conv1d_weight=(CHANNELS, W),
        conv1d_bias=(CHANNELS,),
        dt_bias=(H,),
        A=(H,),
        D=(H,),
    )


def mixer_step(**given):
    return mamba_mixer_step(**given, headdim=P, ngroups=G)


def add_arguments() -> dict[str, torch.Tensor]:
    return tensors(residual=(B, DIM), update=(B, DIM), weight=(DIM,))


STEPS = [
    (add_rmsnorm, add_arguments, ("residual",)),
    (selective_state_update, step_arguments, ("state",)),
    (causal_conv1d_update, update_arguments, ("conv_state",)),
    (mixer_step, mixer_arguments, ("conv_state", "ssm_state")),
]


@pytest.mark.parametrize("function, arguments, states", STEPS, ids=[f.__name__ for f, _, _ in STEPS])
def test_compiled_steps_change_the_state_as_eager_ones_do(run, function, arguments, states):
    torch._dynamo.reset()
    eager, compiled = arguments(), arguments()
    want = function(**eager)
    with not_placing():
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(**compiled)
    assert same_bits(got, want)
    for name in eager:
        assert same_bits(eager[name], compiled[name]), name
        assert (name in states) == (not same_bits(eager[name], arguments()[name])), name


def operator_calls():
    ops = torch.ops.omnimamba
    s = tensors(x=(B, L, H, P), dt=(B, L, H), A=(H,), B=(B, L, G, N), C=(B, L, G, N))
    scan_options = (8, None, None, None, None, None, None, True, (0.0, 10.0), True, False, None, None)
    yield ops.mamba_chunk_scan_combined, (*(t.requires_grad_() for t in s.values()), *scan_options)
    c = tensors(x=(B, L, DIM), weight=(DIM, W), bias=(DIM,))
    x = c["x"].transpose(1, 2).requires_grad_()
    yield ops.causal_conv1d, (x, c["weight"], c["bias"], None, None, True, True, None)
    n = tensors(x=(B, L, DIM), weight=(DIM,))
    yield ops.rmsnorm_fn, (n["x"].requires_grad_(), n["weight"], None, None, 1e-5, None, True, None)
    yield ops.rmsnorm_fn, (n["x"].detach().transpose(0, 1), n["weight"], None, None, 1e-5, None, True, None)
    yield ops.add_rmsnorm, (*add_arguments().values(), 1e-5, None)
    s = {name: t.detach() for name, t in s.items()}
    s["x"] = s["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    ids = torch.arange(B * L, dtype=torch.int32).view(B, L) // 7 - 1
    yield (
        ops.mamba_chunk_scan_combined,
        (
            *s.values(),
            8,
            None,
            None,
            None,
            torch.zeros(B, H, P, N),
            ids,
            None,
            True,
            (0.0, 10.0),
            True,
            False,
            None,
            None,
        ),
    )
    a = tensors(x=(L, DIM), weight=(11, DIM), lora_A=(2, 3, DIM), lora_B=(2, 11, 3))
    yield ops.lora_linear, (*a.values(), None, torch.arange(L, dtype=torch.int32) % 3 - 1, None, -1, 2.0, 0.0, 0, None)
    yield ops.mamba_mixer_step, (*mixer_arguments().values(), P, G, None, 1e-5, True, "silu", None, None)
    u = step_arguments()
    yield ops.selective_state_update, (*u.values(), None, None, True, None, None)
    v = update_arguments()
    yield ops.causal_conv1d_update, (*v.values(), "silu", None, None, None)
    yield ops.causal_conv1d_varlen_states, (n["x"][0].detach(), torch.tensor([0, 4, L]), 3, None)


@pytest.mark.parametrize(
    "operator, arguments", list(operator_calls()), ids=lambda value: getattr(value, "__name__", "")
)
def test_operators_keep_the_promises_of_their_schemas(run, operator, arguments):
    """No undeclared mutation, no output that aliases an input, fakes of the true shapes and strides."""
    with not_placing():
        torch.library.opcheck(operator.default, tuple(moved(value) for value in arguments))


def test_varlen_states_are_traced_whole(run):
    torch._dynamo.reset()
    x, offsets = torch.randn(L, DIM), torch.tensor([0, 4, L])
    want = causal_conv1d_varlen_states(x, offsets, 3)
    with not_placing():
        got = torch.compile(causal_conv1d_varlen_states, fullgraph=True, backend="aot_eager")(x, offsets, 3)
    assert same_bits(got, want)
