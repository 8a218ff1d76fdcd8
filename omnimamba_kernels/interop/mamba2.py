"""mamba_ssm's Mamba-2 layer and its gated norm as modules on these kernels, on a GPU or none.

    from omnimamba_kernels.interop.mamba2 import Mamba2    # was: from mamba_ssm import Mamba2

Same arguments, same parameters: a state_dict of one loads into the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_state_update,
)

UNLIMITED = (0.0, float("inf"))
FEW_ROWS = 16


class RMSNorm(nn.Module):
    """``rmsnorm_fn`` with its weight (d,): ``norm(x) silu(z)``, or ``norm(x silu(z))`` with ``norm_before_gate=False``,
    over groups of ``group_size`` neighbours (None: all). Without ``z`` there is no gate."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class Linear(nn.Linear):
    """``nn.Linear``; a decode step's few rows on a CPU go through ``lora_linear``, which reads 16-bit weights once."""

    def forward(self, x: Tensor) -> Tensor:
        few = x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]
        if few and not torch.is_autocast_enabled("cpu"):
            return lora_linear(x, self.weight, bias=self.bias)
        return super().forward(x)


class Mamba2(nn.Module):
    """The Mamba-2 layer (arXiv 2405.21060, section 7): ``u (b, l, d_model)`` to the same shape.

    Args:
        d_model, d_state, d_conv, headdim, ngroups: widths of the input, of the state, of the convolution, of a head;
            groups of B and C.
        expand: the inner width is ``expand * d_model``; ``d_ssm`` of it (None: all) goes through the scan, the rest
            through a gated MLP.
        A_init_range: -A starts uniform in it. dt_min, dt_max, dt_init_floor: the step starts log-uniform between.
        dt_limit: bounds of the step after softplus.
        D_has_hdim: D for every channel, (d_ssm,), instead of every head.
        rmsnorm, norm_before_gate: the gated norm, and its order; without it y is gated by silu(z).
        conv_init: the convolution's weights start uniform in (-conv_init, conv_init); None: as ``nn.Conv1d``.
        bias, conv_bias: of both projections, of the convolution.
        chunk_size, use_mem_eff_path: taken and without effect on the result.
        layer_idx: this layer's place in an ``inference_params.key_value_memory_dict``.
        process_group: must be None.

    Raises:
        ValueError: sizes that do not divide, or a process group.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = UNLIMITED,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = dict(device=device, dtype=dtype)
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups, self.D_has_hdim = expand, headdim, ngroups, D_has_hdim
        self.rmsnorm, self.norm_before_gate, self.dt_limit = rmsnorm, norm_before_gate, tuple(dt_limit)
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.activation = "silu"
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        _check_sizes(self, process_group)
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **made)
        self.conv1d = nn.Conv1d(  # holds the weights; the kernels convolve
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **made))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **made))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        if rmsnorm:
            self.norm = RMSNorm(
                self.d_ssm, eps=1e-5, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **made
            )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **made)
        self._start(A_init_range, dt_min, dt_max, dt_init_floor)

    @torch.no_grad()
    def _start(self, decays: tuple[float, float], low: float, high: float, floor: float) -> None:
        if self.conv_init is not None:
            self.conv1d.weight.uniform_(-self.conv_init, self.conv_init)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp()
        dt = dt.clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*decays).log())

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """
        Args:
            u: (b, l, d_model), or (b * l, d_model) with ``seqlen`` = l.
            seq_idx: (b, l) int32, which sequence a position belongs to.
            cu_seqlens: (sequences + 1,), where sequences begin and end, with b = 1.
            inference_params: has ``seqlen_offset`` and ``key_value_memory_dict``, which keeps the states: at offset 0
                u is a prompt, later on one token.

        Returns:
            Like u.
        """
        flat = seqlen is not None
        if flat:
            u = u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            y = self._whole(u, seq_idx, cu_seqlens)
        else:
            rows = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            conv_state, ssm_state = self._states(inference_params, rows)
            if inference_params.seqlen_offset > 0:
                y = self.step(u, conv_state, ssm_state)[0]
            else:
                y = self._prompt(u, seq_idx, cu_seqlens, conv_state, ssm_state)
        return y.flatten(0, 1) if flat else y

    def _whole(self, u: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Sequences whose states nobody asks for."""
        if seq_idx is None and cu_seqlens is not None:
            seq_idx = _numbers(cu_seqlens)
        y = mamba_split_conv1d_scan_combined(
            self.in_proj(u), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self._decay(), self._skip(),
            self.chunk_size, seq_idx=seq_idx, dt_limit=self.dt_limit, activation=self.activation, **self._norm(),
            headdim=self.headdim, ngroups=self.ngroups, norm_before_gate=self.norm_before_gate,
        )  # fmt: skip
        return self.out_proj(y)

    def _prompt(
        self, u: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, conv_state: Tensor, ssm_state: Tensor
    ) -> Tensor:
        """Sequences from fresh states, whose last ones are written to conv_state and ssm_state."""
        if seq_idx is None and cu_seqlens is not None:
            seq_idx = _numbers(cu_seqlens)
        z0, x0, z, xBC, dt = self._parts(self.in_proj(u))
        if cu_seqlens is None:
            kept = xBC.transpose(1, 2)[:, :, -conv_state.shape[2] :]
            kept = F.pad(kept, (conv_state.shape[2] - kept.shape[2], 0))
        else:
            kept = causal_conv1d_varlen_states(xBC[0], cu_seqlens, conv_state.shape[2])
        conv_state.copy_(kept.detach())
        xBC = causal_conv1d_fn(
            xBC.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, activation=self.activation
        ).transpose(1, 2)
        x, B, C = self._heads(xBC)
        y, final, *varlen = mamba_chunk_scan_combined(
            x, dt, self._decay(), B, C, self.chunk_size, D=self._skip(),
            z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)), dt_bias=self.dt_bias,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens, dt_softplus=True, dt_limit=self.dt_limit,
            return_final_states=True, return_varlen_states=cu_seqlens is not None,
        )  # fmt: skip
        ssm_state.copy_((varlen[0] if varlen else final).detach())
        return self._close(y.flatten(-2), z0, x0, z)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (b, 1, d_model) to (b, 1, d_model); both states (``allocate_inference_cache``) move on in place.

        Raises:
            ValueError: more than one token.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise ValueError(
                f"hidden_states: got shape {tuple(hidden_states.shape)}, expected (b, 1, {self.d_model}): one token; "
                "a prompt goes through forward"
            )
        zxbcdt = self.in_proj(hidden_states.squeeze(1))
        if self.dt_limit != UNLIMITED:
            return self._limited_step(zxbcdt, conv_state, ssm_state).unsqueeze(1), conv_state, ssm_state
        y = mamba_mixer_step(
            zxbcdt, conv_state, ssm_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias,
            self._decay(), self._skip(), headdim=self.headdim, ngroups=self.ngroups, **self._norm(),
            norm_before_gate=self.norm_before_gate, activation=self.activation,
        )  # fmt: skip
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def _limited_step(self, zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        z0, x0, z, xBC, dt = self._parts(zxbcdt)
        xBC = causal_conv1d_update(
            xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation
        )  # fmt: skip
        x, B, C = self._heads(xBC)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
        each = (self.nheads, self.headdim)  # one number a head, seen from each of its channels
        D = self._skip()
        y = selective_state_update(
            ssm_state, x, dt[..., None].expand(-1, *each), self._decay()[:, None, None].expand(*each, self.d_state),
            B, C, D[:, None].expand(each) if D.dim() == 1 else D, z=None if self.rmsnorm else z.unflatten(-1, each),
        )  # fmt: skip
        return self._close(y.flatten(-2), z0, x0, z)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: the convolution's last inputs (b, channels, d_conv) and the scan's (b, h, p, n), whatever
        ``max_seqlen`` is."""
        device = self.out_proj.weight.device
        conv = torch.zeros(
            batch_size, self.d_conv, self.conv_dim, device=device, dtype=dtype or self.conv1d.weight.dtype
        )
        ssm = torch.zeros(
            batch_size, self.nheads, self.headdim, self.d_state, device=device, dtype=dtype or self.in_proj.weight.dtype
        )
        return conv.transpose(1, 2), ssm

    def _states(self, inference_params: Any, rows: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx: got None, expected this layer's place: inference_params keeps states by it")
        kept = inference_params.key_value_memory_dict
        if self.layer_idx not in kept:
            kept[self.layer_idx] = self.allocate_inference_cache(rows, 0)
        return kept[self.layer_idx]

    def _decay(self) -> Tensor:
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _norm(self) -> dict[str, Any]:
        return dict(rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps) if self.rmsnorm else {}

    def _parts(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """[z0, x0, z, xBC, dt] of the projection; the first two are the MLP's."""
        mlp = self.d_inner - self.d_ssm
        return zxbcdt.split([mlp, mlp, self.d_ssm, self.conv_dim, self.nheads], dim=-1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., h, p), B and C (..., g, n)."""
        group = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, group, group], dim=-1)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _close(self, y: Tensor, z0: Tensor, x0: Tensor, z: Tensor) -> Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_ssm < self.d_inner:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)


def _check_sizes(layer: Mamba2, process_group: Any) -> None:
    if process_group is not None:
        raise ValueError("process_group: got one, expected None: this layer is not cut over processes")
    if not 0 < layer.d_ssm <= layer.d_inner:
        raise ValueError(f"d_ssm: got {layer.d_ssm}, expected 1 to expand * d_model = {layer.d_inner}")
    if layer.d_ssm % layer.headdim:
        raise ValueError(f"headdim: got {layer.headdim}, expected a divisor of d_ssm = {layer.d_ssm}")
    if layer.nheads % layer.ngroups:
        raise ValueError(f"ngroups: got {layer.ngroups}, expected a divisor of the {layer.nheads} heads")


def _numbers(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens (sequences + 1,) as the number of each position's sequence, (1, l) int32."""
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[None].int()
