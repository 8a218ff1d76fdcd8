"""mamba_chunk_scan_combined: steps of any size, and where a NaN may show."""

import pytest
import torch
from common import assert_within_budget, check, double, evaluate, runs, same_bits
from test_ssd_scan import GRADS, exact, oracle, scan

from omnimamba_kernels.ssd_scan.cases import Case

RUNS = runs()


@pytest.mark.parametrize("sequences", ["seq_idx", "padding", "cu_seqlens"])
def test_an_initial_state_of_no_position_reaches_nothing(run, sequences):
    """Not even a NaN: the first position is of another sequence, or padding, or the first sequence is empty."""
    case = Case("begins anew", 1, 90, 2, 16, skip=1, initial_states=True)
    tensors = case.tensors()
    if sequences == "cu_seqlens":
        tensors[sequences] = torch.tensor([0, 0, 40, 90])
    else:
        tensors["seq_idx"] = torch.ones(1, 90, dtype=torch.int32)
        tensors["seq_idx"][:, : 3 if sequences == "padding" else 0] = -1
    states = tensors.pop("initial_states")
    found = [
        evaluate(scan(case.options), tensors | {"initial_states": torch.full_like(states, value)}, GRADS)
        for value in (0.0, float("nan"))
    ]
    assert found[0].keys() == found[1].keys() and not found[0]["grad initial_states"].any()
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ["x", "B"])
def test_a_state_of_nan_ends_with_its_sequence(run, name):
    """Where the next begins with a chunk."""
    case = Case("begins anew", 1, 150, 2, 16, skip=1, sequences="seq_idx")
    tensors = case.tensors() | {"seq_idx": (torch.arange(150) >= 64).int()[None]}
    plain = evaluate(scan(case.options), tensors, GRADS)
    tensors[name] = tensors[name].clone()
    tensors[name][:, 5] = float("nan")
    found = evaluate(scan(case.options), tensors, GRADS)
    assert found["out 0"][:, 63].isnan().any() and same_bits(found["out 1"], plain["out 1"])
    for name in ("out 0", *(f"grad {name}" for name in ("x", "dt", "B", "C"))):
        assert same_bits(found[name][:, 64:].contiguous(), plain[name][:, 64:].contiguous()), name


@pytest.mark.parametrize("sequences", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "initial_states"])
def test_a_nan_of_one_sequence_stays_out_of_the_next(run, name, sequences):
    """Outside the chunks of matrix products that hold some of both."""
    if not run.startswith("native") and (run != "reference" or name == "dt"):
        pytest.skip("its sums of dt A and its products run over several sequences: 0 times NaN")
    case = Case("nan", 1, 150, 2, 16, skip=1, initial_states=True)
    tensors = case.tensors()
    ends = torch.tensor([0, 20, 150])
    tensors[sequences] = ends if sequences == "cu_seqlens" else torch.arange(2).repeat_interleave(ends.diff())[None]
    tensors[name] = tensors[name].clone()
    tensors[name][0, 2 if name != "initial_states" else 0] = float("nan")
    outputs = scan(case.options | {"return_varlen_states": sequences == "cu_seqlens"})(**tensors)
    assert outputs[0][:, 3 if name != "C" else 2 :].isnan().any()
    assert not outputs[0][:, 64:].isnan().any() and not outputs[1].isnan().any()
    assert all(not states[1].isnan().any() for states in outputs[2:])


@pytest.mark.parametrize("size", [0.0, 1e-30, 50.0, 1e30])
def test_extreme_steps(run, size):
    case = Case("extreme", 1, 140, 2, 16, skip=1, softplus=False, bias=False, initial_states=True)
    tensors = case.tensors()
    tensors["dt"] = tensors["dt"].clone()
    tensors["dt"][:, ::5] = size
    tensors["x"] = tensors["x"] * 1e-3
    if size <= 50:
        check(run, scan(case.options), exact(case.options), tensors, GRADS)
    elif run != "reference":  # whose float32 sums of dt A keep few digits beside such steps: too wide a budget
        got, right = evaluate(scan(case.options), tensors, GRADS), oracle(**tensors, **case.options)
        assert all(torch.isfinite(t).all() for t in got.values())
        torch.testing.assert_close(got["out 0"], right[0], rtol=1e-4, atol=1e23)
        torch.testing.assert_close(got["out 1"], right[1], rtol=1e-4, atol=1e22)


@pytest.mark.parametrize("size, rate", [(60.0, -1.0), (1.0, -40.0), (1.0, -3e4)])
def test_short_steps_among_those_that_nearly_wipe_out_the_state(run, size, rate):
    """One float32 of a sum of dt A over such steps keeps too few digits for the short ones. The recurrence, which sums
    nothing, is the budget's reference in float32."""
    if run == "reference":
        pytest.skip("its sums of dt A are float32")
    case = Case("wiped out", 1, 130, 2, 16, skip=1, softplus=False, bias=False, initial_states=True)
    tensors = case.tensors()
    drawn = torch.rand(2, *tensors["dt"].shape, generator=torch.Generator().manual_seed(1))
    tensors["dt"] = torch.where(drawn[0] < 0.5, size, -0.1 / rate) * drawn[1]
    tensors["A"] = torch.full_like(tensors["A"], rate)
    got = evaluate(scan(case.options), tensors, GRADS)
    low = evaluate(exact(case.options), tensors, GRADS)
    right = evaluate(exact(case.options), {name: double(t) for name, t in tensors.items()}, GRADS)
    for name in got:
        assert_within_budget(name, got[name].cpu(), low[name].cpu(), right[name].cpu())


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
def test_a_nan_shows(run, name):
    case = Case("nan", 1, 70, 2, 16, skip=1)
    tensors = case.tensors()
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    y = scan(case.options)(**tensors)[0]
    assert y[:, 1:].isnan().all()  # the first position sees no decay


@pytest.mark.parametrize("l, wanted", [(90, GRADS), (6, ())], ids=["gradients", "short"])
@pytest.mark.parametrize("sequences", [None, "seq_idx", "cu_seqlens"])
def test_a_head_that_forgets_all_at_once(run, sequences, l, wanted):
    """A = -inf gives what -1e30 gives, beside padding, past the end of the last chunk and where no step is left too."""
    case = Case("forgets", 1, l, 2, 8, skip=1, limit=(0.0, 0.2), initial_states=True, sequences=sequences,
                padding=l // 10)  # fmt: skip
    tensors = case.tensors()
    tensors["dt"][0, l * 7 // 9, 1] = -1e4
    found = []
    for tensors["A"][1] in (-float("inf"), -1e30):
        found.append(evaluate(scan(case.options), tensors, wanted))
    assert all(found[0][name].isfinite().all() and same_bits(found[0][name], found[1][name]) for name in found[0])
