"""Public function of the decode step: the name and arguments of mamba_ssm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import checks
from ..backends import choose
from ..compile import traceable


def _fake(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
        D, dt_bias: (d,) or (h, d).
        dt_softplus: apply softplus (identity above 20).
        state_batch_indices: (b,) the slot of each row; a negative one is padding: output 0, no state touched.
        backend: one of ``backends()``; None chooses.

    Returns:
        out like x.

    Raises:
        ValueError: a shape or index does not fit. TypeError: a dtype does not. The state is then untouched.

    Source: Mamba-2 (arXiv 2405.21060), the recurrent form; the function of the same name in mamba_ssm.
    """
    checks.tensors(x=x, dt=dt, A=A, B=B, C=C)
    checks.rank("state", state, 3, 4, letters="(slots, d, n) or (slots, h, d, n)")
    heads = state.dim() == 4
    if not heads:
        one = {"x": x, "dt": dt, "B": B, "C": C, "z": z, "state": state}
        flat = {"x": 2, "dt": 2, "B": 2, "C": 2, "z": 2, "state": 3}
        for name, tensor in one.items():
            if tensor is not None:
                checks.rank(name, tensor, flat[name], letters="no head dimension, as state has none")
        for name, tensor, dims in (("A", A, 2), ("D", D, 1), ("dt_bias", dt_bias, 1)):
            if tensor is not None:
                checks.rank(name, tensor, dims, letters="no head dimension, as state has none")
        state, x, dt, B, C = (t.unsqueeze(1) for t in (state, x, dt, B, C))
        A = A.unsqueeze(0)
        z = None if z is None else z.unsqueeze(1)
        D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (D, dt_bias))
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    checks.writable(state=state)
    checks.slots("state_batch_indices", state_batch_indices, state.shape[0])
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    options = {"dt_softplus": bool(dt_softplus)}
    ((out,), _) = choose("state_update", backend, *tensors, **options).forward(*tensors, **options)
    increment_version(state)
    return out if heads else out.squeeze(1)


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
