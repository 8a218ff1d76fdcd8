"""Mamba-2's scan on the CPU: csrc/ssd_scan cuts the work, this file cuts the sequence and lends the memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native

CHUNK = 64  # kChunk in csrc/ssd_scan/layout.h
SHORT = 8  # kShort there: up to this length the plain recurrence is faster than a chunk
CONTINUES, FRESH, PADDING = 0, 1, 2  # ChunkKind in csrc/ssd_scan/ssd_scan.h


def why_not(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *tensors: Tensor | None, **_: Any) -> str | None:
    if 0 in x.shape[2:] or 0 in B.shape[2:]:
        return f"it needs at least one head, channel, group and state: x is {tuple(x.shape)}, B is {tuple(B.shape)}"
    return native.cannot_store(x, dt, A, B, *tensors)


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
    b, l, h, p = x.shape
    n = B.shape[3]
    sizes = _sizes(x, B)
    fields = _fields(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit)
    y = native.empty(x.shape, fields["x"].dtype)
    final = native.floats(b, h, p, n)
    varlen = None if cu_seqlens is None else _empty_sequences(cu_seqlens, initial_states, h, p, n)
    fields |= dict(y=y, final_states=final, varlen_states=varlen)
    if l == 0:
        final.copy_(initial_states) if initial_states is not None else final.zero_()
        saved = (x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, *[None] * 4)
        return (native.stored_as(x.dtype, y), final, varlen), saved
    if l <= SHORT and seq_idx is None and cu_seqlens is None and not save:
        native.call("ssd_scan_short", **fields, **sizes)
        return (native.stored_as(x.dtype, y), final, None), ()
    chunks, first, sizes["max_chunks"] = _cut(b, l, seq_idx, cu_seqlens, initial_states is not None)
    fields |= dict(chunks=chunks, first_chunk=first)
    states = ungated = None
    if save:
        floats = native.call("ssd_scan_state_floats", **sizes)
        states = native.floats(b, sizes["max_chunks"] + 1, h, floats)
        ungated = None if z is None else native.floats(b, l, h, p)
        fields |= dict(states=states, ungated=ungated)
    workspace = native.floats(native.call("ssd_scan_forward_workspace", states=states, **sizes))
    native.call("ssd_scan_forward", workspace=workspace, **fields, **sizes)
    saved = (x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, chunks, first, states, ungated)
    return (native.stored_as(x.dtype, y), final, varlen), saved if save else ()


def backward(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor | None, ...]:
    *inputs, cu_seqlens, chunks, first, states, ungated = saved
    x, dt, A, B, C, D, z, dt_bias, initial_states = inputs
    b, l, h, p = x.shape
    fields = _fields(*inputs, dt_softplus, dt_limit) | _sizes(x, B)
    storage = fields["x"].dtype
    types = storage, torch.float32, torch.float32
    dy, dfinal, dvarlen = (_rows(dtype, t) for t, dtype in zip(grads, types, strict=True))
    made = {
        "dx": native.empty(x.shape, storage),
        "ddt": native.floats(*dt.shape),
        "dA": native.floats(h).zero_(),
        "dB": native.empty(B.shape, storage),
        "dC": native.empty(C.shape, storage),
        "dD": native.floats(h, p).zero_(),
        "dz": None if z is None else native.empty(z.shape, storage),
        "ddt_bias": native.floats(h).zero_(),
        "dinitial_states": None if initial_states is None else native.floats(b, h, p, B.shape[3]).zero_(),
    }
    if l:
        fields |= dict(chunks=chunks, first_chunk=first, max_chunks=states.shape[1] - 1, states=states, ungated=ungated)
        fields |= dict(
            dy=torch.zeros_like(made["dx"]) if dy is None else dy, dfinal_states=dfinal, dvarlen_states=dvarlen
        )
        workspace = native.floats(native.call("ssd_scan_backward_workspace", **fields))
        native.call("ssd_scan_backward", workspace=workspace, **fields, **made)
    dinitial = made["dinitial_states"]
    if dinitial is not None:
        if l == 0 and dfinal is not None:
            dinitial += dfinal
        if dvarlen is not None and len(dvarlen) and cu_seqlens[1] == 0:
            dinitial[0] += dvarlen[0]
    dD = made["dD"] if D is None or D.dim() == 2 else made["dD"].sum(1)
    found = (*(made[f"d{name}"] for name in ("x", "dt", "A", "B", "C")), dD, made["dz"], made["ddt_bias"], dinitial)
    cast = [
        grad.to(t.dtype) if t is not None and need else None
        for t, grad, need in zip(inputs, found, needs[: len(inputs)], strict=True)
    ]
    return (*cast, None, None)


def _sizes(x: Tensor, B: Tensor) -> dict[str, int]:
    batch, length, heads, headdim = x.shape
    groups, state = B.shape[2:]
    return dict(batch=batch, length=length, heads=heads, headdim=headdim, groups=groups, state=state)


def _fields(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit) -> dict[str, Any]:
    """What forward and backward both tell the kernel: one storage type, rows without gaps, float32 for the rest."""
    storage, plain = x.dtype, torch.float32
    if not (B.dtype is C.dtype is storage and (z is None or z.dtype is storage)):
        storage = plain
    return {
        "x": _rows(storage, x),
        "dt": native.stored_as(plain, dt),
        "A": native.stored_as(plain, A),
        "B": _rows(storage, B),
        "C": _rows(storage, C),
        "D": native.stored_as(plain, D),
        "z": _rows(storage, z),
        "dt_bias": native.stored_as(plain, dt_bias),
        "initial_states": _rows(plain, initial_states),
        "dt_softplus": dt_softplus,
        "dt_low": dt_limit[0],
        "dt_high": dt_limit[1],
    }


def _rows(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    """``t`` in ``dtype`` with its last dimension side by side; most often ``t`` itself."""
    if t is None:
        return None
    t = native.stored_as(dtype, t)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _empty_sequences(cu_seqlens: Tensor, initial_states: Tensor | None, h: int, p: int, n: int) -> Tensor:
    """States for the kernel to fill, already right for sequences without positions: what they start from."""
    states = native.floats(max(cu_seqlens.numel() - 1, 0), h, p, n).zero_()
    if initial_states is not None and states.shape[0]:
        states[0] = initial_states[0]
    return states


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def _cut_evenly(b: int, l: int, continues: bool) -> tuple[Tensor, Tensor, int]:
    with torch.device("cpu"):
        start = torch.arange(0, l, CHUNK)
        each = start, (l - start).clamp(max=CHUNK), torch.zeros_like(start), torch.full_like(start, -1)
        chunks = torch.stack(each, 1)
        chunks[0, 2] = CONTINUES if continues else FRESH
        return chunks.repeat(b, 1), torch.arange(b + 1) * len(start), len(start)


def _cut(
    b: int, l: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None, continues: bool
) -> tuple[Tensor, Tensor, int]:
    """Cuts each batch row into chunks that straddle neither a change of seq_idx nor an end of cu_seqlens.

    Returns the rows (start, length, kind, sequence of cu_seqlens that ends here or -1), each batch row's first chunk,
    and the most chunks of a row. ``continues``: there are initial states, which belong to sequence 0.
    """
    if seq_idx is None and cu_seqlens is None:
        return _cut_evenly(b, l, continues)
    with torch.device("cpu"):
        return _cut_at_changes(b, l, seq_idx, cu_seqlens, continues)


def _cut_at_changes(
    b: int, l: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None, continues: bool
) -> tuple[Tensor, Tensor, int]:
    sequence = torch.zeros(b, l, dtype=torch.long) if seq_idx is None else seq_idx.long()
    changes = torch.ones(b, l, dtype=torch.bool)
    changes[:, 1:] = sequence.diff(dim=1) != 0
    cuts = changes.clone()
    if cu_seqlens is not None:
        cuts[:, cu_seqlens[cu_seqlens < l].long()] = True
    run = cuts.flatten().nonzero()[:, 0]
    length = torch.cat([run, torch.tensor([b * l])]).diff()
    pieces = (length + CHUNK - 1) // CHUNK
    which = torch.repeat_interleave(torch.arange(len(run)), pieces)
    skipped = (torch.arange(len(which)) - (pieces.cumsum(0) - pieces)[which]) * CHUNK
    at = run[which] + skipped
    row, start = at // l, at % l
    anew = changes.flatten()[at] & (skipped == 0)
    anew &= ~((start == 0) & (sequence.flatten()[at] == 0) & continues)
    kind = torch.where(anew, FRESH, CONTINUES).masked_fill(sequence.flatten()[at] < 0, PADDING)
    chunks = torch.stack([start, (length[which] - skipped).clamp(max=CHUNK), kind, torch.full_like(at, -1)], 1)
    if cu_seqlens is not None:
        filled = (cu_seqlens.diff() > 0).nonzero()[:, 0]
        ends = chunks[:, 0] + chunks[:, 1]
        chunks[torch.searchsorted(ends, cu_seqlens[1:][filled].long()), 3] = filled
    count = torch.bincount(row, minlength=b)
    return chunks, torch.cat([count.new_zeros(1), count.cumsum(0)]), int(count.max()) if b else 0
