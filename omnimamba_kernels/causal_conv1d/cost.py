"""What the convolution's Triton kernels load and store (triton_impl.py), against what nobody can do without."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, blocks, nbytes
from ..triton_launch import Target, settings
from .layout import alignment, channel_last

STEPS = 8  # triton_steps.STEPS
LINKS = 16  # times whose ids load_links looks at


def forward_floor(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None, *,
    return_final_states: bool, **_: object,
) -> Cost:  # fmt: skip
    """Each input once, each output once."""
    loaded = nbytes(x, weight, bias, initial_states, seq_idx)
    return Cost(loaded, nbytes(x) + return_final_states * _state(x, weight) * x.element_size())


def backward_floor(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None, *,
    return_final_states: bool, **_: object,
) -> Cost:  # fmt: skip
    dfinal = return_final_states * _state(x, weight) * x.element_size()
    return Cost(nbytes(x, x, weight, bias, initial_states, seq_idx) + dfinal, nbytes(x, weight, bias, initial_states))


def update_floor(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> Cost:
    """Every row has a slot; the state's last inputs are read, and what it takes in is written."""
    b, d, l = x.shape
    read, written = _state(x, weight), b * d * min(l, conv_state.shape[2])
    return Cost(
        nbytes(x, weight, bias) + read * conv_state.element_size(), nbytes(x) + written * conv_state.element_size()
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None, *,
    target: Target, return_final_states: bool, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """x once and the w - 1 inputs before every STEPS once more; taps and bias once for each tile of times."""
    b, d, l = x.shape
    w = weight.shape[1]
    starts, _, tiles_t, tiles_d = _walk("forward", x, target, return_final_states)
    loaded = nbytes(x) + _before(x, starts, w) + nbytes(initial_states) + b * tiles_t * nbytes(weight, bias)
    loaded += b * tiles_d * _links(seq_idx, starts, l, w)
    stored = nbytes(x)
    if return_final_states:
        kept = min(l, w - 1)
        loaded += b * d * kept * x.element_size()
        if initial_states is not None:
            loaded += b * d * (w - 1 - kept) * initial_states.element_size()
        if seq_idx is not None:
            loaded += b * tiles_d * 2 * (w - 1) * min(l, 1) * seq_idx.element_size()
        stored += _state(x, weight) * x.element_size()
    return {"forward_kernel": Cost(loaded, stored)}


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None, *,
    target: Target, return_final_states: bool, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """As forward, dy as x; what a walk's end needs of the later times once more; a part of dweight and dbias a tile."""
    b, d, l = x.shape
    w = weight.shape[1]
    states = return_final_states or initial_states is not None
    starts, span, tiles_t, tiles_d = _walk("backward", x, target, states)
    firsts = range(0, starts.stop, span)
    ends = [t + span for t in firsts]
    loaded = nbytes(x, x) + _before(x, starts, w) + nbytes(initial_states) + b * tiles_t * nbytes(weight, bias)
    again = sum(_inside(t - (w - 1), 2 * (w - 1), l) + _inside(t, w - 1, l) for t in ends)
    loaded += b * d * again * x.element_size()
    loaded += b * tiles_d * (_links(seq_idx, starts, l, w) + _links(seq_idx, ends, l, w))
    if initial_states is not None:
        loaded += b * tiles_d * _links(seq_idx, firsts, l, w)
    if return_final_states:
        reached = w - 1 if initial_states is not None else min(l, w - 1)
        loaded += b * d * reached * x.element_size()
    sums = 4 * b * tiles_t * (w + 1) * d
    return {
        "backward_kernel": Cost(loaded, nbytes(x, initial_states) + sums),
        "sum_kernel": Cost(sums, nbytes(weight, bias)),
    }


ACTIVATION, SLOPE = 4, 8  # FLOPs of SiLU, and of dy times its slope


def forward_arithmetic(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, target: Target, return_final_states: bool, activation: bool,
    **_: object,
) -> dict[str, int]:  # fmt: skip
    """A product and a sum for each tap of each output, and the activation."""
    starts, _, tiles_t, tiles_d = _walk("forward", x, target, return_final_states)
    use = _use("forward", x, target, return_final_states)
    outputs = x.shape[0] * starts.stop * tiles_d * use["BLOCK_D"]
    return {"forward_kernel": outputs * (2 * weight.shape[1] + ACTIVATION * activation)}


def backward_arithmetic(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, *, target: Target,
    return_final_states: bool, activation: bool, **_: object,
) -> dict[str, int]:  # fmt: skip
    """The forward's once more, with what a walk's end needs of later times; a product and a sum for each tap of dx and
    of dweight."""
    (b, d, _), w = x.shape, weight.shape[1]
    states = return_final_states or initial_states is not None
    starts, _, tiles_t, tiles_d = _walk("backward", x, target, states)
    use = _use("backward", x, target, states)
    positions = b * tiles_t * tiles_d * use["BLOCK_T"] * use["BLOCK_D"]
    outputs = positions * use["LOOPS"] * STEPS
    again = (2 * w + SLOPE) * activation
    found = outputs * (4 * w + again + return_final_states) + positions * (w - 1) * again
    if initial_states is not None:
        found += positions * (w - 1) * (w + return_final_states)
    use = settings("causal_conv1d", "sum", target)
    rows = blocks(b * tiles_t, use["BLOCK_P"]) * use["BLOCK_P"]
    return {"backward_kernel": found, "sum_kernel": (w + 1) * rows * blocks(d, use["BLOCK_C"]) * use["BLOCK_C"]}


def update_arithmetic(x: Tensor, weight: Tensor, *, target: Target, activation: bool, **_: object) -> dict[str, int]:
    b, d, l = x.shape
    use = settings("causal_conv1d", "update", target, elements=b * d, length=l)
    lanes = b * blocks(d, use["BLOCK_D"]) * use["BLOCK_D"]
    return {"update_kernel": lanes * l * (2 * weight.shape[1] + ACTIVATION * activation)}


def update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None, *, target: Target, **_: object,
) -> dict[str, Cost]:  # fmt: skip
    """Every row has a slot. The taps once a step, each step's inputs anew, the state once, what changes of it once."""
    b, d, l = x.shape
    w, state_len = weight.shape[1], conv_state.shape[2]
    use = settings("causal_conv1d", "update", target, elements=b * d, length=l)
    programs = b * blocks(d, use["BLOCK_D"])
    old = sum(max(0, w - 1 - t) for t in range(l))
    taken = min(l, state_len)
    moved = 0 if cache_seqlens is not None else max(0, state_len - l)
    loaded = b * d * ((l * w - old + taken) * x.element_size() + (old + moved) * conv_state.element_size())
    loaded += b * (l * nbytes(weight) + nbytes(bias))
    loaded += sum(programs * t.element_size() for t in (cache_seqlens, conv_state_indices) if t is not None)
    return {"update_kernel": Cost(loaded, nbytes(x) + b * d * (taken + moved) * conv_state.element_size())}


def varlen_states(x: Tensor, cu_seqlens: Tensor, *, target: Target, state_len: int) -> dict[str, Cost]:
    """No sequence is shorter than its state."""
    sequences, d = cu_seqlens.shape[0] - 1, x.shape[1]
    use = settings("causal_conv1d", "varlen_states", target)
    programs = sequences * blocks(d, use["BLOCK_D"]) * blocks(state_len, use["BLOCK_S"])
    states = sequences * d * state_len * x.element_size()
    return {"varlen_states_kernel": Cost(states + 2 * programs * cu_seqlens.element_size(), states)}


def _walk(kernel: str, x: Tensor, target: Target, states: bool) -> tuple[range, int, int, int]:
    """The times at which STEPS begin in a row of tiles, the times of a position, and the number of tiles."""
    _, d, l = x.shape
    use = _use(kernel, x, target, states)
    span = use["LOOPS"] * STEPS
    tiles_t = max(1, blocks(l, span * use["BLOCK_T"]))
    return range(0, tiles_t * use["BLOCK_T"] * span, STEPS), span, tiles_t, blocks(d, use["BLOCK_D"])


def _use(kernel: str, x: Tensor, target: Target, states: bool) -> dict[str, int]:
    sizes = dict(time_last=int(not channel_last(x)), states=int(states), length=x.shape[2], elements=x.numel())
    return settings("causal_conv1d", kernel, target, **sizes, aligned=alignment(x) * x.element_size())


def _before(x: Tensor, starts: range, w: int) -> int:
    """The bytes of the w - 1 inputs before each start."""
    return x.shape[0] * x.shape[1] * x.element_size() * sum(_inside(t - (w - 1), w - 1, x.shape[2]) for t in starts)


def _links(seq_idx: Tensor | None, starts: range | list[int], l: int, w: int) -> int:
    """The bytes of ids that one program of a row looks at, were it the row's only one."""
    if seq_idx is None:
        return 0
    ids = sum(_reached(t, l) + sum(_reached(t - j, l) for j in range(w)) for t in starts)
    return seq_idx.element_size() * ids


def _reached(first: int, l: int) -> int:
    """How many of LINKS times from ``first`` on have an id, those before time 0 that of time 0."""
    return max(0, min(first + LINKS, l) - first) if l else 0


def _inside(first: int, count: int, l: int) -> int:
    """How many of ``count`` times from ``first`` on lie within the l times."""
    return max(0, min(first + count, l) - max(first, 0))


def _state(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * x.shape[1] * (weight.shape[1] - 1)
