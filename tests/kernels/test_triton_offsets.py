"""Addresses of the Triton kernels, proven from the compiler's first form: none is computed in 32 bits that may not hold
it. Any stride fits, in 64 bits where it must. What is taken for granted of sizes is what the host refuses otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache

import pytest
import torch
from offsets import POSITION, Reader

from omnimamba_kernels import triton_launch
from omnimamba_kernels.backends import OPS
from omnimamba_kernels.triton_launch import LONGEST, TARGETS, interpreting, recording

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("Triton interprets kernels in this process and compiles none", allow_module_level=True)

import triton_kernels

from omnimamba_kernels.report import ahead
from omnimamba_kernels.report.calls import calls
from omnimamba_kernels.ssd_scan import triton_impl as scan

ROW = scan.NEAR - 1  # the scan's longest row, see _rows
WIDEST = scan.MOST_CHANNELS


def limits(job: ahead.Job) -> dict[str, int]:
    """The most that a kernel's numbers can be. Sizes count positions of a dimension; a stride is any number."""
    constants, found = dict(job.constants), {}
    for name in job.function().arg_names:
        if not re.search(r"_[a-z]$", name) and not name.endswith("_size"):
            found[name] = LONGEST
        elif job.op == "ssd_scan" and name.endswith("_l"):
            found[name] = ROW
    if job.op == "ssd_scan":
        chunks, heads = LONGEST // 16, min(scan.MOST_HEADS, WIDEST // constants.get("P", 1))
        found |= {"h": heads, "heads": heads, "groups": min(heads, WIDEST // constants.get("N", 1)),
                  "chunks": chunks, "chunk_count": chunks, "chunks_each": chunks, "columns_block": 2**12,
                  "segments": 16, "pieces": 64, "pieces_each": 64}  # fmt: skip
    return found


@cache
def every_launch(op: str) -> list[ahead.Job]:
    """Of each kernel and each of its flags' values that calls have, the launch with the fewest constants."""
    found: dict[tuple, ahead.Job] = {}
    for job in ahead.jobs(calls(op), ["sm_90"]):
        flags = tuple((name, value) for name, value in job.constants if isinstance(value, bool | None))
        known = found.get((job.kernel, flags))
        if job.module.split(".")[1] == op and (known is None or len(job.constants) < len(known.constants)):
            found[job.kernel, flags] = job
    return list(found.values())


def read(job: ahead.Job, most: dict[str, int]) -> Reader:
    """What is found in the kernel, of whose arithmetic in 32 bits nothing was passed over."""
    kinds, text = dict(job.kinds), ahead.first_form(job)
    found = Reader(text, [name for name in job.function().arg_names if name in kinds], most)
    assert found.checked == len(re.findall(r"= arith\.(?:add|sub|mul|shl)i .*: (?:tensor<[\dx]+x)?i32>?$", text, re.M))
    return found


PARTS = {"ssd_scan": 4, "causal_conv1d": 2}  # which have most of the kernels


@pytest.mark.parametrize(("op", "part"), [(op, part) for op in OPS for part in range(PARTS.get(op, 1))])
def test_no_address_wraps(op, part):
    for job in every_launch(op)[part :: PARTS.get(op, 1)]:
        found = read(job, limits(job))
        assert found.addresses and not found.faults, f"{job.kernel}, {job.call}: {found.faults}"


def small(kernel, **kinds: str) -> ahead.Job:
    return ahead.Job("test", "test", False, "sm_90", kernel.__module__, kernel.__name__, tuple(kinds.items()), (), ())


@pytest.mark.parametrize(
    "kernel, faults",
    [("near_row", 1), ("far_row", 0), ("near_loop", 1), ("far_loop", 0), ("near_branch", 1), ("near_mask", 2)],
)
def test_a_product_that_wraps_is_seen(kernel, faults):
    job = small(getattr(triton_kernels, kernel), x="*fp32", rows="i32", stride="i32")
    found = read(job, {})
    assert len(found.faults) == faults and found.addresses
    bounded = kernel not in ("near_loop", "near_mask")  # those grow with other numbers than these
    assert not bounded or not read(job, {"rows": 2**15, "stride": 2**15}).faults


def test_the_host_refuses_what_the_proof_takes_for_granted():
    assert LONGEST <= POSITION and ROW * 64 < 2**31
    with recording(TARGETS["sm_90"]):
        assert "positions" in triton_launch.cannot_store(torch.empty(1, LONGEST + 1, device="meta"))
        assert triton_launch.cannot_store(torch.empty(1, LONGEST, device="meta")) is None
        head = torch.empty(1, device="meta")
        for h, p, g, n in ((scan.MOST_HEADS + 1, 1, 1, 1), (2**15, 2**10, 1, 1), (2**16, 1, 2**16, 512)):
            x, B = torch.empty(1, 1, h, p, device="meta"), torch.empty(1, 1, g, n, device="meta")
            assert "at most" in scan.why_not(x, head, head, B)
        assert scan.why_not(x[:, :, :64], head, head, B[:, :, :8]) is None
