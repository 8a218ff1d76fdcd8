"""Claim: a Mamba-2 layer's time grows like the length, attention's like its square; where do they cross?

One layer of width 768 each, batch 1, fp32: Mamba-2 with in_proj and out_proj; causal attention (torch SDPA) with
its QKV and output projections. A length is left out where the time predicted from the half of it exceeds the
budget.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from omnimamba_kernels import use_backend
from omnimamba_model import BASE, MambaBackbone, MambaConfig

from . import inputs
from .baselines.attention import Attention
from .measure import Contender, Work, worst_error

WIDTH = 768
LENGTHS = [2**k * 1024 for k in range(7)]
FORWARD, TRAINING = "layer forward", "layer forward + backward"
OURS, PEER = "Mamba-2", "attention"
BUDGET = {False: 120.0, True: 8.0}
"""Longest predicted time of one call that is still run: a whole run, a quick one."""
SLICE = 256
full = pytest.mark.full


def case(length: int) -> str:
    return f"1 x {length}"


@functools.cache
def layers() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    mixer = MambaBackbone(MambaConfig.preset("130m", n_layer=1, vocab_size=8)).layers[0].mixer
    return {OURS: mixer, PEER: Attention(WIDTH)}


def call(name: str, layer: torch.nn.Module, u: torch.Tensor) -> torch.Tensor:
    return layer(u, BASE) if name == OURS else layer(u)


def exact(name: str, layer: torch.nn.Module, u: torch.Tensor) -> torch.Tensor:
    """The layer in fp64, from its definition."""
    layer = copy.deepcopy(layer).double()
    if name == PEER:
        return layer.plain(u)
    with use_backend("reference"):
        return layer(u, BASE)


def contender(name: str, u: torch.Tensor, training: bool, expected: float) -> Contender:
    """Checked on the first positions: the output there, or the gradient of what the output there sums to.

    Ours runs over the whole length for that; attention above 16K tokens over the first 4K alone, to save minutes.
    """
    layer = layers()[name]
    checked = u[:, :4096] if name == PEER and u.shape[1] > 16384 else u
    parameters = list(layer.parameters())
    start = u[:, :SLICE].double()

    def run(u=u):
        if not training:
            with torch.no_grad():
                return call(name, layer, u)
        leaf = u.detach().requires_grad_()
        return torch.autograd.grad(call(name, layer, leaf).square().sum(), [leaf, *parameters])

    def check() -> float:
        if not training:
            with torch.no_grad():
                return worst_error((run(checked)[:, :SLICE],), (exact(name, layer, start),))
        leaf, few = checked.detach().requires_grad_(), start.requires_grad_()
        (found,) = torch.autograd.grad(call(name, layer, leaf)[:, :SLICE].square().sum(), leaf)
        (true,) = torch.autograd.grad(exact(name, layer, few).square().sum(), few)
        return worst_error((found[:, :SLICE],), (true,))

    mine = work(name, u.shape[1], training)
    return Contender(name, run, check, inputs.BOUND[torch.float32], work=mine, expected=expected)


def predicted(bench, name: str, length: int, group: str) -> float | None:
    """Twice (attention: four times) the seconds of the length half as long; None where that one was not run."""
    before = next((r for r in bench.rows if (r.group, r.case, r.who) == (group, case(length // 2), name)), None)
    return (2 if name == OURS else 4) * before.seconds if before and before.seconds else None


def work(name: str, length: int, training: bool) -> Work:
    """FLOPs of projections and scan, or of projections and scores below the diagonal; a backward as two forwards."""
    config = MambaConfig.preset("130m")
    if name == OURS:
        flops = 2.0 * length * WIDTH * (config.in_proj_dim + config.d_inner)
        flops += inputs.scan_flops(1, length, config.nheads)
    else:
        flops = 2.0 * length * WIDTH * 4 * WIDTH + 2.0 * length**2 * WIDTH
    return Work("sgemm", flops=flops * (3 if training else 1))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("length", [*LENGTHS[:3], *(pytest.param(n, marks=full) for n in LENGTHS[3:])])
def test_layer(bench, benchmark, length, training):
    group = TRAINING if training else FORWARD
    u = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))
    contenders, budget = [], BUDGET[bench.quick]
    for name in (OURS, PEER):
        guess = predicted(bench, name, length, group) if length > LENGTHS[0] else 0.0
        if guess is None or guess > budget:
            much = "more" if guess is None else f"{guess:.0f} s"
            bench.absent(group, case(length), name, f"{much} predicted, {budget:.0f} s allowed")
        else:
            contenders.append(contender(name, u, training, guess))
    if not contenders:
        pytest.skip("every contender is over its budget")
    bench.compare(benchmark, group, case(length), contenders, work(OURS, length, training), tokens=length)
