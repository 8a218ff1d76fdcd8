"""What the operations are timed on, and by whom: ours first, then torch, transformers' fallback and other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import omnimamba_kernels as kernels
from omnimamba_kernels.causal_conv1d import cases as conv_cases
from omnimamba_kernels.gated_norm import cases as norm_cases
from omnimamba_kernels.lora_linear import cases as lora_cases
from omnimamba_kernels.mamba_mixer import cases as mixer_cases
from omnimamba_kernels.report.calls import Made
from omnimamba_kernels.ssd_scan import cases as scan_cases
from omnimamba_kernels.state_update import cases as update_cases

from . import inputs, peers
from .measure import worst_error

Values = dict[str, Tensor | None]
Call = Callable[[], Any]
PREFIX = 4096
"""Positions of a sequence that are checked: later ones change nothing before them."""
MOST_TOKENS = 20_000
"""Beyond it plain PyTorch is left out: its memory and time grow out of bounds."""


@dataclass
class Problem:
    """One call at one size. ``contenders`` make a function without arguments; ours come first."""

    group: str
    case: str
    bytes: float
    flops: float
    contenders: dict[str, Callable[[], Call]]
    error: Callable[[Any], float]
    bound: float
    errors: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    """The check of a contender that computes something else than the others: a yardstick."""


def backends(device: torch.device, tokens: int = 0) -> list[str]:
    """Ours that run on the device, the reference last where it is bearable."""
    own = {"cuda": ("cuda", "triton"), "cpu": ("native",)}[device.type]
    found = [name for name, reason in kernels.backends().items() if reason is None and name in own]
    return found + ["reference"] * (tokens <= MOST_TOKENS)


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def sizes(device: torch.device, large: tuple, small: tuple) -> tuple:
    return large if device.type == "cuda" else small


def made(device: torch.device, make: Callable[[], Values]) -> Values:
    """Tensors drawn on the device itself, by a fixed seed."""
    torch.manual_seed(0)
    with Made(device):
        return make()


def peer(module: str, name: str, *arguments: Any, **named: Any) -> Callable[[], Call]:
    """A call of a function that another package may have; ImportError where it has not."""

    def make() -> Call:
        function = getattr(import_module(module), name)
        return lambda: function(*arguments, **named)

    return make


def nbytes(*values: Tensor | None) -> int:
    return sum(v.numel() * v.element_size() for v in values if v is not None)


def leaves(values: Values) -> Values:
    return {k: v.detach().requires_grad_() if v is not None and v.is_floating_point() else v for k, v in values.items()}


def backward(make: Callable[[Values], Tensor], values: Values, upstream: Tensor) -> Callable[[], Call]:
    """The backward alone, on a graph that is kept: gradients of all floating values."""

    def build() -> Call:
        own = leaves(values)
        y, asked = make(own), [v for v in own.values() if v is not None and v.requires_grad]
        return lambda: torch.autograd.grad(y, asked, upstream, retain_graph=True)

    return build


def scan(device: torch.device) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    for case in sizes(device, scan_cases.GPU, scan_cases.CASES[2:3]):
        values, tokens = made(device, lambda case=case: case.tensors(dtype_of(device))), case.b * case.l
        values = {k: v for k, v in values.items() if v is not None}
        options = {"chunk_size": case.chunk, "dt_softplus": True}
        heads = torch.tensor(sorted({0, case.h // 2, case.h - 1}), device=device)
        upstream = torch.zeros_like(values["x"])
        upstream[:1, :PREFIX, heads] = torch.randn_like(upstream[:1, :PREFIX, heads])
        few = _some_heads(values, heads)

        def ours(v: Values, name: str = "", options=options) -> Tensor:
            return kernels.mamba_chunk_scan_combined(**v, **options, backend=name)

        def theirs(v: Values, options=options) -> Tensor:
            return import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined(**v, **options)

        def plain(v: Values, options=options) -> Tensor:
            return peers.fallback("mamba2_chunk_scan")(*(v[k] for k in ("x", "dt", "A", "B", "C")), **options,
                                                       **{k: v.get(k) for k in ("D", "dt_bias")})  # fmt: skip

        functions = {name: (lambda v, name=name, ours=ours: ours(v, name)) for name in backends(device, tokens)}
        functions |= {"mamba_ssm": theirs} | ({peers.label(): plain} if tokens <= MOST_TOKENS else {})

        def error(y: Tensor, few=few, heads=heads, ours=ours) -> float:
            with torch.no_grad():
                return worst_error((y[:1, :PREFIX, heads],), (ours(few, "reference"),))

        def gradient_error(found: tuple, few=few, heads=heads, ours=ours, values=values, upstream=upstream) -> float:
            picked = _some_heads(dict(zip(values, found, strict=True)), heads)
            own = upstream[:1, :PREFIX, heads].double()
            exact = inputs.gradients(lambda **w: ours(w, "reference"), leaves(few), own)
            return worst_error(tuple(picked.values()), exact[1:])

        moved, flops = nbytes(values["x"], *values.values()), inputs.scan_flops(case.b, case.l, case.h)
        calls = {who: (lambda f=f, values=values: torch.no_grad()(lambda: f(values))) for who, f in functions.items()}
        calls["fla, without D"] = _simple_gla(values)
        exact_gla = {"fla, without D": lambda y, few=few, heads=heads, ours=ours: worst_error(
            (y[0][:1, :PREFIX, heads],), (ours({k: v for k, v in few.items() if k != "D"}, "reference"),))}  # fmt: skip
        yield Problem("ssd_scan forward", case.name, moved, flops, calls, error, bound, exact_gla)
        if tokens < 10**6:
            calls = {who: backward(f, values, upstream) for who, f in functions.items()}
            yield Problem("ssd_scan backward", case.name, 2 * moved - nbytes(values["x"]), 2 * flops, calls,
                          gradient_error, 3 * bound)  # fmt: skip


def _some_heads(values: Values, heads: Tensor) -> Values:
    """Three heads of the first row's first positions, in float64; of A, D and dt_bias three heads."""
    short = {k: v[:1, :PREFIX] if v.dim() > 2 else v for k, v in values.items()}
    chosen = {"x": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0}
    return inputs.double({k: v.index_select(chosen[k], heads) if k in chosen else v for k, v in short.items()})


def _simple_gla(values: Values) -> Callable[[], Call]:
    """The scan as fla has it: q, k, v and the logarithm of the decay for every head."""

    def make() -> Call:
        function = import_module("fla.ops.simple_gla").chunk_simple_gla
        h, step = values["x"].shape[2], F.softplus(values["dt"].float() + values["dt_bias"])
        q, k = (values[name].repeat_interleave(h // values[name].shape[2], 2).contiguous() for name in "CB")
        v, g = (values["x"] * step[..., None]).to(values["x"].dtype), step * values["A"]
        return torch.no_grad()(lambda: function(q, k, v, g, scale=1.0))

    return make


def conv(device: torch.device) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    for case in sizes(device, conv_cases.GPU, conv_cases.CASES[2:3]):
        values = made(device, lambda case=case: case.tensors(dtype_of(device)))
        values = {k: values[k] for k in ("x", "weight", "bias")}
        upstream = torch.randn_like(values["x"])
        few = inputs.double({"x": values["x"][:1, :64], "weight": values["weight"][:64], "bias": values["bias"][:64]})

        def ours(v: Values, name: str = "") -> Tensor:
            return kernels.causal_conv1d_fn(**v, activation="silu", backend=name)

        def of(module: str, name: str) -> Callable[[Values], Tensor]:
            return lambda v: getattr(import_module(module), name)(**v, activation="silu")

        def plain(v: Values) -> Tensor:
            same = {k: t.to(v["x"].dtype) for k, t in v.items()}
            return peers.fallback("causal_conv1d_fn")(same["x"], same["weight"], same["bias"], activation="silu")

        def fla(v: Values) -> Tensor:
            function = import_module("fla.modules.convolution").causal_conv1d
            return function(v["x"].transpose(1, 2), v["weight"], v["bias"], activation="silu")[0].transpose(1, 2)

        functions = {name: (lambda v, name=name: ours(v, name)) for name in backends(device)}
        functions |= {"causal_conv1d": of("causal_conv1d", "causal_conv1d_fn"), peers.label(): plain, "fla": fla}

        def error(y: Tensor, few=few) -> float:
            return worst_error((y[:1, :64],), (ours(few, "reference"),))

        def gradient_error(found: tuple, few=few, upstream=upstream) -> float:
            exact = inputs.gradients(lambda **v: ours(v, "reference"), leaves(few), upstream[:1, :64].double())
            return worst_error((found[0][:1, :64],), exact[1:2])

        moved = 2 * nbytes(values["x"])
        calls = {who: (lambda f=f, values=values: torch.no_grad()(lambda: f(values))) for who, f in functions.items()}
        yield Problem("causal_conv1d forward", case.name, moved, 0.0, calls, error, bound)
        calls = {who: backward(f, values, upstream) for who, f in functions.items()}
        yield Problem("causal_conv1d backward", case.name, 1.5 * moved, 0.0, calls, gradient_error, bound)


def norm(device: torch.device) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    for case in sizes(device, norm_cases.GPU, norm_cases.CASES[5:6]):
        values = made(device, lambda case=case: case.tensors(dtype_of(device)))
        values = {k: values[k] for k in ("x", "weight", "z")}
        upstream, options = torch.randn_like(values["x"]), case.options
        group = options["group_size"]

        def ours(v: Values, name: str = "", options=options) -> Tensor:
            return kernels.rmsnorm_fn(v["x"], v["weight"], None, v["z"], **options, backend=name)

        def theirs(v: Values, options=options) -> Tensor:
            function = import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
            return function(v["x"], v["weight"], None, v["z"], **options)

        def plain(v: Values, group=group) -> Tensor:
            layer = peers.fallback("MambaRMSNormGated")(v["x"].shape[-1], group_size=group, eps=1e-5)
            return torch.func.functional_call(layer, {"weight": v["weight"]}, (v["x"], v["z"])).to(v["x"].dtype)

        functions = {name: (lambda v, name=name, ours=ours: ours(v, name)) for name in backends(device)}
        functions |= {"mamba_ssm": theirs, peers.label(): plain}

        def error(y: Tensor, values=values, ours=ours) -> float:
            return worst_error((y,), (ours(inputs.double(values), "reference"),))

        def gradient_error(found: tuple, values=values, ours=ours, upstream=upstream) -> float:
            exact = inputs.gradients(lambda **v: ours(v, "reference"), leaves(inputs.double(values)), upstream.double())
            return worst_error(found, exact[1:])

        rows = nbytes(values["x"])
        calls = {who: (lambda f=f, values=values: torch.no_grad()(lambda: f(values))) for who, f in functions.items()}
        yield Problem("gated_norm forward", case.name, 3 * rows, 0.0, calls, error, bound)
        calls = {who: backward(f, values, upstream) for who, f in functions.items()}
        yield Problem("gated_norm backward", case.name, 5 * rows, 0.0, calls, gradient_error, bound)


def update(device: torch.device) -> Iterator[Problem]:
    bound = inputs.BOUND[dtype_of(device)]
    for case in sizes(device, update_cases.GPU, update_cases.CASES[1:2]):
        values = made(device, lambda case=case: case.tensors(dtype_of(device)))
        values = {k: v for k, v in values.items() if v is not None}
        state, options = values.pop("state"), {"dt_softplus": True}
        start = state.clone()
        exact = kernels.selective_state_update(start.double(), **inputs.double(values), **options, backend="reference")

        def checked(make: Callable[[], Call], state=state, start=start) -> Callable[[], Call]:
            def build() -> Call:
                state.copy_(start)  # what an earlier contender left behind
                return torch.no_grad()(make())

            return build

        plain = {k: v for k, v in values.items() if k != "x"}
        calls = {
            name: lambda name=name, values=values, options=options, state=state: (
                lambda: kernels.selective_state_update(state, **values, **options, backend=name)
            )
            for name in backends(device)
        }
        calls["mamba_ssm"] = peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update", state,
                                  **values, **options)  # fmt: skip
        calls["flashinfer"] = peer("flashinfer.mamba", "selective_state_update", state, **values, **options)
        calls[peers.label()] = lambda state=state, values=values, plain=plain, options=options: (
            lambda: peers.fallback("mamba2_selective_state_update")(state, values["x"], **plain, **options)
        )
        yield Problem("state_update", case.name, 2 * nbytes(state), 0.0, {k: checked(v) for k, v in calls.items()},
                      lambda y, exact=exact: worst_error((y,), (exact,)), bound)  # fmt: skip


def lora(device: torch.device) -> Iterator[Problem]:
    dtype = dtype_of(device)
    bound = inputs.BOUND[dtype]
    for case in sizes(device, lora_cases.GPU, lora_cases.SMALL[1:2]):
        values = made(device, lambda case=case: lora_cases.inputs(case, dtype, dtype))
        some = slice(0, 64)
        x = values["x"].reshape(-1, case.width)
        task = None if values["task"] is None else values["task"].reshape(-1)
        values |= {"x": x, "task": task}
        few = inputs.double(values | {"x": x[some], "task": None if task is None else task[some]})
        exact = kernels.lora_linear(**few, scale=2.0, backend="reference")
        base = F.linear(few["x"], few["weight"])

        def peft(values=values) -> Tensor:
            """The product, then two thin ones for each adapter, on the rows that are its own."""
            y = F.linear(values["x"], values["weight"])
            for i, (A, B) in enumerate(zip(values["lora_A"], values["lora_B"], strict=True)):
                own = (values["task"] == i)[:, None].to(y.dtype)
                y = y + 2.0 * own * F.linear(F.linear(values["x"], A), B)
            return y

        calls = {
            name: lambda name=name, values=values: torch.no_grad()(
                lambda: kernels.lora_linear(**values, scale=2.0, backend=name)
            )
            for name in backends(device, x.shape[0])
        }
        if task is not None:
            calls["torch, product by product"] = lambda peft=peft: torch.no_grad()(peft)
        yardstick = "torch, the base alone"
        calls[yardstick] = lambda values=values: torch.no_grad()(lambda: F.linear(values["x"], values["weight"]))
        yield Problem(
            "lora_linear", str(case), nbytes(x, values["weight"]) + x.shape[0] * case.out * x.element_size(),
            2.0 * x.shape[0] * case.width * case.out, calls,
            lambda y, exact=exact: worst_error((y[:64],), (exact,)), bound,
            {yardstick: lambda y, base=base: worst_error((y[:64],), (base,))},
        )  # fmt: skip


def mixer(device: torch.device) -> Iterator[Problem]:
    dtype = dtype_of(device)
    bound = inputs.BOUND[dtype]
    for case in sizes(device, mixer_cases.GPU_SEQUENCE, mixer_cases.SMALL[1:2]):
        row = made(device, lambda case=case: {"zxbcdt": mixer_cases.rows(case, dtype)})["zxbcdt"]
        weights = made(device, lambda case=case: mixer_cases.weights(case, torch.float32))
        options = {"headdim": case.p, "ngroups": case.g, "chunk_size": 256, "norm_before_gate": False}

        def ours(zxbcdt: Tensor, weights: Values, name: str, options=options) -> Tensor:
            return kernels.mamba_split_conv1d_scan_combined(zxbcdt, **weights, **options, backend=name)

        exact = ours(row[:1, :256].double(), inputs.double(weights), "reference")
        calls = {
            name: lambda name=name, row=row, weights=weights, ours=ours: torch.no_grad()(
                lambda: ours(row, weights, name)
            )
            for name in backends(device, case.b * case.l)
        }
        calls["mamba_ssm"] = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined", row,
                                  **weights, **options)  # fmt: skip
        moved = nbytes(row) + case.b * case.l * case.dim * row.element_size()
        yield Problem("mamba_mixer sequence", str(case), moved, inputs.scan_flops(case.b, case.l, case.h), calls,
                      lambda y, exact=exact: worst_error((y[:1, :256],), (exact,)), bound)  # fmt: skip
    for case in sizes(device, mixer_cases.GPU_STEP, mixer_cases.SMALL[1:2]):
        row = made(device, lambda case=case: {"zxbcdt": mixer_cases.rows(case, dtype)})["zxbcdt"][:, 0]
        weights = made(device, lambda case=case: mixer_cases.weights(case, torch.float32))
        states = made(device, lambda case=case: mixer_cases.states(case, torch.float32))
        start, options = {k: v.clone() for k, v in states.items()}, {"headdim": case.p, "ngroups": case.g}

        def step(zxbcdt, states, weights, name, options=options) -> Tensor:
            return kernels.mamba_mixer_step(zxbcdt, **states, **weights, **options, backend=name)

        exact = step(row.double(), inputs.double(start), inputs.double(weights), "reference")

        def contender(name: str, states=states, start=start, row=row, weights=weights, step=step) -> Callable[[], Call]:
            def make() -> Call:
                for key, value in start.items():
                    states[key].copy_(value)
                return lambda: step(row, states, weights, name)

            return make

        yield Problem("mamba_mixer step", str(case), 2 * nbytes(*states.values()) + nbytes(row), 0.0,
                      {name: contender(name) for name in backends(device)},
                      lambda y, exact=exact: worst_error((y,), (exact,)), bound)  # fmt: skip


OPERATIONS: dict[str, Callable[[torch.device], Iterator[Problem]]] = {
    "causal_conv1d": conv,
    "ssd_scan": scan,
    "state_update": update,
    "gated_norm": norm,
    "lora_linear": lora,
    "mamba_mixer": mixer,
}
