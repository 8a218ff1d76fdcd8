"""mamba_mixer_step: against the oracle position by position, and its promises about states, slots and memory."""

from __future__ import annotations

import pytest
import torch
from common import DTYPES, THREAD_COUNTS, assert_within_budget, check, double, framed, running, same_bits, threads
from hypothesis import given
from hypothesis import strategies as st
from mixer_oracle import mixer

from omnimamba_kernels import mamba_mixer_step
from omnimamba_kernels.mamba_mixer.cases import SMALL, Case, rows, states, weights

ONE = SMALL[3]
STATES = ("conv_state", "ssm_state")
OPTIONS = {
    "norm then gate": {},
    "gate then norm": {"norm_before_gate": False, "rmsnorm_eps": 0.1},
    "gate alone": {"rmsnorm_weight": None},
    "no activation": {"activation": None},
    "bare": {"rmsnorm_weight": None, "conv1d_bias": None, "dt_bias": None, "D": None},
    "wide D": {"D": "wide"},
}


def arguments(case, dtype=torch.float32, options=None, slots=None):
    """Keyword arguments of one step: tensors, and plain values."""
    tensors = {"zxbcdt": rows(case, dtype)[:, 0], **states(case, dtype, slots), **weights(case, dtype)}
    plain = {"headdim": case.p, "ngroups": case.g}
    for key, value in (options or {}).items():
        if value == "wide":
            tensors[key] = torch.randn(case.h, case.p, generator=torch.Generator().manual_seed(5)).to(dtype)
        elif key in tensors:
            tensors[key] = value
        else:
            plain[key] = value
    return tensors, plain


def stepper(plain):
    """One step that leaves its arguments alone and returns (y, conv_state, ssm_state)."""

    def call(conv_state, ssm_state, **tensors):
        conv_state, ssm_state = conv_state.clone(), ssm_state.clone()
        y = mamba_mixer_step(conv_state=conv_state, ssm_state=ssm_state, **tensors, **plain)
        return y, conv_state, ssm_state

    return call


def oracle(plain):
    def call(zxbcdt, conv_state, ssm_state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight):
        sequence = zxbcdt if zxbcdt.dim() == 3 else zxbcdt[:, None]
        y, conv, state = mixer(
            sequence, conv_state, ssm_state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight,
            g=plain["ngroups"], eps=plain.get("rmsnorm_eps", 1e-6),
            norm_before_gate=plain.get("norm_before_gate", True),
            activation=plain.get("activation", "silu") is not None,
        )  # fmt: skip
        return y.view(*zxbcdt.shape[:-1], -1), conv, state

    return call


def assert_agree(run, got, tensors, plain):
    """``got`` has the bits of a step with ``tensors``; on the reference, whose sums over a batch are torch's and may
    depend on its size, it is within the budget."""
    want = stepper(plain)(**tensors)
    if run != "reference":
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        return
    exact = oracle(plain)(**{k: double(v) for k, v in tensors.items()})
    for name, *three in zip(("y", *STATES), got, want, exact, strict=True):
        assert_within_budget(name, *three)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step(run, case, dtype, options):
    tensors, plain = arguments(case, dtype, options)
    check(run, stepper(plain), oracle(plain), tensors)


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_float32_weights_and_any_state(run, state_dtype):
    tensors, plain = arguments(ONE)
    tensors |= {"ssm_state": tensors["ssm_state"].to(state_dtype), "zxbcdt": tensors["zxbcdt"].bfloat16()}
    check(run, stepper(plain), oracle(plain), tensors)


@pytest.mark.parametrize("case", SMALL[1:], ids=str)
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_steps_make_the_sequence(run, case, norm_before_gate):
    tensors, plain = arguments(case, options={"norm_before_gate": norm_before_gate})
    tensors["zxbcdt"] = rows(case, torch.float32)
    single = stepper(plain)

    def steps(zxbcdt, conv_state, ssm_state, **rest):
        out = []
        for t in range(zxbcdt.shape[1]):
            y, conv_state, ssm_state = single(zxbcdt=zxbcdt[:, t], conv_state=conv_state, ssm_state=ssm_state, **rest)
            out.append(y)
        return torch.stack(out, 1), conv_state, ssm_state

    check(run, steps, oracle(plain), tensors)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_slots(run, integer):
    """Each row works on its own slot; padding rows give 0 whatever they hold; the other slots do not change."""
    tensors, plain = arguments(ONE, slots=5)
    tensors["zxbcdt"][1] = float("nan")
    index = torch.tensor([3, -1, 0], dtype=integer)
    given = {k: v.clone() for k, v in tensors.items()}
    y = mamba_mixer_step(**given, **plain, state_batch_indices=index)
    used = index[[0, 2]].long()
    alone = tensors | {k: tensors[k][used] for k in STATES} | {"zxbcdt": tensors["zxbcdt"][[0, 2]]}
    assert_agree(run, (y[[0, 2]], *(given[k][used] for k in STATES)), alone, plain)
    assert (y[1, ONE.extra :] == 0).all()
    for key in STATES:
        assert same_bits(given[key][[1, 2, 4]], tensors[key][[1, 2, 4]])


def test_one_row_alone(run):
    tensors, plain = arguments(ONE)
    together = stepper(plain)(**tensors)
    for i in range(ONE.b):
        alone = {k: v[i : i + 1] if k in (*STATES, "zxbcdt") else v for k, v in tensors.items()}
        assert_agree(run, [t[i : i + 1] for t in together], alone, plain)


@pytest.mark.parametrize("case", [*SMALL, Case(2, 1, 8, 16, 128), Case(17, 1, 64, 16, 5, g=2, extra=1)], ids=str)
def test_same_bits_at_every_run_and_thread_count(run, case):
    tensors, plain = arguments(case)
    results = []
    for count in THREAD_COUNTS:
        with threads(count):
            results.append(stepper(plain)(**tensors))
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@given(data=st.data())
def test_any_strides(run, data):
    """Every operand and both states in any order of dimensions, inside canaries."""
    tensors, plain = arguments(ONE, options={"D": "wide"})
    frames = {}
    for key, value in tensors.items():
        if data.draw(st.booleans(), label=f"{key} every other"):
            value = value.repeat_interleave(2, -1)[..., ::2]
        frames[key] = framed(value, tuple(data.draw(st.permutations(range(value.dim())))))
    given = {k: f.tensor for k, f in frames.items()}
    y = mamba_mixer_step(**given, **plain)
    assert_agree(run, (y, *(given[k] for k in STATES)), tensors, plain)
    assert all(f.intact() for f in frames.values())


def test_states_longer_than_the_filter_shift(run):
    """state_len above w - 1: the filter sees the last w - 1 inputs, the rest moves along."""
    tensors, plain = arguments(ONE)
    long = torch.cat([torch.full_like(tensors["conv_state"][..., :2], 7.0), tensors["conv_state"]], -1)
    y, conv, _ = stepper(plain)(**(tensors | {"conv_state": long}))
    want, short, _ = stepper(plain)(**tensors)
    assert same_bits(y, want)
    assert same_bits(conv[..., 2:], short) and same_bits(conv[..., :2], long[..., 1:3])


def test_only_the_states_change(run):
    tensors, plain = arguments(ONE)
    given = {k: v.clone() for k, v in tensors.items()}
    y = mamba_mixer_step(**given, **plain)
    for key, value in tensors.items():
        assert same_bits(given[key], value) == (key not in STATES), key
    assert y.untyped_storage().data_ptr() not in {v.untyped_storage().data_ptr() for v in given.values()}


def test_no_gradient(run):
    tensors, plain = arguments(ONE)
    tensors["zxbcdt"].requires_grad_()
    assert not mamba_mixer_step(**tensors, **plain).requires_grad


def test_no_rows(run):
    tensors, plain = arguments(ONE, slots=4)
    y = mamba_mixer_step(
        **(tensors | {"zxbcdt": tensors["zxbcdt"][:0]}), **plain, state_batch_indices=torch.empty(0, dtype=torch.int32)
    )
    assert y.shape == (0, ONE.extra + ONE.dim)


def extreme(tensors, **values):
    return tensors | {k: torch.full_like(tensors[k], v) for k, v in values.items()}


@pytest.mark.parametrize("dt, A", [(30.0, -16.0), (-60.0, -1.0), (1e4, -1e4), (0.0, 0.0)])
def test_extreme_steps(run, dt, A):
    tensors, plain = arguments(ONE)
    check(run, stepper(plain), oracle(plain), extreme(tensors, dt_bias=dt, A=A))


CHANGES = [
    ("zxbcdt", ValueError, {"zxbcdt": torch.randn(3, 1, 4)}),
    ("zxbcdt", ValueError, {"zxbcdt": torch.randn(3, 11)}),
    ("zxbcdt", TypeError, {"zxbcdt": None}),
    ("conv_state", ValueError, {"conv_state": torch.randn(3, 5, 3)}),
    ("conv_state", ValueError, {"conv_state": torch.randn(3, ONE.channels, ONE.w - 2)}),
    ("conv_state", TypeError, {"conv_state": torch.ones(3, ONE.channels, 3, dtype=torch.int32)}),
    ("ssm_state", ValueError, {"ssm_state": torch.randn(3, 6, 17)}),
    ("ssm_state", ValueError, {"ssm_state": torch.randn(2, 6, 17, 33)}),
    ("conv1d_weight", ValueError, {"conv1d_weight": torch.randn(ONE.channels, 5)}),
    ("conv1d_weight", ValueError, {"conv1d_weight": torch.randn(ONE.channels)}),
    ("conv1d_weight", TypeError, {"conv1d_weight": None}),
    ("conv1d_bias", ValueError, {"conv1d_bias": torch.randn(2)}),
    ("dt_bias", ValueError, {"dt_bias": torch.randn(2)}),
    ("A", ValueError, {"A": torch.randn(6, 1)}),
    ("D", ValueError, {"D": torch.randn(5)}),
    ("D", ValueError, {"D": torch.randn(6, 4)}),
    ("rmsnorm_weight", ValueError, {"rmsnorm_weight": torch.randn(4)}),
    ("rmsnorm_weight", TypeError, {"rmsnorm_weight": torch.ones(ONE.dim, dtype=torch.int64)}),
    ("headdim", ValueError, {"headdim": None}),
    ("ngroups", ValueError, {"ngroups": 4}),
    ("ngroups", ValueError, {"ngroups": 0}),
    ("activation", ValueError, {"activation": "relu"}),
    ("state_batch_indices", ValueError, {"state_batch_indices": torch.tensor([0, 1])}),
    ("state_batch_indices", ValueError, {"state_batch_indices": torch.tensor([0, 1, 3])}),
    ("state_batch_indices", TypeError, {"state_batch_indices": torch.zeros(3)}),
    ("conv1d_bias", ValueError, {"conv1d_bias": torch.randn(ONE.channels, device="meta")}),
]


@pytest.mark.parametrize(
    ("argument", "error", "changes"), CHANGES, ids=[f"{a}-{i}" for i, (a, *_) in enumerate(CHANGES)]
)
def test_errors_name_the_argument_and_leave_the_states(run, argument, error, changes):
    tensors, plain = arguments(ONE)
    given = tensors | plain | changes
    before = {k: given[k].clone() for k in STATES}
    with pytest.raises(error, match=argument):
        mamba_mixer_step(**given)
    assert all(same_bits(given[k], before[k]) for k in STATES)


def test_float64_is_refused_by_name_on_native():
    tensors, plain = arguments(ONE, torch.float64)
    with running("native"), pytest.raises(RuntimeError, match="float64"):
        mamba_mixer_step(**tensors, **plain)
