"""What is asked of each operation: test cases and the sizes that a GPU is measured at, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

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
    use_backend,
)
from ..causal_conv1d import cases as conv_cases
from ..gated_norm import cases as norm_cases
from ..lora_linear import cases as lora_cases
from ..mamba_mixer import cases as mixer_cases
from ..ssd_scan import cases as scan_cases
from ..state_update import cases as update_cases
from ..triton_launch import Launch, Target, recording

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Call:
    """One call of a public function on meta tensors; ``wanted`` names the arguments whose gradients are asked for."""

    op: str
    name: str
    large: bool  # a size of models in use, not a test case
    function: Callable[..., Any]
    tensors: Callable[[], dict[str, Tensor | None]]
    wanted: tuple[str, ...] = ()

    def launches(self, target: Target) -> list[Launch]:
        """What the call starts on ``target``, forward and backward."""
        with recording(target) as found, use_backend("triton"):
            with Made("meta"):
                tensors = self.tensors()
            present = [name for name in self.wanted if tensors[name] is not None]
            leaves = tensors | {name: tensors[name].detach().requires_grad_() for name in present}
            outputs = self.function(**leaves)
            if present:
                outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
                torch.autograd.grad(outputs, [leaves[n] for n in present], [torch.empty_like(t) for t in outputs])
        return found


class Made(TorchFunctionMode):
    """Within the block tensors are made on ``device`` (on meta without memory), whatever the generator."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        if function in _device_constructors():
            kwargs["device"] = self.device
        return function(*args, **kwargs)


def calls(op: str) -> Iterator[Call]:
    """The calls of one operation, small ones first."""
    yield from _CALLS[op]()


def _norm() -> Iterator[Call]:
    for case, dtype, large in _with_dtypes(norm_cases.CASES, (*norm_cases.GPU, *norm_cases.COMPILED)):
        yield Call("gated_norm", _named(case.name, dtype), large, _with(rmsnorm_fn, case.options),
                   _make(case, dtype), ("x", "weight", "bias", "z"))  # fmt: skip


def _conv() -> Iterator[Call]:
    for case, dtype, large in _with_dtypes(conv_cases.CASES, conv_cases.GPU):
        yield Call("causal_conv1d", _named(case.name, dtype), large, _with(causal_conv1d_fn, case.options),
                   _make(case, dtype), ("x", "weight", "bias", "initial_states"))  # fmt: skip
    for b, d, dtype in ((2, 37, SINGLE), (3, 160, HALF), (64, 1792, BFLOAT), (64, 4352, BFLOAT)):
        for ring in (False, True):
            yield Call("causal_conv1d", _named(f"update {b} x {d}{', ring' * ring}", dtype), b == 64,
                       _with(causal_conv1d_update, {"activation": "silu"}), _conv_step(b, d, dtype, ring))  # fmt: skip
        yield Call("causal_conv1d", _named(f"varlen states, {d} channels", dtype), b == 64,
                   _with(causal_conv1d_varlen_states, {"state_len": 3}), _packed_rows(d, dtype))  # fmt: skip


def _conv_step(b: int, d: int, dtype: torch.dtype, ring: bool) -> Callable[[], dict[str, Tensor | None]]:
    return lambda: {
        "x": torch.empty(b, d, dtype=dtype),
        "conv_state": torch.empty(b, d, 4, dtype=dtype),
        "weight": torch.empty(d, 4),
        "bias": torch.empty(d),
        "cache_seqlens": torch.empty(b, dtype=torch.int32) if ring else None,
        "conv_state_indices": None if ring else torch.empty(b, dtype=torch.int32),
    }


def _packed_rows(d: int, dtype: torch.dtype) -> Callable[[], dict[str, Tensor | None]]:
    return lambda: {"x": torch.empty(500, d, dtype=dtype), "cu_seqlens": torch.empty(9, dtype=torch.int32)}


def _scan() -> Iterator[Call]:
    wanted = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    large_cases = (*scan_cases.GPU, scan_cases.WIDE, scan_cases.BROAD, scan_cases.PACKED)
    for case, dtype, large in _with_dtypes(scan_cases.CASES, large_cases):
        for inference in (False, True):
            name = _named(case.name + ", inference" * inference, dtype)
            function = _with(mamba_chunk_scan_combined, case.options)
            yield Call("ssd_scan", name, large, function, _make(case, dtype), () if inference else wanted)


def _update() -> Iterator[Call]:
    for case, dtype, large in _with_dtypes(update_cases.CASES, update_cases.GPU):
        for state in (SINGLE, dtype) if dtype is not SINGLE else (SINGLE,):
            yield Call("state_update", _named(f"{case.name}, state {_short(state)}", dtype), large,
                       _with(selective_state_update, case.options), _make(case, dtype, state))  # fmt: skip


def _lora() -> Iterator[Call]:
    for case, dtype, large in _with_dtypes(lora_cases.SMALL, (*lora_cases.GPU, *lora_cases.COMPILED)):
        for weight in dict.fromkeys((dtype, SINGLE)):  # not a set, whose order changes from run to run
            for dropout in (0.0, 0.1) if case.tasks else (0.0,):
                name = _named(f"{case}, weight {_short(weight)}" + ", dropout" * bool(dropout), dtype)
                options = {"scale": 2.0, "dropout_p": dropout, "dropout_seed": 1}
                tensors = lambda case=case, dtype=dtype, weight=weight: lora_cases.inputs(case, dtype, weight)  # noqa: E731
                yield Call("lora_linear", name, large, _with(lora_linear, options), tensors,
                           ("x", "weight", "lora_A", "lora_B", "bias"))  # fmt: skip
    yield from _lora_int8()


def _lora_int8() -> Iterator[Call]:
    small, large = (
        (lora_cases.SMALL[4], *lora_cases.SMALL[6:8]),
        (lora_cases.GPU[0], lora_cases.GPU[3], *lora_cases.COMPILED),
    )
    for case, dtype, is_large in _with_dtypes(small, large):
        yield Call("lora_linear", _named(f"{case}, int8 weights", dtype), is_large, _with(lora_linear, {"scale": 2.0}),
                   lambda case=case, dtype=dtype: lora_cases.int8_inputs(case, dtype),
                   ("x", "lora_A", "lora_B", "bias"))  # fmt: skip


def _mixer() -> Iterator[Call]:
    for case, dtype, large in _with_dtypes(mixer_cases.SMALL, (*mixer_cases.GPU_STEP, *mixer_cases.COMPILED)):
        options = {"headdim": case.p, "ngroups": case.g}
        yield Call("mamba_mixer", _named(f"step {case}", dtype), large, _with(mamba_mixer_step, options),
                   _mixer_step(case, dtype))  # fmt: skip
    for case, dtype, large in _with_dtypes(mixer_cases.SMALL, mixer_cases.GPU_SEQUENCE):
        options = {"headdim": case.p, "ngroups": case.g, "chunk_size": 256, "norm_before_gate": False}
        yield Call("mamba_mixer", _named(f"sequence {case}", dtype), large,
                   _with(mamba_split_conv1d_scan_combined, options), _mixer_sequence(case, dtype),
                   ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "rmsnorm_weight"))  # fmt: skip


def _mixer_step(case: mixer_cases.Case, dtype: torch.dtype) -> Callable[[], dict[str, Tensor | None]]:
    def make() -> dict[str, Tensor | None]:
        states = mixer_cases.states(case, dtype)
        return {
            "zxbcdt": mixer_cases.rows(case, dtype)[:, 0],
            "conv_state": states["conv_state"],
            "ssm_state": states["ssm_state"].float(),
            **mixer_cases.weights(case, SINGLE),
        }

    return make


def _mixer_sequence(case: mixer_cases.Case, dtype: torch.dtype) -> Callable[[], dict[str, Tensor | None]]:
    return lambda: {"zxbcdt": mixer_cases.rows(case, dtype), **mixer_cases.weights(case, SINGLE)}


_CALLS = {
    "causal_conv1d": _conv,
    "ssd_scan": _scan,
    "state_update": _update,
    "gated_norm": _norm,
    "lora_linear": _lora,
    "mamba_mixer": _mixer,
}


def _with_dtypes(small: tuple, large: tuple) -> Iterator[tuple[Any, torch.dtype, bool]]:
    for case in small:
        for dtype in (SINGLE, HALF, BFLOAT):
            yield case, dtype, False
    for case in large:
        for dtype in (HALF, BFLOAT):
            yield case, dtype, True


def _make(case: Any, *dtypes: torch.dtype) -> Callable[[], dict[str, Tensor | None]]:
    return lambda: case.tensors(*dtypes)


def _with(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda **tensors: function(**tensors, **options)


def _named(case: str, dtype: torch.dtype) -> str:
    return f"{case}, {_short(dtype)}"


def _short(dtype: torch.dtype) -> str:
    return {SINGLE: "fp32", HALF: "fp16", BFLOAT: "bf16"}[dtype]
