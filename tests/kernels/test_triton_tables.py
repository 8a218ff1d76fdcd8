"""The launch tables of chips that are not here, interpreted: what kernels give in their tiles, and in bfloat16.

The interpreter's own rules have small blocks, and its products of bfloat16 are not a GPU's. Here host code and kernels
go a chip's ways, each tile of its tables is tried once on a small call, and float64 is what the reference makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from bfloat16 import interpreted_bfloat16
from common import check
from torch import Tensor

from omnimamba_kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    lora_linear,
    mamba_chunk_scan_combined,
    mamba_mixer_step,
    rmsnorm_fn,
    selective_state_update,
    triton_launch,
)
from omnimamba_kernels.backends import OPS
from omnimamba_kernels.causal_conv1d import cases as conv_cases
from omnimamba_kernels.gated_norm import cases as norm_cases
from omnimamba_kernels.lora_linear import cases as lora_cases
from omnimamba_kernels.mamba_mixer import cases as mixer_cases
from omnimamba_kernels.ssd_scan import cases as scan_cases
from omnimamba_kernels.state_update import cases as update_cases
from omnimamba_kernels.triton_launch import TARGETS, interpreting, table

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")

Made = tuple[Callable[..., Any], dict[str, Tensor | None], tuple[str, ...]]
HALF, SINGLE = torch.bfloat16, torch.float32
BESIDE_TILES = ("num_", "per_multiprocessor", "segments", "shortest", "pieces", "ends_share", "maxnreg")
FLOATS = ("x", "weight", "lora_A", "lora_B", "bias")


@contextmanager
def as_on(arch: str, op: str = "", kernel: str = "", use: dict[str, int] | None = None) -> Iterator[None]:
    """Within the block Triton's interpreter is taken for a chip; ``kernel`` of ``op`` is launched as ``use`` says."""
    look_up = triton_launch._settings

    def chosen(asked_op: str, asked_kernel: str, *rest: Any) -> dict[str, int]:
        return use if (asked_op, asked_kernel) == (op, kernel) else look_up(asked_op, asked_kernel, *rest)

    with (
        interpreted_bfloat16(),
        mock.patch.object(triton_launch, "INTERPRETER", TARGETS[arch]),
        mock.patch.object(triton_launch, "_settings", chosen),
    ):
        yield


def right(function: Callable[..., Any], tensors: dict[str, Tensor | None], wanted: tuple[str, ...]) -> None:
    check("triton", function, lambda **t: function(**t, backend="reference"), tensors, wanted)


def in_place(function: Callable[..., Tensor], *states: str) -> Callable[..., tuple[Tensor, ...]]:
    """A call that leaves its states alone and returns them as they became."""

    def call(**tensors: Any) -> tuple[Tensor, ...]:
        tensors |= {name: tensors[name].clone() for name in states}
        return (function(**tensors), *(tensors[name] for name in states))

    return call


def scan(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    """Of odd sizes, in several segments; more states than a block holds where the rule is for many."""
    n = use["BLOCK_N"] + 8 if when.get("n", [1])[0] > 128 else 40
    case = scan_cases.Case("tile", 1, 80, 2, 40, n=n, skip=1, initial_states=True, sequences="cu_seqlens")
    if when.get("plain") == [1, 1]:
        case = replace(case, l=128, n=max(32, use["BLOCK_N"]), p=use["BLOCK_P"], sequences=None)
    tensors = case.tensors(dtype)
    tensors["A"] = tensors["A"] * 0.02  # what fades slowly crosses segments
    return (lambda **t: mamba_chunk_scan_combined(**t, **case.options), tensors,
            ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states"))  # fmt: skip


def conv(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    make = torch.Generator().manual_seed(3)
    if kernel == "varlen_states":
        function = lambda **t: causal_conv1d_varlen_states(**t, state_len=5)  # noqa: E731
        return function, {"x": torch.randn(40, 21).to(dtype), "cu_seqlens": torch.tensor([0, 9, 12, 40])}, ()
    if kernel == "update":
        given = {"x": (3, 37, 2), "conv_state": (3, 37, 20), "weight": (37, 4), "bias": (37,)}
        tensors = {name: torch.randn(shape, generator=make).to(dtype) for name, shape in given.items()}
        return in_place(lambda **t: causal_conv1d_update(**t, activation="silu"), "conv_state"), tensors, ()
    layout = "contiguous" if when.get("time_last") == [1, 1] else "slice"
    case = conv_cases.Case("tile", 2, 21, 150, layout=layout, sequences=True, initial_states=True, final_states=True)
    return lambda **t: causal_conv1d_fn(**t, **case.options), case.tensors(dtype), (
        "x", "weight", "bias", "initial_states")  # fmt: skip


def update(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    case = update_cases.Case("tile", 2, 4, 20, 40, g=2, tied=False)
    return in_place(lambda **t: selective_state_update(**t, **case.options), "state"), case.tensors(dtype), ()


def norm(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    case = next(case for case in norm_cases.CASES if case.name == "gate before")
    return lambda **t: rmsnorm_fn(**t, **case.options), case.tensors(dtype), ("x", "weight", "bias", "z")


def lora(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    """More ranks than 16, more of everything than one block of most."""
    rows = 71 if kernel != "few_rows" else use["BLOCK_M"] - 11
    case = lora_cases.Case((rows,), 150, 90, tasks=3, rank=7, bias=True)
    if kernel == "dequantize" or when.get("int8") == [1, 1]:
        return lambda **t: lora_linear(**t, scale=1.5), lora_cases.int8_inputs(case, dtype), ("x", "lora_A", "lora_B")
    return lambda **t: lora_linear(**t, scale=1.5), lora_cases.inputs(case, dtype, dtype), FLOATS


def mixer(kernel: str, dtype: torch.dtype, when: dict[str, list[int]], use: dict[str, int]) -> Made:
    case = mixer_cases.Case(2, 1, 4, 24, 5, g=2, extra=3)
    tensors = {"zxbcdt": mixer_cases.rows(case, dtype)[:, 0], **mixer_cases.states(case, dtype),
               **mixer_cases.weights(case, SINGLE)}  # fmt: skip
    function = lambda **t: mamba_mixer_step(**t, headdim=case.p, ngroups=case.g)  # noqa: E731
    return in_place(function, "conv_state", "ssm_state"), tensors, ()


MADE = {"ssd_scan": scan, "causal_conv1d": conv, "state_update": update, "gated_norm": norm, "lora_linear": lora,
        "mamba_mixer": mixer}  # fmt: skip


def tiles(op: str, kernel: str) -> dict[tuple, dict[str, Any]]:
    """Of each tile of the chips' rules the first rule that has it."""
    found: dict[tuple, dict[str, Any]] = {}
    for rule in table(op)[kernel]:
        tile = {name: size for name, size in rule["use"].items() if not name.startswith(BESIDE_TILES)}
        if rule.get("arch") != ["interpreter"]:
            found.setdefault((*tile.items(), str(rule.get("when", {}).get("bytes"))), rule)
    return found


@pytest.mark.parametrize(("op", "kernel"), [(op, kernel) for op in OPS for kernel in table(op)])
def test_every_tile_of_a_table(op, kernel):
    for rule in tiles(op, kernel).values():
        when, use = rule.get("when", {}), dict(rule["use"])
        if "shortest" in use:
            use["shortest"] = 1  # the call is small, and is to be cut all the same
        arch = next(arch for arch in TARGETS if arch.startswith(tuple(rule.get("arch", ["sm_90"]))))
        dtype = SINGLE if when.get("bytes") == [4, 4] else HALF
        with as_on(arch, op, kernel, use):
            right(*MADE[op](kernel, dtype, when, use))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("rows", [4, 70])
@pytest.mark.parametrize(
    "pair", [(HALF, HALF), (HALF, SINGLE), (torch.float16, torch.float16), (SINGLE, HALF)], ids=str
)
def test_adapters_beside_bfloat16(arch, rows, pair):
    """low is float32: it goes to the matrix units as two bfloat16 parts where y has 16 bits."""
    case = lora_cases.Case((rows,), 96, 56, tasks=3, rank=7, bias=True)
    for dropout in (0.0, 0.3):
        function = lambda **t: lora_linear(**t, scale=1.5, dropout_p=dropout, dropout_seed=11)  # noqa: B023, E731
        with as_on(arch):
            right(function, lora_cases.inputs(case, *pair), FLOATS)
