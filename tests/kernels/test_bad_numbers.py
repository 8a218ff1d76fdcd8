"""Numbers, flags and dtypes that do not fit: an error that names the argument and what came."""

from __future__ import annotations

import pytest
import torch

from omnimamba_kernels import (
    add_rmsnorm,
    causal_conv1d_varlen_states,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
)

H, P, G, N, W = 2, 4, 1, 3, 4
DIM, CHANNELS = H * P, H * P + 2 * G * N


def scan(**given):
    x, dt, B = torch.randn(1, 5, H, P), torch.rand(1, 5, H), torch.randn(1, 5, G, N)
    return mamba_chunk_scan_combined(x, dt, -torch.rand(H), B, B, **{"chunk_size": 4, **given})


def split(**given):
    row, weight, head = torch.randn(1, 5, DIM + CHANNELS + H), torch.randn(CHANNELS, W), torch.rand(H)
    given = {"zxbcdt": row, "conv1d_weight": weight, "conv1d_bias": None, "D": head, "headdim": P, **given}
    return mamba_split_conv1d_scan_combined(dt_bias=head, A=-head, chunk_size=4, **given)


def step(**given):
    row, weight, head = torch.randn(1, DIM + CHANNELS + H), torch.randn(CHANNELS, W), torch.rand(H)
    states = torch.zeros(1, CHANNELS, W), torch.zeros(1, H, P, N)
    return mamba_mixer_step(row, *states, weight, None, head, -head, head, **{"headdim": P, **given})


def norm(**given):
    return rmsnorm_fn(torch.randn(3, 12), torch.randn(12), None, **given)


def adapt(**given):
    return lora_linear(torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 2, 5), torch.randn(2, 4, 2), **given)


def drop(**given):
    return adapt(task=0, dropout_p=0.1, **given)


def add(**given):
    return add_rmsnorm(
        **{"residual": torch.randn(3, 12), "update": torch.randn(3, 12), "weight": torch.ones(12), **given}
    )


def varlen(**given):
    return causal_conv1d_varlen_states(torch.randn(5, 3), torch.tensor([0, 5]), **given)


NAN = float("nan")
BAD = [
    (scan, "chunk_size", [0, -4, 2.5, True, "a", None, NAN], ValueError),
    (scan, "dt_limit", [None, 5, (1.0,), (2.0, 1.0), (NAN, 1.0), ("a", "b")], ValueError),
    (scan, "state_dtype", [torch.int32, torch.complex64, "float32"], TypeError),
    (split, "headdim", [0, -P, 4.0, "a"], ValueError),
    (split, "ngroups", [0, -1, 1.0], ValueError),
    (split, "D", [[1.0]], TypeError),
    (split, "conv1d_bias", [torch.ones(CHANNELS, dtype=torch.int32)], TypeError),
    (split, "conv1d_bias", [torch.ones(CHANNELS + 1)], ValueError),
    (split, "rmsnorm_weight", [torch.ones(DIM, dtype=torch.int64)], TypeError),
    (split, "outproj_weight", [torch.ones(3, DIM, dtype=torch.int64)], TypeError),
    (split, "outproj_weight", [torch.ones(3, DIM, device="meta")], ValueError),
    (split, "conv1d_weight", [torch.ones(CHANNELS, 5)], ValueError),
    (step, "headdim", [0, 4.0, "a"], ValueError),
    (step, "ngroups", [0, 1.0], ValueError),
    (step, "rmsnorm_eps", [-1.0, NAN, "a", None], ValueError),
    (split, "rmsnorm_eps", [-1.0, NAN, "a", None], ValueError),
    (norm, "group_size", [0, 5, 2.0, "a"], ValueError),
    (norm, "eps", [-1.0, NAN, "a", None], ValueError),
    (add, "eps", [-1.0, NAN, "a", None], ValueError),
    (add, "residual", [torch.ones(3, 12, dtype=torch.int32)], TypeError),
    (adapt, "scale", ["a", None, NAN, [1]], ValueError),
    (adapt, "task", [1.5, NAN, "a", [0], True], TypeError),
    (adapt, "task", [2, -2], ValueError),
    (adapt, "dropout_p", [1.0, -0.1, NAN, "a", None], ValueError),
    (drop, "dropout_seed", [0.5, "a", [1]], TypeError),
    (varlen, "state_len", [0, 2.5, NAN, "a"], ValueError),
]
CALLS = [(function, name, value, error) for function, name, values, error in BAD for value in values]


@pytest.mark.parametrize(
    "function, name, value, error", CALLS, ids=[f"{f.__name__}-{name}-{i}" for i, (f, name, _, _) in enumerate(CALLS)]
)
def test_is_refused_by_name(function, name, value, error):
    with pytest.raises(error, match=name):
        function(**{name: value})


@pytest.mark.parametrize("function", [scan, split, step, norm, add, varlen], ids=lambda f: f.__name__)
def test_the_call_itself_is_good(function):
    assert function(**({"state_len": 2} if function is varlen else {})) is not None
