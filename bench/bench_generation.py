"""Claim: Mamba-2 generates at the same speed and in the same memory at any length; a Transformer's cache grows.

The 130M Mamba-2 (768 wide, 24 layers, vocabulary 50288) against a Transformer of as many parameters with a static
key-value cache, random weights, batch 1. A decode step at a context of so many tokens is timed: the cache is filled
with noise up to there, since its contents do not change the time. Ours keeps bf16 weights, the
Transformer those it is faster with, bf16 or fp32: its row says which. Peak memory is a child process's:
weights, cache or state, step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

from omnimamba_kernels import use_backend
from omnimamba_model import MambaConfig, MambaLM, cast_matrices

from . import inputs, memory
from .baselines.transformer import Transformer
from .measure import Contender, Work, relative_error
from .rates import seconds
from .results import Row

GROUP = "generation"
OURS, PEER = "Mamba-2 130M", "Transformer 129M, KV cache"
CONTEXTS = (1024, 4096, 16384)
TOKENS = 8
"""Decode steps in one timed call."""
PROMPT = 24
full = pytest.mark.full


def case(context: int) -> str:
    return f"{context} tokens of context"


def ids(count: int) -> torch.Tensor:
    return torch.randint(50288, (1, count), generator=torch.Generator().manual_seed(count))


@functools.cache
def model(who: str, dtype: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if who == OURS:
        return cast_matrices(MambaLM(MambaConfig.preset("130m")), getattr(torch, dtype)).eval()
    return Transformer().to(getattr(torch, dtype)).eval()


@torch.inference_mode()
def decoder(who: str, dtype: str, context: int) -> Callable[[], torch.Tensor]:
    """A function that takes one more token in at position ``context`` and returns its logits (1, vocabulary)."""
    network, token = model(who, dtype), torch.tensor([7])
    if who == PEER:
        cache = network.new_cache(1, context + 1).normal_(generator=torch.Generator().manual_seed(0))
        return lambda: network.step(token, cache, context)
    state = network.backbone.new_state(1)
    state.ssm.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    state.position = context
    step = network.backbone.bind_step(state)
    return torch.inference_mode()(lambda: network.head(step(network.backbone.embedding(token))))


@torch.inference_mode()
def step_error(who: str, dtype: str) -> float:
    """A short prompt token by token, against the whole of it at once with the same weights in fp32."""
    network = model(who, dtype)
    with use_backend("reference"):
        exact = copy.deepcopy(network).float()(ids(PROMPT))[:, -1]
    if who == PEER:
        cache = network.new_cache(1, PROMPT)
        steps = [network.step(token, cache, i) for i, token in enumerate(ids(PROMPT)[0][:, None])]
        return relative_error(steps[-1], exact)
    step = network.backbone.bind_step(network.backbone.new_state(1))
    steps = [network.head(step(network.backbone.embedding(token))) for token in ids(PROMPT)[0][:, None]]
    return relative_error(steps[-1], exact)


@functools.cache
def peer_dtype() -> str:
    """The weights with which the Transformer takes a step in less time: some processors crawl at 16 bits."""

    def step_time(dtype: str) -> float:
        decode = decoder(PEER, dtype, 256)
        return min(seconds(decode) for _ in range(4))

    return min(("bfloat16", "float32"), key=step_time)


def contender(who: str, dtype: str, context: int) -> Contender:
    decode = decoder(who, dtype, context)
    bound = inputs.BOUND[torch.bfloat16 if who == PEER and dtype == "bfloat16" else torch.float32]
    run = lambda: [decode() for _ in range(TOKENS)]  # noqa: E731
    return Contender(who, run, lambda: step_error(who, dtype), 2 * bound, work=work(who, dtype, context))


def work(who: str, dtype: str, context: int) -> Work:
    """The weights, and the cache up to here or the state there and back, once a token."""
    network = model(who, dtype)
    held = 2 * network.backbone.new_state(1).nbytes if who == OURS else network.new_cache(1, context).nbytes
    return Work("read", bytes=TOKENS * (weight_bytes(network) + held))


def weight_bytes(network: torch.nn.Module) -> int:
    """Every matrix is read once a token, the table as the head; int8 ones with their scales."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.nbytes for t in tensors if t.ndim == 2)


@pytest.mark.parametrize("context", [CONTEXTS[0], *(pytest.param(c, marks=full) for c in CONTEXTS[1:])])
def test_decode(bench, benchmark, context):
    dtypes = {OURS: "bfloat16", PEER: peer_dtype()}
    contenders = [contender(who, dtype, context) for who, dtype in dtypes.items()]
    rows = bench.compare(benchmark, GROUP, case(context), contenders, work(OURS, "bfloat16", context), tokens=TOKENS)
    for row in rows:
        row.note = f"{dtypes[row.who]} weights"
        bench.peaks(benchmark, [row], "generation", context=context, steps=2, dtype=dtypes[row.who])


@pytest.mark.parametrize("tokens", [1024, pytest.param(131072, marks=full)])
def test_memory_is_flat(bench, tokens):
    """All that the process has at its height, in decoding so many tokens with a small model."""
    row = Row("memory", f"decode {tokens} tokens", "Mamba-2, 2 layers of width 64", reason="its memory alone counts")
    bench.rows.append(row)
    row.peak_bytes = memory.whole("decoding", tokens=tokens)
