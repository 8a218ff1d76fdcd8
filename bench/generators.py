"""The models that generate, one step of each, and a whole generation from a few of them (bench.integrated)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch

from omnimamba_model import MambaConfig, MambaLM, cast_matrices

from . import inputs
from .baselines.transformer import Transformer
from .integrated import Sampled, positions, sampled
from .measure import Contender, Work, relative_error
from .published import CACHED as PEER
from .published import OURS, UNCACHED
from .rates import product, seconds

TOKENS, FEW = 8, 4
"""Decode steps in one timed call; at each position of a whole generation, but one of those of LONG tokens."""
LONG = 32768
PROMPT, MORE = 24, 8
"""Tokens that a Transformer's step with a cache is checked on from the first one on; steps after a prompt."""
LONG_PROMPT = 512
"""Tokens that the others are checked on: several chunks of a scan, or a whole matrix of scores."""
DTYPES = ("bfloat16", "float32")
"""Of the Transformer's weights, and of its cache."""
TRIES, ENOUGH = 3, 2.0
"""Steps of each dtype that the faster is chosen by, and seconds after which there are no more of them."""
FARTHEST = {UNCACHED: 4096}
"""Context up to which it is chosen at the very length: without a cache a step beyond it takes many seconds."""

TOKEN = torch.tensor([7])
"""What every timed step takes in."""


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
def decoder(who: str, dtype: str, context: int, cache: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    """A function that takes one more token in at position ``context`` and returns its logits (1, vocabulary); with a
    cache of its own where that needs one and none is given."""
    network = model(who, dtype)
    if who == UNCACHED:
        return lambda: network.last(ids(context + 1))
    if who == PEER:
        held = cache_of(who, dtype, context + 1) if cache is None else cache
        return functools.partial(network.step, TOKEN, held, context)
    state = network.backbone.new_state(1)
    state.ssm.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    state.position = context
    step = network.backbone.bind_step(state)
    return torch.inference_mode()(lambda: network.head(step(network.backbone.embedding(TOKEN))))


def cache_of(who: str, dtype: str, length: int) -> torch.Tensor | None:
    """A cache of so many positions, full of noise, where there is one."""
    return filled(model(who, dtype).new_cache(1, length)) if who == PEER else None


def filled(cache: torch.Tensor) -> torch.Tensor:
    """The cache full of noise, which repeats: to draw gigabytes takes minutes."""
    flat = cache.view(-1)
    noise = torch.randn(min(2**20, len(flat)), generator=torch.Generator().manual_seed(0)).to(cache)
    for piece in flat.split(len(noise)):
        piece.copy_(noise[: len(piece)])
    return cache


@functools.cache
@torch.inference_mode()
def step_error(who: str, dtype: str) -> float:
    """The last step of a prompt against its definition with the same weights in fp32.

    With a cache: token by token against the whole of it at once; while it is timed it is looked at where it then is
    (``cached_error``). With a state: the last MORE after a prefill. Without either: the whole matrix of scores."""
    network, prompt = model(who, dtype), ids(PROMPT if who == PEER else LONG_PROMPT)
    if who == UNCACHED:
        return relative_error(network.last(prompt), network.plain_last(prompt))
    if who == PEER:
        cache = network.new_cache(1, PROMPT)
        steps = [network.step(token, cache, i) for i, token in enumerate(prompt[0][:, None])]
        return relative_error(steps[-1], network.plain_last(prompt))
    wide = copy.deepcopy(network).float()
    with inputs.by_definition(wide):
        exact = wide(prompt)[:, -1]
    state = network.backbone.new_state(1)
    network.backbone.prefill(network.backbone.embedding(prompt[:, :-MORE]), state)
    step = network.backbone.bind_step(state)
    steps = [network.head(step(network.backbone.embedding(token))) for token in prompt[0][-MORE:, None]]
    return relative_error(steps[-1], exact)


def cached_error(dtype: str, cache: torch.Tensor, at: int, found: torch.Tensor) -> float:
    """The logits after TOKEN at ``at``, against the definition on the same cache."""
    return relative_error(found, model(PEER, dtype).plain_step(TOKEN, cache, at))


@functools.cache
def faster(who: str, context: int) -> str:
    """The dtype in which the Transformer's step at ``context`` takes less time: the least of TRIES of each, in turn, on
    a cache as long as that; of fewer where they take ENOUGH seconds."""
    steps = {dtype: decoder(who, dtype, context) for dtype in DTYPES}
    taken = {dtype: [] for dtype in DTYPES}
    for _ in range(TRIES):
        for dtype, step in steps.items():
            taken[dtype].append(seconds(step))
        if sum(map(sum, taken.values())) > ENOUGH:
            break
    return min(DTYPES, key=lambda dtype: min(taken[dtype]))


def dtype_of(who: str, context: float) -> str:
    """bf16 for ours; for the Transformer that in which a step at ``context`` takes it less time: some processors crawl
    at 16 bits, and a cache in them is half as long to read."""
    return "bfloat16" if who == OURS else faster(who, min(int(context), FARTHEST.get(who, int(context))))


def bound(who: str, dtype: str) -> float:
    return 2 * inputs.BOUND[torch.bfloat16 if who != OURS and dtype == "bfloat16" else torch.float32]


def contender(who: str, context: int) -> Contender:
    dtype = dtype_of(who, context)
    cache, after = cache_of(who, dtype, context + 1), None
    decode = decoder(who, dtype, context, cache)
    if who == PEER:
        after = lambda found: cached_error(dtype, cache, context, found[-1])  # noqa: E731
    run = lambda: [decode() for _ in range(TOKENS)]  # noqa: E731
    check = functools.partial(step_error, who, dtype)
    return Contender(who, run, check, bound(who, dtype), work=work(who, dtype, context, TOKENS), after=after)


def work(who: str, dtype: str, context: float, tokens: int) -> Work:
    """The weights, and the cache up to here or the state there and back, once a token. Without a cache: FLOPs."""
    network = model(who, dtype)
    if who == UNCACHED:
        return Work(
            product(getattr(torch, dtype)), flops=sum(steps * pass_flops(at + 1) for at, steps in positions(tokens))
        )
    held = 2 * network.backbone.new_state(1).nbytes if who == OURS else network.new_cache(1, 1).nbytes * context
    return Work("read", bytes=tokens * (weight_bytes(network) + held))


def pass_flops(length: int) -> float:
    """Of the Transformer's whole pass over ``length`` tokens, with scores below the diagonal, and one row of logits."""
    network = model(UNCACHED, "float32")
    table = network.table.weight.numel()
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2) - table
    return 2.0 * length * matrices + 2.0 * length**2 * network.width * len(network.blocks) + 2.0 * table


def weight_bytes(network: torch.nn.Module) -> int:
    """Every matrix is read once a token, the table as the head; int8 ones with their scales."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.nbytes for t in tensors if t.ndim == 2)


def generating(bench, who: str, total: int) -> Sampled:
    """The generation of ``total`` tokens; one cache of all positions serves every sampled step."""
    dtype = dtype_of(who, total / 2)
    cache, each, expected = cache_of(who, dtype, total), FEW if total < LONG else 1, 0.0
    steps = [(stands_for, decoder(who, dtype, at, cache)) for at, stands_for in positions(total)]
    if who == UNCACHED:
        each, speed = 1, 0.6 * bench.rates.sample("sgemm")
        expected = sum(pass_flops(at + 1) for at, _ in positions(total)) / speed
    check = functools.partial(step_error, who, dtype)
    mine = work(who, dtype, total / 2, total)
    after = functools.partial(cached_error, dtype, cache, positions(total)[-1][0]) if who == PEER else None
    return sampled(who, steps, check, bound(who, dtype), work=mine, each=each, expected=expected,
                   once=who == UNCACHED, after=after)  # fmt: skip
