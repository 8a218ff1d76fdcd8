"""Public function of the chunked scan: the name and arguments of mamba_ssm."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd, checks
from ..backends import choose
from ..compile import traceable


@checks.once_a_kind
def _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, chunk_size, dt_limit) -> None:
    checks.tensors(x=x, dt=dt, A=A, B=B, C=C)
    checks.rank("x", x, 4, letters="(b, l, h, p)")
    b, l, h, p = x.shape
    checks.shape("dt", dt, b, l, h, letters="(b, l, h)")
    checks.shape("A", A, h, letters="(h,)")
    checks.shape("B", B, b, l, None, None, letters="(b, l, g, n)")
    g, n = B.shape[2:]
    checks.shape("C", C, b, l, g, n, letters="(b, l, g, n)")
    checks.divisible("the number of heads h", h, "the number of groups g", g)
    if D is not None:
        checks.rank("D", D, 1, 2, letters="(h,) or (h, p)")
        checks.shape("D", D, *((h,) if D.dim() == 1 else (h, p)), letters="(h,) or (h, p)")
    checks.shape("z", z, b, l, h, p, letters="(b, l, h, p)")
    checks.shape("dt_bias", dt_bias, h, letters="(h,)")
    checks.shape("initial_states", initial_states, b, h, p, n, letters="(b, h, p, n)")
    checks.shape("seq_idx", seq_idx, b, l, letters="(b, l)")
    checks.floating(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
    checks.integer(seq_idx=seq_idx)
    checks.same_device(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx
    )
    checks.whole("chunk_size", chunk_size, 1)
    pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2
    if not pair or not all(isinstance(v, float | int) for v in dt_limit) or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: got {dt_limit!r}, expected (low, high), two numbers with low <= high")


def _fake(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *rest) -> list[Tensor]:
    _, _, final, varlen, state_dtype, _ = rest
    _, _, h, p = x.shape
    states = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device)]
    for asked, count in ((final, x.shape[0]), (varlen, cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0)):
        if asked:
            outputs.append(torch.empty(count, h, p, B.shape[3], dtype=state_dtype or states, device=x.device))
    return outputs


def _check_packed(x: Tensor, cu_seqlens: Tensor | None, return_varlen_states: bool) -> None:
    if cu_seqlens is None:
        if return_varlen_states:
            raise ValueError(
                "return_varlen_states: got True without cu_seqlens; pass the offsets of the packed sequences"
            )
        return
    if x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got a batch of {x.shape[0]}, expected 1 that holds all sequences one after another"
        )
    checks.offsets("cu_seqlens", cu_seqlens, x.shape[1])
    checks.same_device(x=x, cu_seqlens=cu_seqlens)


@traceable(_fake)
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's selective scan over whole sequences.

    ``dt = clamp(softplus(dt + dt_bias), dt_limit)``, ``S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T``,
    ``y_t = (S_t C_t + D x_t) silu(z_t)``, a state S (p, n) for each head.

    Args:
        x: (b, l, h, p); any length, any strides; float32, bfloat16 or float16 (arithmetic and states in float32), or
            float64 on the reference.
        dt: (b, l, h), the step before bias and softplus.
        A: (h,), negative decay rates.
        B, C: (b, l, g, n), each of the g groups shared by h / g heads.
        chunk_size: positions a chunk; a hint of speed, the result does not depend on it beyond rounding.
        D: (h,) or (h, p), the skip connection.
        z: (b, l, h, p), the gate.
        dt_bias: (h,).
        initial_states: (b, h, p, n), the state before the first position; with ``seq_idx`` it belongs to sequence 0.
        seq_idx: (b, l) integers; the state restarts wherever the index changes; -1 is padding: output and state 0.
        cu_seqlens: (sequences + 1,) rising offsets from 0 of sequences packed into a batch of 1; positions after the
            last are padding. Beside ``seq_idx``, which then says what a sequence is, they only say where
            ``return_varlen_states`` looks.
        dt_softplus: apply softplus (identity above 20) to dt + dt_bias.
        dt_limit: bounds of dt after softplus.
        return_final_states: also return the state after the last position.
        return_varlen_states: also return the state after each sequence of ``cu_seqlens``.
        state_dtype: dtype of the returned states; None: float32 (float64 if x is).
        backend: one of ``backends()``; None chooses.

    Returns:
        y (b, l, h, p) in x's dtype, then, where asked for, final_states (b, h, p, n) and varlen_states
        (sequences, h, p, n).
        Gradients reach x, dt, A, B, C, D, z, dt_bias and initial_states through every output.
        A NaN or infinity of x, B or dt shows from its position on. Where a chunk is a matrix product, it may also show
        in the few positions before it in its chunk, as 0 times it. On a GPU the sequences packed after it may see it
        too; on a CPU only the reference's do: in the same chunk, or of a NaN of dt all of them.

    Raises:
        ValueError: a shape, index or limit does not fit. TypeError: a dtype does not. RuntimeError: the backend cannot.

    Source: Mamba-2 (arXiv 2405.21060), section 6; the function of the same name in mamba_ssm.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, chunk_size, dt_limit)
    if state_dtype is not None and state_dtype not in checks.FLOATS:
        raise TypeError(f"state_dtype: got {state_dtype!r}, expected a floating torch.dtype such as torch.float32")
    _check_packed(x, cu_seqlens, return_varlen_states)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    options = {"chunk_size": chunk_size, "dt_softplus": bool(dt_softplus), "dt_limit": tuple(map(float, dt_limit))}
    implementation = choose("ssd_scan", backend, *tensors, seq_idx, cu_seqlens, **options)
    if getattr(implementation, "READS_OFFSETS", False):
        options["varlen_states"] = return_varlen_states
    else:
        if seq_idx is None and cu_seqlens is not None:
            seq_idx = _sequence_of(cu_seqlens, x.shape[1])
        cu_seqlens = cu_seqlens if return_varlen_states else None
    outputs = autograd.run(implementation, *tensors, seq_idx, cu_seqlens, **options)
    wanted = [outputs[0]]
    for asked, states in ((return_final_states, outputs[1]), (return_varlen_states, outputs[2])):
        if asked:
            wanted.append(states if state_dtype is None else states.to(state_dtype))
    return wanted[0] if len(wanted) == 1 else tuple(wanted)


def _sequence_of(cu_seqlens: Tensor, l: int) -> Tensor:
    """(1, l): the number of each position's sequence, -1 after the last."""
    positions = torch.arange(l, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens.long().contiguous(), positions, right=True) - 1
    return number.masked_fill(number == cu_seqlens.shape[0] - 1, -1).int()[None]
