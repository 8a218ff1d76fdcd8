"""Weights as int8 with one scale for every 64 neighbours of a row: a quarter of float32's bytes to read."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

GROUP = 64
"""Neighbouring weights of a row that share a scale, as kInt8Group in lora_linear.h."""


@torch.no_grad()
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What ``lora_linear`` takes as weight and weight_scale: symmetric, nearest, with no calibration data.

    ``weight[o, k] ~ weight_scale[o, k // 64] int8[o, k]``, off by at most half a scale: the scale is the largest
    magnitude of its 64 weights over 127, rounded to bfloat16 before the weights are divided by it.

    Args:
        weight: (out, in), floating.

    Returns:
        int8 (out, in) and bfloat16 (out, in / 64 rounded up).

    Raises:
        ValueError: not two dimensions, or a weight is not finite. TypeError: not floating.
    """
    checks.rank("weight", weight, 2, letters="(out, in)")
    checks.floating(weight=weight)
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise ValueError("weight: got inf or NaN, expected what is finite in float32; int8 has neither")
    out, width = weight.shape
    groups = -(-width // GROUP)
    padded = weight.new_zeros(out, groups * GROUP)
    padded[:, :width] = weight
    blocks = padded.view(out, groups, GROUP)
    # Below the smallest normal number a scale has too few bits; weights that small are 0.
    largest = blocks.abs().amax(-1) if width else blocks.new_zeros(out, 0)
    scale = (largest / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    rounded = (blocks / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return rounded.view(out, groups * GROUP)[:, :width].contiguous(), scale


def dequantize_int8(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (..., in) that ``weight`` int8 and ``weight_scale`` (..., in / 64 rounded up) stand for."""
    scale = weight_scale.to(dtype).repeat_interleave(GROUP, dim=-1)[..., : weight.shape[-1]]
    return weight.to(dtype) * scale
