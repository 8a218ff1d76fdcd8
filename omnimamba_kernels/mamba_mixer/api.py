"""Public functions of Mamba-2's mixer: the whole sequence under mamba_ssm's name, and one decode step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import checks
from ..backends import choose
from ..causal_conv1d.api import causal_conv1d_fn
from ..compile import traceable
from ..gated_norm.api import rmsnorm_fn
from ..lora_linear.api import lora_linear
from ..ssd_scan.api import mamba_chunk_scan_combined


def _head_sizes(A: Tensor, D: Tensor | None, headdim: int | None) -> tuple[int, int]:
    checks.rank("A", A, 1, letters="(h,)")
    if D is not None:
        checks.is_tensor("D", D)
    if headdim is None:
        if D is None or D.dim() != 2:
            raise ValueError(
                "headdim: got None, which is only possible where D (h, p) tells it; pass the width of a head"
            )
        headdim = D.shape[1]
    checks.whole("headdim", headdim, 1)
    return A.shape[0], headdim


def _non_ssm_width(zxbcdt: Tensor, dim: int, state_columns: int, h: int) -> int:
    """Half the width of the leading columns that bypass the scan."""
    rest = zxbcdt.shape[-1] - 2 * dim - state_columns - h
    if rest < 0 or rest % 2:
        raise ValueError(
            f"zxbcdt: got {zxbcdt.shape[-1]} columns, expected 2 d_nonssm + 2 dim + 2 g n + h = 2 d_nonssm + "
            f"{2 * dim + state_columns + h} (dim {dim}, 2 g n {state_columns}, h {h})"
        )
    return rest // 2


def _check_floats(**tensors: Tensor | None) -> None:
    checks.dense(**tensors)
    checks.floating(**tensors)
    checks.same_device(**tensors)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer after its input projection: split, convolution, scan, gate and norm, output projection.

    Args:
        zxbcdt: (b, l, 2 d_nonssm + 2 dim + 2 g n + h), dim = h p, in the order [z0, x0, z, x, B, C, dt];
            silu(z0) x0 goes in front of the mixer's own output.
        conv1d_weight: (dim + 2 g n, w). conv1d_bias: (dim + 2 g n,).
        dt_bias, A: (h,). D: (h,) or (h, p). Softplus is always applied to dt + dt_bias.
        chunk_size, initial_states (b, h, p, n), seq_idx (b, l), dt_limit: as in ``mamba_chunk_scan_combined``.
        return_final_states: also return the scan's last state (b, h, p, n).
        activation: of the convolution, None, "silu" or "swish".
        rmsnorm_weight: (dim,): the gated RMSNorm over groups of dim / g; None: gate by silu(z) alone.
        outproj_weight: (out, d_nonssm + dim). outproj_bias: (out,).
        headdim: p; needed where D is (h,) or None.
        ngroups: g.
        norm_before_gate: the order of norm and gate.
        state_dtype: dtype of the returned state; None: float32.
        backend: one of ``backends()``; None chooses.

    Returns:
        (b, l, d_nonssm + dim), or (b, l, out) with an output projection; then the final states if asked for.
        Gradients reach every floating argument.

    Raises:
        ValueError: a shape does not fit. TypeError: a dtype does not. RuntimeError: the backend cannot run.

    Source: Mamba-2 (arXiv 2405.21060), section 7; the function of the same name in mamba_ssm.
    """
    _check_floats(zxbcdt=zxbcdt, conv1d_weight=conv1d_weight, conv1d_bias=conv1d_bias, rmsnorm_weight=rmsnorm_weight,
                  outproj_weight=outproj_weight, outproj_bias=outproj_bias)  # fmt: skip
    checks.rank("zxbcdt", zxbcdt, 3, letters="(b, l, 2 d_nonssm + 2 dim + 2 g n + h)")
    h, p = _head_sizes(A, D, headdim)
    dim = h * p
    checks.rank("conv1d_weight", conv1d_weight, 2, letters="(dim + 2 g n, w)")
    checks.one_of("conv1d_weight's width w", conv1d_weight.shape[1], 2, 3, 4)
    checks.whole("ngroups", ngroups, 1)
    state_columns = conv1d_weight.shape[0] - dim
    if state_columns < 2 * ngroups or state_columns % (2 * ngroups):
        raise ValueError(
            f"conv1d_weight: got {conv1d_weight.shape[0]} channels, expected dim + 2 g n with dim {dim} and g {ngroups}"
        )
    checks.shape("conv1d_bias", conv1d_bias, dim + state_columns, letters="(dim + 2 g n,)")
    checks.shape("rmsnorm_weight", rmsnorm_weight, dim, letters="(dim,)")
    rmsnorm_eps = checks.number("rmsnorm_eps", rmsnorm_eps, 0.0)
    extra = _non_ssm_width(zxbcdt, dim, state_columns, h)
    checks.shape("outproj_weight", outproj_weight, None, extra + dim, letters="(out, d_nonssm + dim)")
    if outproj_bias is not None:
        if outproj_weight is None:
            raise ValueError("outproj_bias: got one without outproj_weight; pass both, or neither")
        checks.shape("outproj_bias", outproj_bias, outproj_weight.shape[0], letters="(out,)")
    z0, x0, z, xBC, dt = zxbcdt.split([extra, extra, dim, dim + state_columns, h], dim=-1)
    xBC = causal_conv1d_fn(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation, backend=backend
    ).transpose(1, 2)
    x, B, C = xBC.split([dim, state_columns // 2, state_columns // 2], dim=-1)
    gated = None if rmsnorm_weight is not None else z.unflatten(-1, (h, p))
    y, states = mamba_chunk_scan_combined(
        x.unflatten(-1, (h, p)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=gated,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
        backend=backend,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate, backend=backend)
    if extra:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    if outproj_weight is not None:
        y = lora_linear(y, outproj_weight, bias=outproj_bias, backend=backend)
    return (y, states) if return_final_states else y


def _fake_step(zxbcdt, conv_state, ssm_state, conv1d_weight, *rest) -> Tensor:
    ngroups, h = rest[5], rest[2].shape[0]
    width = (zxbcdt.shape[1] - h - 2 * ngroups * ssm_state.shape[3]) // 2
    return torch.empty(zxbcdt.shape[0], width, dtype=zxbcdt.dtype, device=zxbcdt.device)


@traceable(_fake_step, mutates=("conv_state", "ssm_state"))
@torch.no_grad()
def mamba_mixer_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    *,
    headdim: int,
    ngroups: int = 1,
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    norm_before_gate: bool = True,
    activation: str | None = "silu",
    state_batch_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One decode step of a Mamba-2 mixer between its two projections; both states change in place. Not differentiable.

    Args:
        zxbcdt: (b, 2 d_nonssm + 2 dim + 2 g n + h), one position's projection, dim = h p.
        conv_state: (b or slots, dim + 2 g n, state_len), state_len >= w - 1, the convolution's last inputs in order.
        ssm_state: (b or slots, h, p, n), any float dtype.
        conv1d_weight: (dim + 2 g n, w). conv1d_bias: (dim + 2 g n,).
        dt_bias, A: (h,). D: (h,) or (h, p).
        headdim: p. ngroups: g.
        rmsnorm_weight: (dim,), as in ``mamba_split_conv1d_scan_combined``; None: gate by silu(z) alone.
        rmsnorm_eps, norm_before_gate, activation: as there.
        state_batch_indices: (b,) the slot of each row in both states; a negative one is padding: output 0, no state
            touched.
        backend: one of ``backends()``; None chooses.

    Returns:
        (b, d_nonssm + dim) in zxbcdt's dtype.

    Raises:
        ValueError: a shape or index does not fit. TypeError: a dtype does not. Both states are then untouched.

    Source: Mamba-2 (arXiv 2405.21060), the recurrent form of section 7.
    """
    _, p = _head_sizes(A, D, headdim)
    tensors = (
        zxbcdt,
        conv_state,
        ssm_state,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        rmsnorm_weight,
        state_batch_indices,
    )
    options = {
        "headdim": p,
        "ngroups": ngroups,
        "rmsnorm_eps": checks.number("rmsnorm_eps", rmsnorm_eps, 0.0),
        "norm_before_gate": bool(norm_before_gate),
        "activation": activation is not None,
    }
    _check_step(*tensors, p, ngroups, activation)
    checks.writable(conv_state=conv_state, ssm_state=ssm_state)
    checks.slots("state_batch_indices", state_batch_indices, ssm_state.shape[0])
    ((y,), _) = choose("mamba_mixer", backend, *tensors, **options).forward(*tensors, **options)
    increment_version((conv_state, ssm_state))
    return y


@checks.once_a_kind
def _check_step(zxbcdt, conv_state, ssm_state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight,
                state_batch_indices, p, ngroups, activation) -> None:  # fmt: skip
    checks.rank("zxbcdt", zxbcdt, 2, letters="(b, 2 d_nonssm + 2 dim + 2 g n + h)")
    b, h, dim = zxbcdt.shape[0], A.shape[0], A.shape[0] * p
    checks.rank("ssm_state", ssm_state, 4, letters="(slots, h, p, n)")
    slots = b if state_batch_indices is None else ssm_state.shape[0]
    n = ssm_state.shape[3]
    checks.shape("ssm_state", ssm_state, slots, h, p, n, letters="(slots, h, p, n)")
    checks.divisible("the number of heads h", h, "ngroups", ngroups)
    channels = dim + 2 * ngroups * n
    checks.rank("conv1d_weight", conv1d_weight, 2, letters="(dim + 2 g n, w)")
    checks.shape("conv1d_weight", conv1d_weight, channels, None, letters="(dim + 2 g n, w)")
    checks.one_of("conv1d_weight's width w", conv1d_weight.shape[1], 2, 3, 4)
    checks.shape("conv1d_bias", conv1d_bias, channels, letters="(dim + 2 g n,)")
    checks.rank("conv_state", conv_state, 3, letters="(slots, dim + 2 g n, state_len)")
    checks.shape("conv_state", conv_state, slots, channels, None, letters="(slots, dim + 2 g n, state_len)")
    if conv_state.shape[2] < conv1d_weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: got state_len {conv_state.shape[2]}, expected at least w - 1 = {conv1d_weight.shape[1] - 1}"
        )
    _non_ssm_width(zxbcdt, dim, 2 * ngroups * n, h)
    checks.shape("dt_bias", dt_bias, h, letters="(h,)")
    if D is not None:
        checks.rank("D", D, 1, 2, letters="(h,) or (h, p)")
        checks.shape("D", D, *((h,) if D.dim() == 1 else (h, p)), letters="(h,) or (h, p)")
    checks.shape("rmsnorm_weight", rmsnorm_weight, dim, letters="(dim,)")
    checks.one_of("activation", activation, None, "silu", "swish")
    checks.shape("state_batch_indices", state_batch_indices, b, letters="(b,)")
    floats = {
        "zxbcdt": zxbcdt,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "conv1d_weight": conv1d_weight,
        "conv1d_bias": conv1d_bias,
        "dt_bias": dt_bias,
        "A": A,
        "D": D,
        "rmsnorm_weight": rmsnorm_weight,
    }
    checks.floating(**floats)
    checks.integer(state_batch_indices=state_batch_indices)
    checks.same_device(**floats, state_batch_indices=state_batch_indices)
