"""mamba_split_conv1d_scan_combined: every argument and gradient against the oracle position by position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import check, framed, same_bits
from mixer_oracle import mixer

from omnimamba_kernels import mamba_split_conv1d_scan_combined
from omnimamba_kernels.mamba_mixer.cases import SMALL, Case, rows, weights

ONE = SMALL[3]
LONG = Case(1, 70, 2, 9, 5, extra=1)
OUT = 11
ALWAYS = ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "rmsnorm_weight")
EXTRAS = ("initial_states", "outproj_weight", "outproj_bias")

OPTIONS = {
    "plain": {},
    "gate then norm": {"norm_before_gate": False, "rmsnorm_eps": 0.1},
    "gate alone": {"rmsnorm_weight": None},
    "bare": {"rmsnorm_weight": None, "conv1d_bias": None, "dt_bias": None, "D": None},
    "wide D tells headdim": {"D": "wide", "headdim": None},
    "no activation": {"activation": None},
    "dt limits": {"dt_limit": (0.05, 0.4)},
    "from a state to a state": {"initial_states": "draw", "return_final_states": True},
    "output projection": {"outproj_weight": "draw", "outproj_bias": "draw"},
    "packed": {"seq_idx": "draw", "initial_states": "draw", "return_final_states": True},
    "all": {"D": "wide", "initial_states": "draw", "return_final_states": True, "outproj_weight": "draw",
            "outproj_bias": "draw", "seq_idx": "draw", "norm_before_gate": False, "dt_limit": (0.01, 0.5)},
}  # fmt: skip


def arguments(case, dtype, options):
    """(tensors, plain values) of one call; "draw" and "wide" stand for random tensors of the right shape."""
    make = torch.Generator().manual_seed(9)
    shapes = {
        "D": (case.h, case.p),
        "initial_states": (case.b, case.h, case.p, case.n),
        "outproj_weight": (OUT, case.extra + case.dim),
        "outproj_bias": (OUT,),
    }
    tensors = {"zxbcdt": rows(case, dtype), **weights(case, dtype), **dict.fromkeys((*EXTRAS, "seq_idx"))}
    # A large eps: without it the norm of a nearly cancelled row would blow up rounding unknown to the budget.
    plain = {"chunk_size": 4, "headdim": case.p, "ngroups": case.g, "rmsnorm_eps": 0.3}
    for key, value in options.items():
        if key == "seq_idx":
            tensors[key] = packed(case)
        elif value in ("draw", "wide"):
            tensors[key] = (torch.randn(shapes[key], generator=make) * 0.5).to(dtype)
        elif key in tensors:
            tensors[key] = value
        else:
            plain[key] = value
    return tensors, plain


def packed(case):
    """Sequences of uneven length, the first continued from the state, padding at the end of the first row."""
    index = (torch.arange(case.l) * 3 // max(case.l, 1)).int().repeat(case.b, 1)
    index[0, -1] = -1
    return index


def differentiated(run):
    """What to differentiate. On the kernels the gradients that have one number a head are left to the scan's own tests:
    of so few numbers the reference's worst error, which the budget stands on, is a matter of luck."""
    return tuple(n for n in (*ALWAYS, *EXTRAS) if run == "reference" or n not in ("A", "dt_bias", "D"))


def split(plain):
    return lambda **tensors: mamba_split_conv1d_scan_combined(**tensors, **plain)


def oracle(case, plain):
    def call(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, initial_states, outproj_weight,
             outproj_bias, seq_idx):  # fmt: skip
        fresh = zxbcdt.new_zeros(case.b, case.channels, case.w - 1)
        state = zxbcdt.new_zeros(case.b, case.h, case.p, case.n) if initial_states is None else initial_states
        y, _, final = mixer(
            zxbcdt, fresh, state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, g=case.g, seq_idx=seq_idx,
            eps=plain.get("rmsnorm_eps", 1e-6), norm_before_gate=plain.get("norm_before_gate", True),
            activation=plain.get("activation", "silu") is not None, dt_limit=plain.get("dt_limit", (0.0, float("inf"))),
        )  # fmt: skip
        if outproj_weight is not None:
            y = F.linear(y, outproj_weight, outproj_bias)
        return (y, final) if plain.get("return_final_states") else y

    return call


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", [*SMALL[1:], LONG], ids=str)
def test_forward_and_gradients(run, case, options):
    """The definition in float32. The kernels in bfloat16, where storage sets the budget: this is about their wiring,
    and each is held to float32 by its own tests."""
    tensors, plain = arguments(case, torch.float32 if run == "reference" else torch.bfloat16, options)
    check(run, split(plain), oracle(case, plain), tensors, wanted=differentiated(run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_low_precision(run, dtype, options):
    tensors, plain = arguments(ONE, dtype, options)
    check(run, split(plain), oracle(ONE, plain), tensors, wanted=differentiated(run))


def test_final_states_have_the_dtype_asked_for(run):
    tensors, plain = arguments(ONE, torch.float32, OPTIONS["from a state to a state"])
    _, full = split(plain)(**tensors)
    _, half = split(plain | {"state_dtype": torch.bfloat16})(**tensors)
    assert full.dtype == torch.float32 and same_bits(half, full.bfloat16())


def test_inputs_stay_and_a_framed_row_keeps_its_canaries(run):
    tensors, plain = arguments(ONE, torch.float32 if run == "reference" else torch.bfloat16, OPTIONS["all"])
    frames = {k: framed(t) for k, t in tensors.items()}
    views = {k: f.tensor for k, f in frames.items()}
    check(run, split(plain), oracle(ONE, plain), views, wanted=differentiated(run))
    assert all(f.intact() and same_bits(f.tensor, tensors[k]) for k, f in frames.items())


CHANGES = [
    ("zxbcdt", ValueError, {"zxbcdt": torch.randn(3, 4)}),
    ("zxbcdt", ValueError, {"zxbcdt": torch.randn(3, 5, 11)}),
    ("conv1d_weight", ValueError, {"conv1d_weight": torch.randn(ONE.channels + 1, 4)}),
    ("conv1d_weight", ValueError, {"conv1d_weight": torch.randn(ONE.channels)}),
    ("rmsnorm_weight", ValueError, {"rmsnorm_weight": torch.randn(3)}),
    ("headdim", ValueError, {"headdim": None}),
    ("D", ValueError, {"D": torch.randn(2)}),
    ("A", ValueError, {"A": torch.randn(2, 2)}),
    ("dt_bias", ValueError, {"dt_bias": torch.randn(2)}),
    ("initial_states", ValueError, {"initial_states": torch.randn(3, 2, 2, 2)}),
    ("seq_idx", ValueError, {"seq_idx": torch.zeros(3, 4, dtype=torch.int32)}),
    ("seq_idx", TypeError, {"seq_idx": torch.zeros(3, 5)}),
    ("chunk_size", ValueError, {"chunk_size": 0}),
    ("dt_limit", ValueError, {"dt_limit": (1.0, 0.0)}),
    ("activation", ValueError, {"activation": "relu"}),
    ("outproj_weight", ValueError, {"outproj_weight": torch.randn(3, 4)}),
    (
        "outproj_bias",
        ValueError,
        {"outproj_weight": torch.randn(3, ONE.extra + ONE.dim), "outproj_bias": torch.randn(4)},
    ),
    ("outproj_bias", ValueError, {"outproj_bias": torch.randn(4)}),
]


@pytest.mark.parametrize(
    ("argument", "error", "changes"), CHANGES, ids=[f"{a}-{i}" for i, (a, *_) in enumerate(CHANGES)]
)
def test_errors_name_the_argument(run, argument, error, changes):
    tensors, plain = arguments(ONE, torch.float32, {})
    with pytest.raises(error, match=argument):
        mamba_split_conv1d_scan_combined(**(tensors | plain | changes))
