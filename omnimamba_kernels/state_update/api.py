"""Public function of the decode step: the name and arguments of mamba_ssm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import checks
from ..backends import choose
from ..compile import traceable


def _fake(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape[0], *state.shape[1:-1], dtype=x.dtype, device=x.device)


@traceable(_fake, mutates=("state",))
@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of the selective scan; the state changes in place. Not differentiable.

    ``dt = softplus(dt + dt_bias)``, ``state = exp(dt A) state + dt x B``, ``out = (state C + D x) silu(z)``.

    Args:
        state: (b or slots, d, n), or with heads (b or slots, h, d, n); any float dtype, arithmetic in float32.
        x, dt, z: (b, d) or (b, h, d). dt, A and dt_bias may be expanded (stride 0), as tied heads have them.
        A: (d, n) or (h, d, n).
        B, C: (b, n) or (b, g, n), h a multiple of g.
            Of one head or one group any argument may lack the dimension, whatever the others have.
        D, dt_bias: (d,) or (h, d).
        dt_softplus: apply softplus (identity above 20).
        state_batch_indices: (b,) the slot of each row; a negative one is padding: output 0, no state touched.
        backend: one of ``backends()``; None chooses.

    Returns:
        out (b, d) or, where state has heads, (b, h, d), in x's dtype.

    Raises:
        ValueError: a shape or index does not fit. TypeError: a dtype does not. The state is then untouched.

    Source: Mamba-2 (arXiv 2405.21060), the recurrent form; the function of the same name in mamba_ssm.
    """
    checks.tensors(x=x, dt=dt, A=A, B=B, C=C)
    checks.rank("state", state, 3, 4, letters="(slots, d, n) or (slots, h, d, n)")
    heads = state.dim() == 4
    state = _with_heads(state, 4, 1)
    B, C = _with_heads(B, 3, 1), _with_heads(C, 3, 1)
    if state.shape[1] == 1:
        x, dt, z = (_with_heads(t, 3, 1) for t in (x, dt, z))
        A, D, dt_bias = _with_heads(A, 3, 0), _with_heads(D, 2, 0), _with_heads(dt_bias, 2, 0)
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    checks.writable(state=state)
    checks.slots("state_batch_indices", state_batch_indices, state.shape[0])
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    options = {"dt_softplus": bool(dt_softplus)}
    ((out,), _) = choose("state_update", backend, *tensors, **options).forward(*tensors, **options)
    increment_version(state)
    return out if heads else out.squeeze(1)


def _with_heads(t: Tensor | None, dims: int, place: int) -> Tensor | None:
    """t with a dimension of one head or group at ``place`` where it has none."""
    return t.unsqueeze(place) if isinstance(t, Tensor) and t.dim() == dims - 1 else t


@checks.once_a_kind
def _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices) -> None:
    checks.rank("x", x, 3, letters="(b, h, d)")
    b, h, d = x.shape
    slots = b if state_batch_indices is None else state.shape[0]
    n = state.shape[3]
    checks.shape("state", state, slots, h, d, n, letters="(slots, h, d, n)")
    checks.shape("dt", dt, b, h, d, letters="(b, h, d)")
    checks.shape("A", A, h, d, n, letters="(h, d, n)")
    checks.rank("B", B, 3, letters="(b, g, n)")
    g = B.shape[1]
    checks.shape("B", B, b, g, n, letters="(b, g, n)")
    checks.shape("C", C, b, g, n, letters="(b, g, n)")
    checks.divisible("the number of heads h", h, "the number of groups g", g)
    checks.shape("D", D, h, d, letters="(h, d)")
    checks.shape("z", z, b, h, d, letters="(b, h, d)")
    checks.shape("dt_bias", dt_bias, h, d, letters="(h, d)")
    checks.shape("state_batch_indices", state_batch_indices, b, letters="(b,)")
    checks.floating(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    checks.integer(state_batch_indices=state_batch_indices)
    checks.same_device(
        state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_batch_indices=state_batch_indices
    )
