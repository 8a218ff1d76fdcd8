"""The CUDA scan beyond what every back end is asked: its schedules, its kernel for Hopper, what it leaves to others."""

from types import SimpleNamespace

import emulated
import pytest
import torch
from common import check, evaluate, running, runs, same_bits
from counting import Seen
from test_ssd_scan import CROSSED, GRADS, exact, scan

from omnimamba_kernels import cuda
from omnimamba_kernels.ssd_scan.cases import Case
from omnimamba_kernels.ssd_scan.cuda_impl import too_large, why_not

needs_emulator = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
RUNS = [run for run in runs("ssd_scan") if run in ("cuda-emulated90", "cuda")]
SLOW = 0.01, 0.05  # steps so small that a chunk sees what earlier ones left
HOPPER = (
    Case("two heads", 1, 150, 2, 64, n=128, skip=1, gate=True, initial_states=True),
    Case("three heads a group, packed with padding", 2, 130, 6, 64, g=2, n=64, skip=2, gate=True, initial_states=True,
         sequences="seq_idx"),
    Case("two halves of a head", 1, 150, 1, 128, n=128, skip=2, limit=SLOW),
    Case("a half that is half empty", 2, 67, 3, 96, n=96, skip=1, initial_states=True),
    Case("heads of whole tiles in an odd row", 2, 67, 3, 64, n=72, skip=1, limit=SLOW),
    Case("two parts of the states", 1, 260, 2, 64, n=256, skip=1, gate=True, limit=SLOW, initial_states=True),
    Case("packed by offsets", 1, 170, 3, 40, n=34, skip=1, initial_states=True, sequences="cu_seqlens"),
    Case("eight chunks", 1, 500, 2, 64, n=128, gate=True, limit=SLOW),
    Case("segments", 1, 700, 1, 32, n=64, skip=1, limit=SLOW, initial_states=True),
    Case("two halves of a head with few states", 1, 70, 2, 128, n=64, gate=True, initial_states=True),
    Case("two halves of a head, two parts of the states", 1, 70, 1, 128, n=256, skip=2, gate=True, limit=SLOW,
         sequences="seq_idx"),
    Case("whole tiles packed by offsets", 1, 130, 4, 64, g=2, n=128, skip=2, gate=True, initial_states=True,
         sequences="cu_seqlens"),
    *(Case(f"states that outweigh what {l} positions add", 1, l, 5, 64, n=128, skip=2, limit=SLOW, initial_states=True)
      for l in (70, 100)),
)  # fmt: skip
BACKWARD = (
    Case("five heads", 1, 70, 5, 64, n=128, skip=2, limit=(0.05, 0.2), initial_states=True),
    Case("two batch rows, packed with padding", 2, 130, 6, 64, g=2, n=64, skip=1, initial_states=True,
         sequences="seq_idx"),
    *CROSSED,
    Case("two halves of a head", 1, 70, 3, 128, n=64, skip=2, limit=(0.02, 0.1), initial_states=True),
    Case("a half that is half empty, packed with padding", 1, 100, 2, 96, n=96, skip=1, initial_states=True,
         sequences="seq_idx"),
)  # fmt: skip
PACKED, PARTS, EIGHT = HOPPER[1], HOPPER[5], HOPPER[7]


def orders(seeds: int) -> list[tuple[int, bool]]:
    """Each seed with copies that land when they are waited for, every second also with copies that land at once."""
    return [(seed, False) for seed in range(seeds, 0, -1)] + [(seed, True) for seed in range(2, seeds + 1, 2)]


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """So that a sequence is not cut: a block's stages and buffers of scores come round again and again."""
    monkeypatch.setattr(cuda, "limits", lambda _: (1, emulated.SHARED[90]))


@pytest.mark.parametrize("case", HOPPER, ids=lambda c: c.name)
def test_hoppers_kernel_matches_the_recurrence(run, case):
    wanted = GRADS if case in HOPPER[:2] else ()  # what a backward needs is saved
    check(run, scan(case.options), exact(case.options), case.tensors(torch.bfloat16), wanted)


@pytest.mark.parametrize("case", BACKWARD, ids=lambda c: c.name)
def test_hoppers_backward_matches_the_recurrence(run, case):
    if run not in RUNS:
        pytest.skip("there is neither a GPU nor the emulator")
    told = run == "cuda-emulated90"
    if told:
        emulated.started()
    check(run, scan(case.options), exact(case.options), case.tensors(torch.bfloat16), GRADS)
    assert not told or "ssd_hopper_back_chunk_kernel" in emulated.started()


@needs_emulator
@pytest.mark.parametrize("case, seeds", [(case, 3) for case in BACKWARD[:3]], ids=lambda c: getattr(c, "name", ""))
def test_hoppers_backward_gives_the_same_bits_in_any_order_of_threads(case, seeds, one_multiprocessor):
    tensors, found = case.tensors(torch.bfloat16), []
    check("cuda-emulated90", scan(case.options), exact(case.options), tensors, GRADS)
    for seed, early in orders(seeds):
        emulated.configure(seed, early_copies=early)
        with running("cuda-emulated90"):
            found.append(evaluate(scan(case.options), tensors, GRADS))
    assert all(same_bits(other[name], found[0][name]) for other in found[1:] for name in other)


@needs_emulator
def test_hoppers_backward_leaves_garbage_in_the_padding():
    case = BACKWARD[1]
    tensors = case.tensors(torch.bfloat16)
    dirty, padded = dict(tensors), tensors["seq_idx"] < 0
    for name in ("x", "dt", "B", "C"):
        dirty[name] = tensors[name].clone()
        dirty[name][padded] = float("nan")
    with running("cuda-emulated90"):
        got, plain = evaluate(scan(case.options), dirty, GRADS), evaluate(scan(case.options), tensors, GRADS)
    assert padded.any() and all(same_bits(got[name], plain[name]) for name in plain)


@needs_emulator
@pytest.mark.parametrize(
    "change",
    [{"p": 24}, {"n": 132}, {"n": 38}, {"n": 16}, {"gate": True}],
    ids=str,
)
def test_what_does_not_suit_hoppers_backward_goes_to_the_other(change):
    def kernels(**options):
        case = Case("chosen", 1, 20, 1, **{"p": 32, "n": 32} | options)
        emulated.started()
        with running("cuda-emulated90"):
            evaluate(scan(case.options), case.tensors(torch.bfloat16), ("x",))
        return emulated.started()

    assert "ssd_hopper_back_chunk_kernel" in kernels()
    found = kernels(**change)
    assert "ssd_back_chunk_kernel" in found and "ssd_hopper_back_chunk_kernel" not in found


@needs_emulator
@pytest.mark.parametrize("case, seeds", [(PACKED, 3), (PARTS, 6), (EIGHT, 12)], ids=lambda c: getattr(c, "name", ""))
def test_hoppers_kernel_gives_the_same_bits_in_any_order_of_threads(case, seeds, one_multiprocessor):
    tensors, found = case.tensors(torch.bfloat16), []
    check("cuda-emulated90", scan(case.options), exact(case.options), tensors)
    for seed, early in orders(seeds):
        emulated.configure(seed, early_copies=early)
        with running("cuda-emulated90"):
            found.append(evaluate(scan(case.options), tensors))
    assert all(same_bits(other[name], found[0][name]) for other in found[1:] for name in other)


@needs_emulator
def test_hoppers_kernel_leaves_garbage_in_the_padding():
    tensors = PACKED.tensors(torch.bfloat16)
    dirty, padded = dict(tensors), tensors["seq_idx"] < 0
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = tensors[name].clone()
        dirty[name][padded] = float("nan")
    with running("cuda-emulated90"):
        got, plain = evaluate(scan(PACKED.options), dirty), evaluate(scan(PACKED.options), tensors)
    assert padded.any() and not got["out 0"][padded].any()
    assert all(same_bits(got[name], plain[name]) for name in plain)


@needs_emulator
def test_saving_for_a_backward_changes_no_bit_on_hopper():
    tensors = PACKED.tensors(torch.bfloat16)
    with running("cuda-emulated90"):
        plain, recorded = evaluate(scan(PACKED.options), tensors), evaluate(scan(PACKED.options), tensors, GRADS)
    assert all(same_bits(plain[name], recorded[name]) for name in plain)


@needs_emulator
@pytest.mark.parametrize("case", HOPPER[-2:], ids=lambda c: c.name)
def test_what_a_chunk_adds_is_summed_apart_from_a_state_that_outweighs_it(case):
    """In the kernel for every chip, too."""
    check("cuda-emulated", scan(case.options), exact(case.options), case.tensors(torch.bfloat16))


@needs_emulator
@pytest.mark.parametrize(
    "chip, chunks", [("cuda-emulated", "ssd_back_chunk_kernel"), ("cuda-emulated90", "ssd_hopper_back_chunk_kernel")]
)
def test_the_backward_takes_three_launches_and_casts_nothing(chip, chunks):
    """Also where a group's heads are dealt out in parts; every gradient has its tensor's type."""
    case = BACKWARD[0]
    tensors = {name: t.bfloat16() if name == "dt" else t for name, t in case.tensors(torch.bfloat16).items()}
    with running(chip):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None and name in GRADS}
        y, _ = scan(case.options)(**tensors | leaves)
        emulated.started()
        dy = torch.ones_like(y)
        with Seen() as seen:
            found = torch.autograd.grad(y, list(leaves.values()), dy)
    assert emulated.started() == ["ssd_back_walk_kernel", chunks, "ssd_back_totals_kernel"]
    assert not seen.names & {"_to_copy", "copy_", "clone", "add", "sum", "zeros", "zeros_like", "zero_"}
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(found, leaves.values(), strict=True))


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chip", ["cuda-emulated", "cuda-emulated90"])
@pytest.mark.parametrize("sequences", [None, "seq_idx", "cu_seqlens"])
def test_a_head_that_forgets_all_at_once(sequences, chip, dtype):
    """A = -inf gives what -1e30 gives, beside padding, past the end of the last chunk and where no step is left too."""
    case = Case("forgets", 1, 90, 2, 32, n=32, skip=1, limit=(0.0, 0.2), initial_states=True, sequences=sequences,
                padding=9)  # fmt: skip
    tensors = case.tensors(dtype)
    tensors["dt"][0, 70, 1] = -1e4
    found = []
    for tensors["A"][1] in (-float("inf"), -1e30):
        with running(chip):
            found.append(evaluate(scan(case.options), tensors, GRADS))
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_segment_is_empty(dtype):
    """Eleven chunks for five segments: four take them all."""
    case = Case("segments", 1, 11 * (32 if dtype == torch.float32 else 64) - 4, 1, 16, n=16, limit=SLOW)
    check("cuda-emulated", scan(case.options), exact(case.options), case.tensors(dtype))


def segments(chip, p, beside=0):
    """Of 20 batch rows of two heads, on 16 multiprocessors; ``beside``: what else is in a row of x."""
    x = torch.empty(20, 512, 2 * p + beside, dtype=torch.bfloat16)[..., : 2 * p].unflatten(-1, (2, p))
    B = torch.empty(20, 512, 1, 64, dtype=torch.bfloat16)
    fields = dict(x=x, y=x, B=B, C=B, batch=20, length=512, heads=2, headdim=p, groups=1, state=64)
    with emulated.emulated(chip):
        multiprocessors, shared = cuda.limits(x.device)
        fields |= dict(multiprocessors=multiprocessors, shared_limit=shared)
        return cuda.call("ssd_scan_segments", x.device, **fields)


@needs_emulator
def test_what_suits_hopper_is_cut_for_its_kernel():
    """One block of it fills a multiprocessor, of the other kernel two do."""
    assert segments(90, 32) > segments(80, 32)
    assert segments(90, 24) == segments(80, 24)  # too narrow
    assert segments(90, 32, beside=32) > segments(80, 32)
    assert segments(90, 32, beside=8) == segments(80, 32)  # strides that the driver refuses


SMALL, LARGE = 99 << 10, 227 << 10


@pytest.mark.parametrize(
    "states, gated, shared, fits",
    [
        (256, True, LARGE, True),
        (128, False, SMALL, True),
        (64, True, SMALL, True),
        (128, True, SMALL, False),
        (256, False, SMALL, False),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_both_sizes(states, gated, shared, fits):
    reason = too_large(states, gated, shared)
    assert (reason is None) == fits
    assert fits or (str(shared) in reason and str(states) in reason)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("states, shared", [(256, SMALL), (128, SMALL), (256, LARGE)])
def test_only_what_will_have_a_backward_must_leave_it_room(monkeypatch, states, shared, gradients):
    monkeypatch.setattr(cuda, "cannot_take", lambda *_: None)
    monkeypatch.setattr(cuda, "limits", lambda _: (84, shared))
    gpu = dict(device=torch.device("cuda", 0), dtype=torch.float32)
    x = SimpleNamespace(shape=(1, 8, 2, 64), requires_grad=gradients, **gpu)
    B = SimpleNamespace(shape=(1, 8, 1, states), requires_grad=False, **gpu)
    reason = why_not(x, x, B, B, B, None, None)
    assert (reason is None) == (not gradients or states <= 128 or shared == LARGE)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_forward_fits_into_the_least_chip(dtype):
    case = Case("largest", 1, 140, 2, 128, n=256, gate=True, initial_states=True, sequences="seq_idx")
    check("cuda-emulated86", scan(case.options), exact(case.options), case.tensors(dtype))


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_that_leaves_no_room_is_refused(dtype):
    x = torch.empty(1, 8, 2, 64, dtype=dtype)
    with emulated.emulated(), pytest.raises(ValueError, match="shared_limit: no block of the scan fits"):
        sizes = dict(batch=1, length=8, heads=2, headdim=64, groups=1, state=64, shared_limit=20000)
        cuda.call("ssd_scan_segments", x.device, x=x, B=x, C=x, **sizes)
