"""The parts of one layer: linear maps, the task-routed adapter, the norm, the Mamba-2 mixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omnimamba_kernels import (
    causal_conv1d_fn,
    causal_conv1d_varlen_states,
    dequantize_int8,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    mamba_split_conv1d_scan_combined,
    quantize_int8,
    rmsnorm_fn,
)

from .config import BASE, MambaConfig

Task = int | Tensor
"""A task id for the whole batch, or one id a batch row: integers of shape (b,); -1 is the base alone."""


class Packing(NamedTuple):
    """Sequences one after another: ``offsets`` (sequences + 1,) and each position's ``numbers`` (1, l) int32."""

    offsets: Tensor
    numbers: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types, else the type itself: what residuals, decays and a CPU's activations are kept in."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` through the kernels, whose int8 weights, and on a CPU 16-bit ones, are fast in decode."""
    x, weight, bias = autocast(x, weight, bias)
    return lora_linear(x, weight, None, None, scale=1.0, bias=bias, weight_scale=weight_scale)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matrix product in autocast's type where it is on; the kernels themselves never cast.

    int8 weights stay: with their scales they mean the same in any type.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype is torch.int8 else t.to(dtype) for t in tensors)


class Linear(nn.Linear):
    """``nn.Linear`` computed by the kernels; ``weight_scale`` is that of int8 weights."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__(width_in, width_out, bias)
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.weight_scale)


class Table(nn.Embedding):
    """``nn.Embedding``, and the head that is tied to it; ``weight_scale`` is that of int8 rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("weight_scale", None)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows if self.weight_scale is None else dequantize_int8(rows, self.weight_scale[ids])

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., width) to logits (..., rows)."""
        return linear(hidden, self.weight, None, self.weight_scale)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, eps=self.eps)


class RoutedLinear(nn.Module):
    """A linear map without bias, plus one low-rank adapter a task (arXiv 2503.08686, section 3.3).

    ``y = x W^T + scale * dropout(x) A_t^T B_t^T``, where t is the task of the batch row. A starts
    Kaiming-uniform and B at zero, so that a fresh adapter changes nothing.
    """

    def __init__(
        self, width_in: int, width_out: int, tasks: tuple[str, ...], *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.tasks, self.scale, self.dropout = tasks, scale, dropout
        self.merged: int | None = None
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("weight_scale", None)
        for task in tasks:
            down, up = nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False)
            nn.init.zeros_(up.weight)
            self.add_module(f"{task}_lora_A0", down)
            self.add_module(f"{task}_lora_B0", up)
        self.register_load_state_dict_pre_hook(_unmerged)

    def forward(self, x: Tensor, task: Task) -> Tensor:
        if isinstance(task, Tensor) and task.ndim < x.ndim - 1:
            task = task[:, None].expand(x.shape[:2])
        mapped = self.bind(task)
        given = mapped.keywords
        x, weight, down, up = autocast(x, given["weight"], given["lora_A"], given["lora_B"])
        operands = dict(weight=weight, lora_A=down, lora_B=up)
        if not (self.training and self.dropout):
            return mapped(x, **operands)
        seed = int(torch.randint(2**31, ()))
        return mapped(x, **operands, dropout_p=self.dropout, dropout_seed=seed)

    def bind(self, task: Task) -> Callable[[Tensor], Tensor]:
        """The map for one task, its weights gathered once: what a decode loop calls."""
        if self.merged is not None:
            return self._bind_merged(task)
        base = partial(lora_linear, weight=self.weight, weight_scale=self.weight_scale)
        if not self.tasks or (isinstance(task, int) and task == BASE):
            return partial(base, lora_A=None, lora_B=None, scale=1.0)
        if isinstance(task, int):
            down, up = self.adapter(task)
            down, up, task = down[None], up[None], 0
        else:
            adapters = [self.adapter(t) for t in range(len(self.tasks))]
            down, up = (torch.stack(side) for side in zip(*adapters, strict=True))
            task = task.int()  # as the kernels take it: nothing is left to convert at each step
        return partial(base, lora_A=down, lora_B=up, scale=self.scale, task=task)

    def _bind_merged(self, task: Task) -> Callable[[Tensor], Tensor]:
        if not isinstance(task, int) or task != self.merged:
            raise ValueError(
                f"the adapter of {self.tasks[self.merged]} is merged into the weights, which serve task {self.merged} "
                f"alone, got {task!r}; load the model again to route tasks"
            )
        return partial(
            lora_linear, weight=self.weight, weight_scale=self.weight_scale, lora_A=None, lora_B=None, scale=1.0
        )

    def train(self, mode: bool = True) -> RoutedLinear:
        """As ``nn.Module.train``; ValueError where an adapter is merged, which would learn no longer."""
        if mode and self.merged is not None:
            raise ValueError(f"the adapter of {self.tasks[self.merged]} is merged; load the model again to train it")
        return super().train(mode)

    @torch.no_grad()
    def merge(self, task: int) -> None:
        """Add one task's adapter to the weight, ``W + scale B_t A_t`` in fp32: then it serves that task alone."""
        if self.merged is not None or task not in range(len(self.tasks)):
            done = "none" if self.merged is None else self.tasks[self.merged]
            raise ValueError(f"task must be one of {len(self.tasks)}, none merged before, got {task} after {done}")
        down, up = (side.to(wide(side.dtype)) for side in self.adapter(task))
        if self.weight_scale is None:
            self.weight.copy_(self.weight.to(down.dtype).addmm(up, down, alpha=self.scale))
        else:
            merged = dequantize_int8(self.weight, self.weight_scale, down.dtype).addmm(up, down, alpha=self.scale)
            weight, self.weight_scale = quantize_int8(merged)
            self.weight.copy_(weight)
        self.merged = task

    def adapter(self, task: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of one task."""
        name = self.tasks[task]
        return getattr(self, f"{name}_lora_A0").weight, getattr(self, f"{name}_lora_B0").weight


def _unmerged(linear: RoutedLinear, given: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before another weight is loaded, in which no adapter is merged."""
    if prefix + "weight" in given:
        linear.merged = None


class MambaMixer(nn.Module):
    """The Mamba-2 mixer: project, convolve, scan the state space, gate and norm, project back.

    ``forward`` for whole sequences, ``prefill`` for a sequence whose states are kept, ``bind_step``
    for one token after another; all three compute the same function.
    """

    def __init__(self, config: MambaConfig, in_proj: RoutedLinear) -> None:
        super().__init__()
        self.config = config
        self.in_proj = in_proj
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim
        )  # holds the weights; the kernels convolve
        self.dt_bias = nn.Parameter(torch.empty(config.nheads))
        self.A_log = nn.Parameter(torch.empty(config.nheads))
        self.D = nn.Parameter(torch.ones(config.nheads))
        self.norm = RMSNorm(config.d_inner, config.norm_eps)
        self.out_proj = Linear(config.d_inner, config.d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Steps dt log-uniform in [0.001, 0.1], decays -A uniform in [1, 16], outputs scaled by depth."""
        self.A_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(self.config.n_layer))

    def decay(self) -> Tensor:
        """A, one negative number a head, in fp32 or wider."""
        return -self.A_log.to(wide(self.A_log.dtype)).exp()

    def forward(self, u: Tensor, task: Task) -> Tensor:
        """u (b, l, d_model) to (b, l, d_model), with gradients, no state kept."""
        cfg = self.config
        y = mamba_split_conv1d_scan_combined(
            self.in_proj(u, task), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self.decay(), self.D,
            cfg.chunk_size, activation="silu", rmsnorm_weight=self.norm.weight, rmsnorm_eps=cfg.norm_eps,
            headdim=cfg.headdim, ngroups=cfg.ngroups, norm_before_gate=False,
        )  # fmt: skip
        return self.out_proj(y)

    def prefill(self, u: Tensor, task: Task, conv_state: Tensor, ssm_state: Tensor, fresh: bool) -> Tensor:
        """As ``forward``, from the given states (zeros where ``fresh``), which it brings up to date in place."""
        cfg = self.config
        group = cfg.ngroups * cfg.d_state
        z, xbc, dt = self.in_proj(u, task).split([cfg.d_inner, cfg.conv_dim, cfg.nheads], dim=-1)
        xbc, tail = causal_conv1d_fn(
            xbc.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            initial_states=None if fresh else conv_state.to(xbc.dtype), return_final_states=True, activation="silu",
        )  # fmt: skip
        x, B, C = xbc.transpose(1, 2).split([cfg.d_inner, group, group], dim=-1)
        y, final = mamba_chunk_scan_combined(
            x.unflatten(-1, (cfg.nheads, cfg.headdim)), dt, self.decay(),
            B.unflatten(-1, (cfg.ngroups, cfg.d_state)), C.unflatten(-1, (cfg.ngroups, cfg.d_state)),
            cfg.chunk_size, D=self.D, dt_bias=self.dt_bias, initial_states=None if fresh else ssm_state,
            dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        conv_state.copy_(tail)
        ssm_state.copy_(final)
        y = rmsnorm_fn(
            y.flatten(2), self.norm.weight, None, z=z, eps=cfg.norm_eps,
            group_size=cfg.d_inner // cfg.ngroups, norm_before_gate=False,
        )  # fmt: skip
        return self.out_proj(y)

    def prefill_packed(self, u: Tensor, task: Task, ends: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences one after another in u (1, l, d_model), each from a fresh state: the outputs (1, l, d_model), and
        each one's last convolution inputs (sequences, channels, d_conv - 1) and state."""
        cfg = self.config
        group = cfg.ngroups * cfg.d_state
        z, xbc, dt = self.in_proj(u, task).split([cfg.d_inner, cfg.conv_dim, cfg.nheads], dim=-1)
        conv = causal_conv1d_varlen_states(xbc[0], ends.offsets, cfg.d_conv - 1)
        xbc = causal_conv1d_fn(
            xbc.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            seq_idx=ends.numbers, activation="silu",
        )  # fmt: skip
        x, B, C = xbc.transpose(1, 2).split([cfg.d_inner, group, group], dim=-1)
        y, ssm = mamba_chunk_scan_combined(
            x.unflatten(-1, (cfg.nheads, cfg.headdim)), dt, self.decay(),
            B.unflatten(-1, (cfg.ngroups, cfg.d_state)), C.unflatten(-1, (cfg.ngroups, cfg.d_state)),
            cfg.chunk_size, D=self.D, dt_bias=self.dt_bias, cu_seqlens=ends.offsets,
            dt_softplus=True, return_varlen_states=True,
        )  # fmt: skip
        y = rmsnorm_fn(
            y.flatten(2), self.norm.weight, None, z=z, eps=cfg.norm_eps,
            group_size=cfg.d_inner // cfg.ngroups, norm_before_gate=False,
        )  # fmt: skip
        return self.out_proj(y), conv, ssm

    def bind_step(self, task: Task, conv_state: Tensor, ssm_state: Tensor) -> Callable[[Tensor], Tensor]:
        """A function u (b, d_model) to (b, d_model) for one token, which advances the states in place."""
        project = self.in_proj.bind(task)
        project_back = partial(linear, weight=self.out_proj.weight, weight_scale=self.out_proj.weight_scale)
        step = partial(
            mamba_mixer_step,
            conv_state=conv_state, ssm_state=ssm_state, conv1d_weight=self.conv1d.weight.squeeze(1),
            conv1d_bias=self.conv1d.bias, dt_bias=self.dt_bias, A=self.decay(), D=self.D,
            headdim=self.config.headdim, ngroups=self.config.ngroups, rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.config.norm_eps, norm_before_gate=False,
        )  # fmt: skip
        return lambda u: project_back(step(project(u)))
