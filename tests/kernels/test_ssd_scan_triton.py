"""What is special to the scan's Triton kernels: launches, that no program waits, float32 in three bfloat16."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from bfloat16 import interpreted_bfloat16
from common import check, evaluate, framed, same_bits
from counting import Seen
from test_ssd_scan import GRADS as WANTED
from test_ssd_scan import exact, scan
from test_triton_addresses import guarded

from omnimamba_kernels import checks, mamba_chunk_scan_combined, triton_launch, use_backend
from omnimamba_kernels.ssd_scan import tiles
from omnimamba_kernels.ssd_scan.cases import CASES, GPU, Case
from omnimamba_kernels.triton_launch import INTERPRETER, TARGETS, Launch, Target, interpreting, recording

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from omnimamba_kernels.report.calls import Made  # noqa: E402
from omnimamba_kernels.ssd_scan.triton_products import upper_half  # noqa: E402

interpreted = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: set TRITON_INTERPRET=1")


def launches(case: Case, target: Target, dtype: torch.dtype = torch.bfloat16, wanted: tuple[str, ...] = ()):
    """What a call starts on ``target``: forward, and where gradients are wanted backward."""
    with recording(target) as found, use_backend("triton"):
        with Made("meta"):
            tensors = case.tensors(dtype)
        leaves = {k: t.requires_grad_() if t is not None and k in wanted else t for k, t in tensors.items()}
        outputs = mamba_chunk_scan_combined(**leaves, **case.options)
        forward = list(found)
        if wanted:
            present = [leaves[k] for k in wanted if leaves[k] is not None]
            torch.autograd.grad(outputs, present, [torch.empty_like(t) for t in outputs])
    return forward, found[len(forward) :]


def names(found: list[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in found]


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sequences", [None, "seq_idx"])
def test_two_launches_forward_and_five_backward(arch, dtype, sequences):
    case = Case("all", 1, 4096, 24, 64, n=128, skip=2, gate=True, initial_states=True, sequences=sequences)
    forward, backward = launches(case, TARGETS[arch], dtype, WANTED)
    assert names(forward) == ["ssd_ends", "ssd_walk"]
    assert names(backward) == ["ssd_starts", "ssd_back_walk", "ssd_back_chunks", "ssd_back_close", "ssd_back_total"]


def test_states_after_packed_sequences_come_with_the_first_launch():
    case = Case("packed", 1, 4096, 24, 64, n=128, sequences="cu_seqlens")
    forward, backward = launches(case, TARGETS["sm_90"], wanted=WANTED)
    assert names(forward) == ["ssd_ends", "ssd_walk"] and len(backward) == 5


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
def test_offsets_of_packed_sequences_cost_no_launch(states):
    """Kernels read them as they are: beside ours nothing is started."""
    case = Case("packed", 1, 4096, 24, 64, n=128, sequences="cu_seqlens")
    with Made("meta"):
        tensors = case.tensors(torch.bfloat16)
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if k in WANTED and t is not None}
    options = case.options | {"return_varlen_states": states}
    with recording(TARGETS["sm_90"]) as found, use_backend("triton"), Seen() as seen:
        outputs = mamba_chunk_scan_combined(**tensors | leaves, **options)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(t) for t in outputs])
    assert names(found) == ["ssd_ends", "ssd_walk", "ssd_starts", "ssd_back_walk", "ssd_back_chunks", "ssd_back_close",
                            "ssd_back_total"]  # fmt: skip
    assert seen.names <= {"empty", "empty_like", "new_empty", "detach"}, seen.names


@pytest.mark.parametrize("case", [GPU[1], GPU[4]], ids=lambda c: c.name)
@pytest.mark.parametrize("arch", TARGETS)
def test_few_heads_fill_the_chip_by_cutting_the_sequence(arch, case):
    target = TARGETS[arch]
    forward, backward = launches(case, target, wanted=WANTED)
    for walk in (forward[1], backward[1]):
        programs = uncut(case, walk)
        assert walk.grid[0] % programs == 0 and walk.grid[0] >= min(target.multiprocessors, 2 * programs), walk.kernel


def uncut(case: Case, walk: Launch) -> int:
    """How many programs a walk over the whole sequence would have."""
    cut = dict(walk.constants)
    n_blocks = triton.cdiv(case.n, cut["BLOCK_N"]) if walk.kernel.__name__ == "ssd_back_walk" else 1
    return case.b * (case.h // cut.get("HEADS", 1)) * triton.cdiv(case.p, cut["BLOCK_P"]) * n_blocks


@interpreted
@pytest.mark.parametrize("case", [replace(CASES[8], b=1), CASES[9]], ids=lambda c: c.name)
def test_no_program_waits_for_another(case):
    """Each runs to its end before the next, from the first to the last or from the last to the first."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    move, start = builder.set_grid_idx, executor.__call__

    def backwards(self, *args, **named):
        (programs,) = self.grid
        with mock.patch.object(builder, "set_grid_idx", lambda x, y, z: move(programs - 1 - x, y, z)):
            return start(self, *args, **named)

    with use_backend("triton"):
        first_to_last = evaluate(scan(case.options), case.tensors(), WANTED)
        with mock.patch.object(executor, "__call__", backwards):
            last_to_first = evaluate(scan(case.options), case.tensors(), WANTED)
    assert all(same_bits(first_to_last[name], last_to_first[name]) for name in first_to_last)
    forward, backward = launches(case, INTERPRETER, torch.float32, WANTED)
    assert all(walk.grid[0] > uncut(case, walk) for walk in (forward[1], backward[1])), "not cut"


@interpreted
@pytest.mark.parametrize("sequences", [None, "seq_idx", "cu_seqlens"])
def test_gradients_cross_segments(sequences):
    """What fades slowly reaches from the last of four segments of two pieces to the first."""
    case = Case("four segments", 1, 460, 1, 16, initial_states=True, sequences=sequences)
    tensors = case.tensors()
    tensors["A"] = tensors["A"] * 0.02
    if sequences:
        name, ends = sequences, torch.tensor([0, 140, 150, 460])
        tensors[name] = ends if name == "cu_seqlens" else torch.repeat_interleave(torch.arange(3), ends.diff())[None]
    walk = launches(case, INTERPRETER, torch.float32, WANTED)[1][1]
    assert walk.grid[0] == 4 * uncut(case, walk)
    check("triton", scan(case.options), exact(case.options), tensors, WANTED)


@interpreted
@pytest.mark.parametrize("whole", [torch.int32, torch.int64], ids=str)
def test_offsets_beyond_the_end_stop_there(whole, monkeypatch):
    """As the kernels meet them on a GPU, whose offsets are not looked at before."""
    monkeypatch.setattr(checks, "offsets", lambda *_: None)
    case = Case("beyond", 1, 90, 2, 8, initial_states=True, sequences="cu_seqlens")
    tensors, found = case.tensors(), []
    for ends in ([0, 40, 90, 90], [0, 40, 120, 150]):
        tensors["cu_seqlens"] = torch.tensor(ends, dtype=whole)
        with use_backend("triton"), guarded():
            found.append(mamba_chunk_scan_combined(**tensors, **case.options))
    assert len(found[0]) == 3 and all(same_bits(a, b) for a, b in zip(*found, strict=True))


@interpreted
@pytest.mark.parametrize("ends", [[0, 70, 75, 75, 200], [0, 0, 0, 64, 130, 130], [0, 96, 128, 160, 200]], ids=str)
def test_packed_sequences_begin_and_end_anywhere(ends):
    """Within and between chunks and pieces; with empty ones at each end, and padding. Offsets of any stride."""
    case = Case("four segments", 1, 200, 1, 8, n=8, skip=1, initial_states=True, sequences="cu_seqlens")
    tensors, spread = case.tensors(), torch.full((2 * len(ends),), 10**6, dtype=torch.int32)
    tensors["A"] = tensors["A"] * 0.02
    tensors["cu_seqlens"] = spread[::2].copy_(torch.tensor(ends))
    check("triton", scan(case.options), exact(case.options), tensors, WANTED)


@interpreted
@pytest.mark.parametrize(("l", "skip"), [(40, 0), (40, 1), (200, 1)])
def test_no_sequence_is_all_padding(l, skip):
    case = Case("no sequence", 1, l, 1, 8, n=8, skip=skip, initial_states=True, sequences="cu_seqlens")
    tensors = case.tensors() | {"cu_seqlens": torch.tensor([0])}
    with use_backend("triton"):
        y, final = mamba_chunk_scan_combined(**tensors, **case.options)[:2]
    assert not y.any() and not final.any()


@interpreted
def test_many_short_sequences():
    case = Case("many", 1, 130, 2, 8, g=2, n=8, skip=1, initial_states=True, sequences="cu_seqlens")
    inner = torch.randint(0, 121, (60,), generator=torch.Generator().manual_seed(1))
    tensors = case.tensors() | {"cu_seqlens": torch.cat([inner.new_tensor([0, 120]), inner]).sort().values}
    check("triton", scan(case.options), exact(case.options), tensors, WANTED)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name, at", [("x", (0, 100, 1, 3)), ("B", (0, 100, 0, 3)), ("C", (0, 100, 0, 3)),
                                      ("dt", (0, 100, 1))])  # fmt: skip
def test_an_infinity_leaves_its_chunk_only_where_the_recurrence_takes_it(name, at, dtype):
    """Where 0 times it is added to what comes before it in its chunk of 64; the state has it where it belongs alone."""
    case = Case("infinity", 1, 150, 2, 16, skip=1)
    tensors = case.tensors(dtype)
    tensors[name][at] = float("inf")
    with use_backend("triton"), np.errstate(invalid="ignore"):
        y, final = mamba_chunk_scan_combined(**tensors, **case.options)
    low = {k: None if t is None else t.double() for k, t in tensors.items()}
    want, want_final = exact(case.options)(**low)
    must = ~want.isfinite()
    may = must.clone()
    if name != "C":
        may[:, 64:100] |= must[:, 100:101]
    assert torch.equal(final.isfinite(), want_final.isfinite()) and must.any() and not must.all()
    assert not y[must].isfinite().any() and y[~may].isfinite().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sequences", [None, "seq_idx", "cu_seqlens"])
def test_a_head_that_forgets_all_at_once(sequences, dtype):
    """A = -inf gives what -1e30 gives, beside padding, past the end of the last chunk and where no step is left too."""
    case = Case("forgets", 1, 90, 2, 8, skip=1, limit=(0.0, 0.2), initial_states=True, sequences=sequences, padding=9)
    tensors = case.tensors(dtype)
    tensors["dt"][0, 70, 1] = -1e4
    found = []
    for tensors["A"][1] in (-float("inf"), -1e30):
        with use_backend("triton"):
            found.append(evaluate(scan(case.options), tensors, WANTED))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    if dtype is torch.float32:
        check("triton", scan(case.options), exact(case.options), tensors, WANTED)


ODD = (
    Case("whole chunks, odd sizes, heads in pairs", 1, 128, 4, 24, g=2, n=20, skip=1),
    Case("whole chunks, odd sizes", 1, 128, 3, 5, n=35, skip=1, gate=True, initial_states=True),
)


@interpreted
@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_whole_chunks_of_odd_sizes(case):
    """Where no position is outside a tile, channels and states may be."""
    tensors = {name: None if t is None else framed(t).tensor for name, t in case.tensors().items()}
    check("triton", scan(case.options), exact(case.options), tensors, WANTED)
    with use_backend("triton"), guarded():
        mamba_chunk_scan_combined(**tensors, **case.options)


LARGE = (
    Case("256 states", 1, 70, 2, 16, n=256, skip=1, initial_states=True),
    Case("heads of 128 channels", 1, 40, 2, 128, gate=True),
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
def test_many_states_and_wide_heads(case, dtype):
    check("triton", scan(case.options), exact(case.options), case.tensors(dtype), WANTED)


@triton.jit
def split(v, found, N: tl.constexpr):
    i = tl.arange(0, N)
    rest = tl.load(v + i)
    for k in tl.static_range(3):
        upper, part = upper_half(rest)
        tl.store(found + k * N + i, part.to(tl.float32))
        rest -= upper


@pytest.mark.skipif(triton_launch.why_not() is not None, reason=str(triton_launch.why_not()))
def test_three_bfloat16_hold_every_digit_of_float32():
    v = torch.randn(256) * torch.logspace(-30, 30, 256)
    parts = torch.empty(3, 256)
    if not interpreting():
        v, parts = v.cuda(), parts.cuda()
    triton_launch.launch(split, (1,), v, parts, N=256)
    assert torch.equal(parts, parts.bfloat16().float())
    assert torch.equal(parts.double().sum(0), v.double())


@interpreted
@pytest.mark.parametrize("case", [CASES[4], CASES[7], CASES[9]], ids=lambda c: c.name)
def test_bfloat16_on_16_bit_matrix_units(case):
    """What the interpreter does not run otherwise: bfloat16 operands as they are, float32 ones in three parts."""
    with interpreted_bfloat16(), mock.patch.object(tiles, "narrow_forward", lambda *_: True):
        check("triton", scan(case.options), exact(case.options), case.tensors(torch.bfloat16), WANTED)
