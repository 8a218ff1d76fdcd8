"""The CUDA decode step: groups of several blocks, in any order; packs of states; its tickets."""

from __future__ import annotations

import emulated
import pytest
import torch
from common import check, running, same_bits
from test_mamba_mixer_step import OPTIONS, arguments, oracle, stepper

from omnimamba_kernels import mamba_mixer_step
from omnimamba_kernels.mamba_mixer.cases import Case, rows
from omnimamba_kernels.mamba_mixer.tickets import tickets

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
WIDE = Case(2, 1, 4, 37, 8, g=2, extra=3)  # three blocks a group


@pytest.fixture(autouse=True)
def _emulated():
    with running("cuda-emulated"):
        yield
    emulated.configure()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [16, 80, 264])
def test_packs_of_states(state, n, options):
    """Fewer and more states than the lanes of a channel hold at a time."""
    tensors, plain = arguments(Case(1, 1, 2, 20, n), options=options)
    check("cuda-emulated", stepper(plain), oracle(plain), tensors | {"ssm_state": tensors["ssm_state"].to(state)})


@pytest.mark.parametrize("name", ["norm then gate", "gate then norm", "gate alone"])
def test_no_order_of_blocks_changes_a_bit(name):
    """Whoever comes last normalises and moves B's and C's windows on, and leaves the tickets at 0."""
    tensors, plain = arguments(WIDE, options=OPTIONS[name])
    check("cuda-emulated", stepper(plain), oracle(plain), tensors)
    want = stepper(plain)(**tensors)
    for seed in range(6):
        emulated.configure(seed)
        assert all(same_bits(a, b) for a, b in zip(stepper(plain)(**tensors), want, strict=True))


def test_a_state_steps_on_in_place():
    """The same two state tensors for many steps, as a decoding loop has them, equal fresh ones for each step."""
    tensors, plain = arguments(WIDE)
    sequence = rows(Case(2, 4, 4, 37, 8, g=2, extra=3), torch.float32)
    conv, ssm = tensors["conv_state"].clone(), tensors["ssm_state"].clone()
    for t in range(sequence.shape[1]):
        given = tensors | {"zxbcdt": sequence[:, t], "conv_state": conv, "ssm_state": ssm}
        want, new_conv, new_ssm = stepper(plain)(**given)
        got = mamba_mixer_step(**given, **plain)
        assert same_bits(got, want) and same_bits(conv, new_conv) and same_bits(ssm, new_ssm)
        assert not tickets(ssm).any()


def test_blocks_of_more_channels():
    """A batch that fills the chip gives each block several passes of channels."""
    tensors, plain = arguments(Case(3, 1, 96, 66, 4))
    check("cuda-emulated", stepper(plain), oracle(plain), tensors)
