"""Each wait and fence of Hopper's kernels is needed: one after another is left out on the emulator, and it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import emulated
import pytest
import torch
from common import evaluate, running, same_bits, weights
from test_lora_linear_sm90 import LAYOUTS, product
from test_ssd_scan import GRADS, scan

from omnimamba_kernels import cuda
from omnimamba_kernels.ssd_scan.cases import Case

pytestmark = [
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
    pytest.mark.skipif(emulated.SANITIZED, reason="make test runs it"),
]
SLOW = 0.01, 0.05
SEEDS = (6, 3, 7, 4, 8, 5, 12, 9, 13, 10, 14, 11)  # in turns: wgmma reads at any time; when nothing else can go on
ORDERS = [(seed, early) for seed in SEEDS for early in (False, True)]


def scanned(*cases: Case) -> list[Callable[[], list[torch.Tensor]]]:
    def run(case, tensors):
        return lambda: list(evaluate(scan(case.options), tensors).values())

    return [run(case, case.tensors(torch.bfloat16)) for case in cases]


def differentiated(*cases: Case) -> list[Callable[[], list[torch.Tensor]]]:
    """Their backwards, again and again after one forward."""

    def run(case, tensors):
        leaves = [tensors[name].requires_grad_() for name in GRADS if tensors[name] is not None]
        outputs = scan(case.options)(**tensors)
        return lambda: list(torch.autograd.grad(outputs, leaves, weights(outputs), retain_graph=True))

    return [run(case, case.tensors(torch.bfloat16)) for case in cases]


def multiplied() -> list[Callable[[], list[torch.Tensor]]]:
    return [
        lambda: [product(300, 576, 264, LAYOUTS[0], ranks=(2, 20), chip=2)[0]],
        lambda: [product(129, 8, 8)[0]],
    ]


KERNELS = {
    "ssd_scan/cuda_sm90.cu": lambda: scanned(
        Case("walked", 1, 300, 2, 64, n=64, skip=1, gate=True, limit=SLOW, sequences="seq_idx"),
        Case("two parts", 1, 300, 1, 32, n=160, limit=SLOW),
    ),
    "ssd_scan/cuda_sm90_backward.cu": lambda: differentiated(
        Case("padding", 1, 64, 5, 32, n=64, skip=1, limit=SLOW, sequences="seq_idx"),
        Case("packed", 1, 64, 4, 32, n=128, skip=1, limit=SLOW, sequences="cu_seqlens"),
    ),
    "lora_linear/cuda_sm90.cu": multiplied,
}
SOURCES = {
    "ssd_scan/cuda_sm90.cu": ("ssd_scan/hopper_feed.cuh", "ssd_scan/hopper_block.cuh"),
    "ssd_scan/cuda_sm90_backward.cu": ("ssd_scan/hopper_back_block.cuh",),
    "lora_linear/cuda_sm90.cu": ("lora_linear/feed_sm90.cuh",),
}
# What the emulator gives no reason for, by the line of the source. Nor is sync_warp asked: few lanes lie so far behind.
NOT_NEEDED = {
    "wgmma_wait<PARTS<N> == 2 ? 0 : 1>();  // else the compiler runs out of registers": "registers are not counted",
    "wgmma_wait<1>();  // as above": "registers are not counted",
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "limits", lambda _: (1, emulated.SHARED[90]))  # no segments: stages come round
    with running("cuda-emulated90"):
        yield
    emulated.leave_out(None)
    emulated.configure()


def places_in(*sources: str) -> list[str]:
    split = [(place, *place.partition(" ")[::2]) for place in emulated.places()]
    return [place for place, name, where in split if name != "sync_warp" and where.rpartition(":")[0] in sources]


def source_line(place: str) -> str:
    path, _, line = place.partition(" ")[2].rpartition(":")
    return (Path(emulated.ROOT) / "csrc" / path).read_text().splitlines()[int(line) - 1].strip()


def differs(call, wanted: list[torch.Tensor], order: tuple[int, bool]) -> bool:
    """Whether this order of threads and copies gives other bits, or an error."""
    emulated.configure(order[0], early_copies=order[1])
    try:
        return not all(map(same_bits, call(), wanted))
    except RuntimeError:
        return True


def shows(call, wanted: list[torch.Tensor], place: str, orders: list[tuple[int, bool]]) -> bool:
    """Whether some order shows that what stands at ``place`` is left out. That one comes first for the next place."""
    emulated.leave_out(place)
    found = next((order for order in orders if differs(call, wanted, order)), None)
    emulated.leave_out(None)
    if found is not None:
        orders.remove(found)
        orders.insert(0, found)
    return found is not None


@pytest.mark.parametrize("source", KERNELS)
def test_every_wait_and_fence_is_needed(source):
    asked, seen, orders = {}, set(), list(ORDERS)
    for call in KERNELS[source]():
        emulated.configure()
        emulated.leave_out("")
        wanted = call()
        found = places_in(source, *SOURCES[source])
        emulated.leave_out(None)
        assert not differs(call, wanted, orders[0])
        asked |= {place: line for place in found if (line := source_line(place)) not in NOT_NEEDED}
        mine = [place for place in found if place in asked and place not in seen]
        seen |= {place for place in mine if shows(call, wanted, place, orders)}
    unseen = {place: line for place, line in asked.items() if place not in seen}
    assert len(asked) > 10 and not unseen
