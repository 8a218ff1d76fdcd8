"""Definition of Mamba-2's scan, computed chunk by chunk.

    dt = clamp(softplus(dt + dt_bias), dt_limit)
    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T          state (p, n) of a head, from initial_states or zero
    y_t = (S_t C_t + D x_t) * silu(z_t)

Within a chunk y = (L o C B^T) (dt x) with L_ts = exp(sum of dt A over s < r <= t), t >= s; chunks hand the state on. A
run of equal ``seq_idx`` is a sequence: the state restarts at each. Index -1 is padding: no state, output 0. What comes
before the first position counts as sequence 0. Source: Mamba-2 (arXiv 2405.21060), sections 3 and 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _pieces(l: int, chunk_size: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Chunks [start, end), broken where a packed sequence ends."""
    ends = [l] if cu_seqlens is None else [*cu_seqlens.tolist()[1:], l]
    pieces, start = [], 0
    for end in ends:
        pieces += [(s, min(s + chunk_size, end)) for s in range(start, end, chunk_size)]
        start = end
    return pieces


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple]:
    out_dtype = x.dtype
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, l, h, p = x.shape
    n = B.shape[3]
    x, dt, A, B, C = (t.to(compute) for t in (x, dt, A, B, C))
    if seq_idx is not None:  # whatever padding holds, no result and no gradient sees it
        pad = (seq_idx < 0)[..., None]
        dt = dt.masked_fill(pad, 0.0)
        x, B, C, z = (None if t is None else t.masked_fill(pad[..., None], 0.0) for t in (x, B, C, z))
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    if seq_idx is None:
        run = torch.zeros(b, l, dtype=torch.long, device=x.device)
    else:
        run = (F.pad(seq_idx, (1, 0)).diff(dim=1) != 0).cumsum(1)
        dt = dt.masked_fill(pad, 0.0)
    state = x.new_zeros(b, h, p, n) if initial_states is None else initial_states.to(compute)
    # Cut where exp is 0: no sum is infinite then. A = -inf forgets all in any step, but in one of 0 nothing.
    xdt, a = x * dt[..., None], (dt * A.clamp(min=-1e30)).clamp(min=-1000.0)
    before = run.new_zeros(b, 1)
    ys, ended = [], {0: state}
    for start, end in _pieces(l, chunk_size, cu_seqlens):
        at = slice(start, end)
        y, state = _chunk(state, xdt[:, at], a[:, at].cumsum(1), B[:, at], C[:, at], run[:, at], before)
        before, ended[end] = run[:, end - 1 : end], state
        ys.append(y)
    y = torch.cat(ys, dim=1) if ys else x.new_zeros(b, 0, h, p)
    if D is not None:
        y = y + x * (D[:, None] if D.dim() == 1 else D).to(compute)
    if z is not None:
        y = y * F.silu(z.to(compute))
    if seq_idx is not None:
        y = y.masked_fill(pad[..., None], 0.0)
    varlen = None if cu_seqlens is None else _varlen(ended, cu_seqlens.tolist())
    return (y.to(out_dtype).contiguous(), state.contiguous(), varlen), ()


def _chunk(
    state: Tensor, xdt: Tensor, total: Tensor, B: Tensor, C: Tensor, run: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """y (b, q, h, p) and the next state (b, h, p, n) of q positions; ``total`` (b, q, h) sums dt A from their start,
    ``run`` numbers the sequences, ``before`` is the one that the state comes from."""
    g = B.shape[2]
    by_group = (g, total.shape[2] // g)
    xdt = xdt.unflatten(2, by_group)
    same = run[:, :, None] == run[:, None]
    mask = (same & same.new_ones(same.shape[1:]).tril()).unsqueeze(-1)
    decay = (total[:, :, None] - total[:, None]).masked_fill(~mask, -torch.inf).exp().unflatten(3, by_group)
    scores = torch.einsum("btgn,bsgn->btsg", C, B)
    y = torch.einsum("btsg,btsgh,bsghp->btghp", scores, decay, xdt)
    # What another sequence's state holds, a NaN too, is left out: 0 times it would be one.
    begun, ended = (run != before)[..., None, None], (run != run[:, -1:])[..., None, None]
    carried = total.exp().unflatten(2, by_group)
    state = state.masked_fill(begun[:, 0, ..., None], 0.0).unflatten(1, by_group)
    y = y + torch.einsum("btgn,bghpn,btgh->btghp", C, state, carried).masked_fill(begun[..., None], 0.0)
    left = xdt * decay[:, -1, ..., None]  # first: einsum goes from left to right, and would write out each s's p x n
    left, B = left.masked_fill(ended[..., None], 0.0), B.masked_fill(ended, 0.0)
    carried = (state * carried[:, -1, ..., None, None]).masked_fill(begun[:, -1, ..., None, None], 0.0)
    state = torch.einsum("bsgn,bsghp->bghpn", B, left) + carried
    return y.flatten(2, 3), state.flatten(1, 2)


def _varlen(ended: dict[int, Tensor], offsets: list[int]) -> Tensor:
    """The state after each packed sequence; an empty one has the state it starts from."""
    blank = torch.zeros_like(ended[0][0])
    spans = enumerate(zip(offsets, offsets[1:], strict=False))
    states = [ended[end][0] if end > start or i == 0 else blank for i, (start, end) in spans]
    return torch.stack(states) if states else blank.new_zeros(0, *blank.shape)
