"""Claim: a Mamba-2 layer's time grows like the length, attention's like its square; where do they cross?

One layer of width 768 each, batch 1, fp32, 512 to 1M tokens: Mamba-2 with in_proj and out_proj; causal attention (torch
SDPA) with its QKV and output projections. Very long sequences go forward piece by piece, which saves memory and costs
neither anything: Mamba-2 in segments that hand their state on, attention in blocks of queries after all keys and values
before them. Of these pieces three are measured and summed by Gauss and Legendre's rule (bench.integrated); the row's
note says so. Training holds a whole sequence. A length is left out where the time predicted from the half of it, or
the memory, exceeds what is allowed.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from omnimamba_model import BASE, MambaBackbone, MambaConfig

from . import inputs, machine
from .baselines.attention import HEADDIM, Attention, rotary
from .integrated import positions, sampled
from .measure import Contender, Work, worst_error

WIDTH = 768
LENGTHS = [2**k for k in range(9, 21)]
QUICK = {False: (1024, 2048, 4096), True: (1024, 2048)}
"""Of the forward and of training."""
FORWARD, TRAINING = "layer forward", "layer forward + backward"
OURS, PEER = "Mamba-2", "attention"
BUDGET = {False: 60.0, True: 4.0}
"""Longest predicted time of one call that is still run: a whole run, a quick one."""
IN_PIECES = {OURS: 131072, PEER: 65536}
"""Lengths from which on the forward goes piece by piece."""
PIECE = {OURS: 16384, PEER: 768}
TRAINING_BYTES = {OURS: 70_000, PEER: 40_000}
"""Held for a token by a forward that is to be differentiated, and by its backward: about."""
SLICE, LAST = 256, 16
"""Positions at the beginning that a check compares; at the end, of what was returned while it was timed."""
SEGMENT, REACH = 2048, 8192
"""Positions that the definition of ours takes in at a time up to the end, and at most in all: of a state so far back
some exp(-8) is left where it fades least, as layers are initialised (dt |A| near 0.001)."""
HELD = 16384
"""Keys of a head that are cast to fp64 at once, 8 MiB."""
States = tuple[torch.Tensor, torch.Tensor]
"""Of one layer, the convolution's and the scan's."""
full = pytest.mark.full


def case(length: int) -> str:
    return f"1 x {length}"


@functools.cache
def layers() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    mixer = MambaBackbone(MambaConfig.preset("130m", n_layer=1, vocab_size=8)).layers[0].mixer
    return {OURS: mixer, PEER: Attention(WIDTH)}


def call(name: str, layer: torch.nn.Module, u: torch.Tensor) -> torch.Tensor:
    return layer(u, BASE) if name == OURS else layer(u)


def exact(name: str, layer: torch.nn.Module, u: torch.Tensor) -> torch.Tensor:
    """The layer in fp64, from its definition."""
    layer = copy.deepcopy(layer).double()
    if name == PEER:
        return layer.plain(u)
    with inputs.by_definition(layer):
        return layer(u, BASE)


def contender(name: str, u: torch.Tensor, training: bool, expected: float) -> Contender:
    """Checked on the first positions: the output there, or the gradient of what the output there sums to.

    Ours runs over the whole length for that, in training over 16K tokens; attention above 8K over the first 4K: to save
    minutes. What either returns while it is timed is looked at afterwards, at the end of the whole length.
    """
    layer = layers()[name]
    checked = u[:, :4096] if name == PEER and u.shape[1] > 8192 else u[:, :16384] if training else u
    parameters = list(layer.parameters())
    start = u[:, :SLICE].double()

    def run(u=u):
        if not training:
            with torch.no_grad():
                return call(name, layer, u)
        leaf = u.detach().requires_grad_()
        return torch.autograd.grad(call(name, layer, leaf).square().sum(), [leaf, *parameters])

    def check() -> float:
        if not training:
            with torch.no_grad():
                return worst_error((run(checked)[:, :SLICE],), (exact(name, layer, start),))
        leaf, few = checked.detach().requires_grad_(), start.requires_grad_()
        (found,) = torch.autograd.grad(call(name, layer, leaf)[:, :SLICE].square().sum(), leaf)
        (true,) = torch.autograd.grad(exact(name, layer, few).square().sum(), few)
        return worst_error((found[:, :SLICE],), (true,))

    mine = work(name, u.shape[1], training)
    bound = inputs.BOUND[torch.float32]
    after = functools.partial(end_error, name, u, training)
    return Contender(name, run, check, bound, work=mine, expected=expected, peer=name == PEER, after=after)


def end_error(name: str, u: torch.Tensor, training: bool, found: torch.Tensor | tuple[torch.Tensor, ...]) -> float:
    """A layer over all of u at its last positions, against the definition in fp64. Of training the input's gradient:
    a position's reaches no output but its own and later ones."""
    most = min(LAST, u.shape[1])
    end = u[:, -most:].double().requires_grad_(training)
    with torch.set_grad_enabled(training):
        true = exact_end(name, u[:, :-most], end)
        if training:
            (true,) = torch.autograd.grad(true.square().sum(), end)
    return worst_error(((found[0] if training else found)[:, -most:],), (true,))


def exact_end(name: str, before: torch.Tensor, end: torch.Tensor, states: States | None = None) -> torch.Tensor:
    """The layer's outputs at ``end``, in fp64, after all that came before. Ours from ``states``, which it changes, or
    from zero REACH positions ago, in segments that hand them on in fp32."""
    layer = copy.deepcopy(layers()[name])
    if name == PEER:
        return layer.double().plain(torch.cat([before.double(), end], dim=1), end.shape[1])
    if states is None:
        before, states = before[:, -REACH:], new_states()
    with inputs.by_definition(layer):
        with torch.no_grad():
            for piece in before.split(SEGMENT, dim=1):
                layer.prefill(piece, BASE, *states, False)
        return layer.double().prefill(end, BASE, *states, False)


def segment(u: torch.Tensor, states: States, fresh: bool) -> torch.Tensor:
    """Ours on the next tokens of a sequence; ``states`` are brought up to date."""
    return layers()[OURS].prefill(u, BASE, *states, fresh)


@torch.no_grad()
def next_segment(u: torch.Tensor, states: States, begun: States, at: int) -> torch.Tensor:
    """``segment`` at any position; ``begun`` keeps the states that it came after, which are small beside it."""
    for old, new in zip(begun, states, strict=True):
        old.copy_(new)
    return segment(u, states, False)


@torch.no_grad()
def segment_error(u: torch.Tensor, begun: States, found: torch.Tensor) -> float:
    """The last positions of our segment ``u`` after the states ``begun``, against the definition."""
    true = exact_end(OURS, u[:, :-LAST], u[:, -LAST:].double(), tuple(state.clone() for state in begun))
    return worst_error((found[:, -LAST:],), (true,))


def new_states() -> States:
    """Of zeros."""
    state = MambaBackbone(MambaConfig.preset("130m", n_layer=1, vocab_size=8)).new_state(1)
    return state.conv[0], state.ssm[0]


@torch.no_grad()
def pieces_error(name: str, size: int = SLICE) -> float:
    """A short sequence in pieces against fp64: ours whole, attention at the ends of two blocks, one after all keys."""
    u = torch.randn(1, 3 * size, WIDTH, generator=torch.Generator().manual_seed(0))
    true = exact(name, layers()[name], u.double())
    if name == OURS:
        states = new_states()
        found = [segment(piece, states, i == 0) for i, piece in enumerate(u.split(size, dim=1))]
        return worst_error((torch.cat(found, 1),), (true,))
    caches = new_caches(u.shape[1])
    found = [layers()[PEER].block(u[:, at : at + size], at, *caches)[:, -1] for at in range(0, u.shape[1], size)]
    return worst_error((torch.stack(found, 1),), (true[:, size - 1 :: size],))


def new_caches(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values full of noise that repeats."""
    shape, noise = (1, WIDTH // HEADDIM, length, HEADDIM), torch.randn(min(length, 4096), HEADDIM)
    return tuple(noise.repeat(-(-length // len(noise)), 1)[:length].expand(shape).contiguous() for _ in range(2))


def in_pieces(name: str, length: int, expected: float) -> Contender:
    """The forward over ``length`` tokens from three of its pieces."""
    size = PIECE[name]
    u = torch.randn(1, size, WIDTH, generator=torch.Generator().manual_seed(length))
    if name == OURS:
        states, begun = new_states(), new_states()
        step = functools.partial(next_segment, u, states, begun)
        after = functools.partial(segment_error, u, begun)
    else:
        caches = new_caches(length)
        step = torch.no_grad()(lambda at: layers()[PEER].block(u, at, *caches))
        after = functools.partial(block_error, u, positions(length)[-1][0], *caches)
    steps = [(weight / size, functools.partial(step, at)) for at, weight in positions(length)]
    bound, mine = inputs.BOUND[torch.float32], work(name, length, False)
    taken = expected * 3 * size / length
    check = functools.partial(pieces_error, name)
    return sampled(name, steps, check, bound, work=mine, expected=taken, peer=name == PEER, after=after)


def attended_by_last(q: torch.Tensor, keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """``attended`` in q's dtype for one query, which sees all of the keys, in pieces: what one is cast to is used again
    for the next, where a million at once would be new memory each time."""
    scores = [q @ piece.to(q).transpose(-1, -2) / HEADDIM**0.5 for piece in keys]
    shares = torch.cat(scores, -1).softmax(-1).split([piece.shape[2] for piece in keys], -1)
    return sum(share @ piece.to(q) for share, piece in zip(shares, values, strict=True))


@torch.no_grad()
def block_error(u: torch.Tensor, at: int, keys: torch.Tensor, values: torch.Tensor, found: torch.Tensor) -> float:
    """The last position of attention's block ``u`` at ``at``, after all keys and values before it, against the
    definition in fp64, head by head."""
    layer, end = copy.deepcopy(layers()[PEER]).double(), at + u.shape[1]
    q, k, v = layer.project(u.double(), rotary(torch.arange(at, end)))
    last = q[:, :, -1:]
    heads = []
    for h in range(layer.heads):
        pieces = [(*old[:, [h], :at].split(HELD, 2), new[:, [h]].float()) for old, new in ((keys, k), (values, v))]
        heads.append(attended_by_last(last[:, [h]], *pieces))
    return worst_error((found[:, -1:],), (layer.join(torch.cat(heads, 1)),))


def predicted(bench, name: str, length: int, group: str) -> float | None:
    """Twice (attention: four times) the seconds of the length half as long; None where that one was not run."""
    before = next((r for r in bench.rows if (r.group, r.case, r.who) == (group, case(length // 2), name)), None)
    return (2 if name == OURS else 4) * before.seconds if before and before.seconds else None


def refused(name: str, length: int, training: bool, seconds: float | None, budget: float) -> str | None:
    """Why a length is not run, or None. Pieces are three of many, and what they take of memory is little but caches."""
    room = (machine.memory() or 2**34) / 3
    whole = training or length < IN_PIECES[name]
    needed = length * (TRAINING_BYTES[name] if training else 2 * 4 * WIDTH if name == PEER and not whole else 0)
    if needed > room:
        return f"{needed / 1e9:.0f} GB needed, {room / 1e9:.0f} GB allowed"
    if not whole:
        return None
    if seconds is None:
        return f"more predicted than {budget:.0f} s, which are allowed"
    return f"{seconds:.0f} s predicted, {budget:.0f} s allowed" if seconds > budget else None


def work(name: str, length: int, training: bool) -> Work:
    """FLOPs of projections and scan, or of projections and scores below the diagonal; a backward as two forwards."""
    config = MambaConfig.preset("130m")
    if name == OURS:
        flops = 2.0 * length * WIDTH * (config.in_proj_dim + config.d_inner)
        flops += inputs.scan_flops(1, length, config.nheads)
    else:
        flops = 2.0 * length * WIDTH * 4 * WIDTH + 2.0 * length**2 * WIDTH
    return Work("sgemm", flops=flops * (3 if training else 1))


@pytest.mark.parametrize(
    ("length", "training"),
    [
        pytest.param(n, training, id=f"{n}-{name}", marks=() if n in QUICK[training] else full)
        for n in LENGTHS
        for training, name in ((False, "forward"), (True, "training"))
    ],
)
def test_layer(bench, benchmark, length, training):
    group = TRAINING if training else FORWARD
    contenders, notes, budget = [], {}, BUDGET[bench.quick]
    first = min(QUICK[training]) if bench.quick else LENGTHS[0]
    for name in (OURS, PEER):
        guess = predicted(bench, name, length, group) if length > first else 0.0
        reason = refused(name, length, training, guess, budget)
        if reason:
            bench.absent(group, case(length), name, reason)
        elif training or length < IN_PIECES[name]:
            u = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))
            contenders.append(contender(name, u, training, guess))
        else:
            contenders.append(in_pieces(name, length, guess or 0.0))
            notes[name] = f"three pieces of {PIECE[name]} tokens measured of {length // PIECE[name]}"
    if not contenders:
        pytest.skip("no contender can run at this length")
    bench.rates.sample("fresh")
    floor, judged = work(OURS, length, training), length == 32768 and not training
    for row in bench.compare(benchmark, group, case(length), contenders, floor, tokens=length, judged=judged):
        row.note = notes.get(row.who, row.note)
