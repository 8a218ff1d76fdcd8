"""The Triton decode step: one launch, whatever the order of its programs; its tickets. The cost models of the mixer."""

from __future__ import annotations

import random

import pytest
import torch
from common import running, same_bits
from counting import Seen, counted, counted_arithmetic
from test_mamba_mixer_step import OPTIONS, arguments, stepper
from test_triton_addresses import guarded

from omnimamba_kernels import checks, mamba_mixer_step, mamba_split_conv1d_scan_combined, use_backend
from omnimamba_kernels.cost import Cost
from omnimamba_kernels.mamba_mixer import cost, tickets
from omnimamba_kernels.mamba_mixer.cases import GPU_SEQUENCE, SMALL, Case, rows, weights
from omnimamba_kernels.report.calls import Made
from omnimamba_kernels.triton_launch import INTERPRETER, TARGETS, interpreting, recording

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
WIDE = Case(2, 1, 4, 24, 5, g=2, extra=3)  # three programs a group in the interpreter


@pytest.mark.parametrize("arch", TARGETS)
def test_one_launch(arch):
    tensors, plain = arguments(Case(4, 1, 64, 64, 128))
    meta = {k: v.to("meta") for k, v in tensors.items()}
    with recording(TARGETS[arch]) as found, use_backend("triton"):
        y = mamba_mixer_step(**meta, **plain)
    assert [each.kernel.__name__ for each in found] == ["step_kernel"]
    assert found[0].grid[0] >= 2 * TARGETS[arch].multiprocessors and y.shape == (4, 4096)


@interpreted
@pytest.mark.parametrize(
    "options", [OPTIONS["norm then gate"], OPTIONS["gate then norm"], OPTIONS["gate alone"]], ids=str
)
def test_programs_in_any_order(options, monkeypatch):
    """Whoever comes last normalises and moves B's and C's windows on: the bits are the same."""
    from triton.runtime.interpreter import InterpreterBuilder

    tensors, plain = arguments(WIDE, options=options)
    place, orders = InterpreterBuilder.set_grid_idx, []

    def shuffled(self, x, y, z):
        if x == 0:
            orders.append(random.Random(len(orders)).sample(range(self.grid_dim[0]), self.grid_dim[0]))
        place(self, orders[-1][x], y, z)

    with running("triton"):
        want = stepper(plain)(**tensors)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
        for _ in range(4):
            got = stepper(plain)(**tensors)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert len(orders) == 4 and len(orders[0]) == 2 * 2 * 3 and all(order != sorted(order) for order in orders)


@interpreted
def test_a_slot_beyond_the_states_is_padding(monkeypatch):
    """As the kernel meets it on a GPU, whose indices are not looked at before."""
    monkeypatch.setattr(checks, "slots", lambda *_: None)
    tensors, plain = arguments(WIDE, slots=3)
    found = []
    for slot in (-1, 3, 2**31 - 1):
        given = {k: v.clone() for k, v in tensors.items()}
        with running("triton"), guarded():
            y = mamba_mixer_step(**given, **plain, state_batch_indices=torch.tensor([slot, 1]))
        found.append((y, given["conv_state"], given["ssm_state"]))
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@interpreted
def test_a_state_steps_on_in_place():
    """The same two state tensors for many steps, as a decoding loop has them, equal fresh ones for each step."""
    tensors, plain = arguments(WIDE)
    sequence = rows(Case(2, 5, 4, 24, 5, g=2, extra=3), torch.float32)
    conv, ssm = tensors["conv_state"].clone(), tensors["ssm_state"].clone()
    with running("triton"):
        for t in range(sequence.shape[1]):
            want, new_conv, new_ssm = stepper(plain)(
                **(tensors | {"zxbcdt": sequence[:, t], "conv_state": conv, "ssm_state": ssm})
            )
            got = mamba_mixer_step(
                **(tensors | {"zxbcdt": sequence[:, t], "conv_state": conv, "ssm_state": ssm}), **plain
            )
            assert same_bits(got, want) and same_bits(conv, new_conv) and same_bits(ssm, new_ssm)


@interpreted
def test_tickets_stay_with_their_state_but_not_those_of_a_capture(monkeypatch):
    """A captured graph zeroes its own; nobody has zeroed them for a step outside of it."""
    tensors, plain = arguments(WIDE)
    state = tensors["ssm_state"]
    with running("triton"):
        monkeypatch.setattr(tickets, "is_capturing", lambda t: True)
        mamba_mixer_step(**tensors, **plain)
        assert state.untyped_storage() not in tickets._TICKETS
        monkeypatch.undo()
        mamba_mixer_step(**tensors, **plain)
        (kept,) = tickets._TICKETS[state.untyped_storage()].values()
        mamba_mixer_step(**tensors, **plain)
    assert tickets.tickets(state) is kept and not kept.any()


def test_tickets_are_zeroed_once_for_many_states(monkeypatch):
    """A step of a new view, or of a new state, starts nothing but the step. No two states have tickets in common."""
    monkeypatch.setattr(tickets, "_ZEROED", {})
    cache = torch.zeros(3, 5, 4, 8, 16)  # of three layers
    new, first = torch.zeros(2, 7, 3, 3), tickets.tickets(cache[0])
    with Seen() as seen:
        again = [tickets.tickets(view) for view in (cache[0], cache.detach()[0], cache[0].view(5, 4, 16, 8))]
        others = [tickets.tickets(state) for state in (cache[1], cache[2], cache[1, 2:], new)]
    assert not seen.names and all(t is first for t in again)
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in (first, *others))
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert [t.shape for t in others] == [(5, 4), (5, 4), (3, 4), (2, 7)] and not any(t.any() for t in others)
    large = tickets.tickets(torch.zeros(tickets._AT_ONCE + 1, 1, 1, 1))
    assert large.shape == (tickets._AT_ONCE + 1, 1) and not large.any()


def test_tickets_go_with_their_state():
    state = torch.zeros(2, 3, 4, 5)
    tickets.tickets(state[1:])
    before = len(tickets._TICKETS)
    del state
    assert len(tickets._TICKETS) == before - 1


@interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", [*SMALL, WIDE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_cost_model_counts_what_moves(case, dtype, options):
    tensors, plain = arguments(case, dtype, options)
    tensors["state_batch_indices"] = torch.arange(case.b).int() if case.extra else None
    with use_backend("triton"), counted() as found, counted_arithmetic() as flops:
        mamba_mixer_step(**tensors, **plain)
    assert found == cost.forward(**tensors, **plain, target=INTERPRETER)
    assert flops == cost.forward_arithmetic(**tensors, **plain, target=INTERPRETER)
    floor = cost.forward_floor(**tensors, **plain)
    assert found["step_kernel"].loaded >= floor.loaded and found["step_kernel"].stored >= floor.stored


@interpreted
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "gate alone"])
@pytest.mark.parametrize("decay", [0.01, 1.0], ids=["slow", "fast"])
@pytest.mark.parametrize("case", [Case(2, 130, 4, 8, 16, g=2), Case(1, 19, 3, 5, 7, w=3)], ids=str)
def test_the_cost_model_of_a_sequence_counts_what_moves(case, norm, decay):
    """All of it where earlier pieces leave something; a segment reads none of those that leave nothing."""
    tensors = {"zxbcdt": rows(case, torch.float16), **weights(case, torch.float16)}
    tensors |= {} if norm else {"rmsnorm_weight": None}
    tensors["A"] = decay * tensors["A"]
    plain = {"headdim": case.p, "ngroups": case.g, "norm_before_gate": False}
    with use_backend("triton"), counted() as found:
        mamba_split_conv1d_scan_combined(**tensors, **plain, chunk_size=64)
    model = cost.sequence(**tensors, **plain, target=INTERPRETER)
    if decay < 1:
        assert found == model
    assert found.keys() == model.keys()
    for name, most in model.items():
        assert found[name].loaded <= most.loaded and found[name].stored == most.stored, name
        assert found[name].flops == most.flops, name
    floor, moved = cost.sequence_floor(**tensors, **plain), sum(found.values(), Cost())
    assert moved.loaded >= floor.loaded and moved.stored >= floor.stored


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", GPU_SEQUENCE, ids=str)
def test_a_sequence_is_four_launches_and_copies_nothing(case, arch):
    """x, B, C, z and dt are read where they lie; memory is made for what kernels write, and for nothing else."""
    with Made("meta"):
        tensors = {"zxbcdt": rows(case, torch.bfloat16), **weights(case, torch.float32)}
    with recording(TARGETS[arch]) as found, use_backend("triton"), Seen() as seen:
        mamba_split_conv1d_scan_combined(**tensors, chunk_size=256, headdim=case.p)
    assert [each.kernel.__name__ for each in found] == ["forward_kernel", "ssd_ends", "ssd_walk", "_forward"]
    assert seen.names <= {"empty", "empty_like", "empty_strided", "new_empty"}, seen.names
