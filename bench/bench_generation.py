"""Claim: Mamba-2 generates at the same speed and in the same memory at any length; a Transformer's cache grows.

The 130M Mamba-2 (768 wide, 24 layers, vocabulary 50288) against a Transformer of as many parameters, random weights,
batch 1, in two protocols: the fair one, a static key-value cache, and that of the paper, whose Transformer
has no cache and computes the whole sequence again for each token. ``test_decode`` times a decode step at a
context of so many tokens; ``test_whole`` the generation of so many tokens, from three steps (bench.integrated).
A cache is filled with noise, since its contents do not change the time. Ours keeps bf16 weights, the
Transformer those it is faster with at that length, bf16 or fp32: its row says which. Peak memory is a child process's:
weights, cache or state, step; measured of the whole generation, at its last token.
"""

from __future__ import annotations

import functools
import gc

import pytest
import torch

from . import machine, memory
from .generators import TOKENS, case, contender, dtype_of, generating, model, pass_flops, work
from .integrated import POSITIONS, positions
from .published import CACHED as PEER
from .published import FIGURE_1, MEMORY_AT, MEMORY_CASE, MEMORY_GROUP, OURS, SPEED_CASE, UNCACHED, WHOLE, whole_case
from .rates import product
from .results import Row

GROUP = "generation"
CONTEXTS = (1024, 4096, 16384)
LENGTHS = (1024, *FIGURE_1)
LONGEST_UNCACHED = 16384
FLAT = (1024, 131072)
"""Tokens decoded with a small model, in which memory must not grow."""
full = pytest.mark.full


@pytest.mark.parametrize("context", [CONTEXTS[0], *(pytest.param(c, marks=full) for c in CONTEXTS[1:])])
def test_decode(bench, benchmark, context):
    contenders = [contender(who, context) for who in (OURS, PEER)]
    first = work(OURS, dtype_of(OURS, context), context, TOKENS)
    rows = bench.compare(benchmark, GROUP, case(context), contenders, first, tokens=TOKENS)
    for row in rows:
        row.note = f"{dtype_of(row.who, context)} weights"


@pytest.mark.parametrize("total", [LENGTHS[0], *(pytest.param(n, marks=full) for n in LENGTHS[1:])])
def test_whole(bench, benchmark, total):
    """Ours, with a cache, and as far as it ends in minutes without one."""
    room = (machine.memory() or 2**34) / 2
    dtype = functools.partial(dtype_of, context=total / 2)
    held = lambda dtype: model(PEER, dtype).new_cache(1, 1).nbytes * total  # noqa: E731
    needed = 1.5 * held("bfloat16")  # half of the positions in both dtypes, to choose by
    if needed < room:
        needed = held(dtype(PEER))
    contenders = [generating(bench, OURS, total)]
    if needed < room:
        contenders.append(generating(bench, PEER, total))
    else:
        bench.absent(WHOLE, whole_case(total), PEER, f"a cache of {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB allowed")
    first = work(OURS, dtype(OURS), total / 2, total)
    if total <= LONGEST_UNCACHED:
        contenders.append(generating(bench, UNCACHED, total))
    else:
        bench.absent(WHOLE, whole_case(total), UNCACHED, too_long(bench, total))
    judged = whole_case(total) == SPEED_CASE
    rows = bench.compare(benchmark, WHOLE, whole_case(total), contenders, first, tokens=total, judged=judged)
    contenders.clear()
    gc.collect()  # and with them the cache: the child that measures memory has one of its own
    for row in rows:
        row.note = f"{dtype(row.who)} weights; {POSITIONS} steps measured, summed by Gauss and Legendre's rule"
    if not bench.quick:
        own = lambda row: {"steps": steps_held(row.who), "dtype": dtype(row.who)}  # noqa: E731
        bench.peaks(benchmark, rows, "generation", own, context=total - 1)


def steps_held(who: str) -> int:
    """Tokens that a child takes in to measure its memory: without a cache one, which is a pass over all of them."""
    return 1 if who == UNCACHED else 2


def too_long(bench, total: int) -> str:
    """Why no Transformer without a cache is timed here: what it would take if it were as fast as the matrix rate of its
    own dtype."""
    kind = product(getattr(torch, dtype_of(UNCACHED, total / 2)))
    passes = [(n, pass_flops(at + 1) / bench.rates.sample(kind)) for at, n in positions(total)]
    measured, whole = sum(taken for _, taken in passes), sum(n * taken for n, taken in passes)
    return (
        f"the {POSITIONS} steps of a round would take {measured:.0f} s at least, all of them {whole / 86400:.1f} days"
    )


def test_memory(bench):
    """Rows without a time. A process' whole memory in decoding few and many tokens with a small model, the many in a
    whole run alone; and of a generation of MEMORY_AT tokens, all in bf16 but without a cache, where one pass gives the
    last token and takes minutes in a slow type."""
    alone = dict(reason="its memory alone counts")
    found, wanted = [], []
    for tokens in FLAT[: 1 if bench.quick else None]:
        found.append(Row(MEMORY_GROUP, f"decode {tokens} tokens", "Mamba-2, 2 layers of width 64", **alone))
        wanted.append(functools.partial(memory.whole, "decoding", tokens=tokens))
    for who in () if bench.quick else (OURS, PEER, UNCACHED):
        steps, dtype = steps_held(who), dtype_of(who, MEMORY_AT) if who == UNCACHED else "bfloat16"
        found.append(Row(MEMORY_GROUP, MEMORY_CASE, who, note=f"{dtype} weights", **alone))
        given = dict(who=who, context=MEMORY_AT - 1, steps=steps, dtype=dtype)
        wanted.append(functools.partial(memory.peak, "generation", **given))
    bench.rows += found
    peaks = memory.abreast(wanted)
    for row, peak in zip(found, peaks, strict=True):
        row.peak_bytes = None if peak.exception() else peak.result()
    assert all(peak.result() for peak in peaks)
