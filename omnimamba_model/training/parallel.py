"""One process, or many under torchrun: who computes what, and every layer sharded over all (FSDP2)."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..omnimamba import OmniMamba
from ..weights import usable


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``; its tensors live on ``device``."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` places; ValueError where they cannot be dealt out evenly."""
        if count % self.world:
            raise ValueError(f"a batch of {count} cannot be dealt out evenly to {self.world} processes")
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, value: float) -> float:
        """The value added over all processes, in fp64."""
        if self.world == 1:
            return value
        device = self.device if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total)

    def add(self, counts: Counter[str]) -> Counter[str]:
        """The counts of all processes together."""
        if self.world == 1:
            return counts
        found: list[Counter[str]] = [Counter()] * self.world
        dist.all_gather_object(found, counts)
        return sum(found, Counter())

    def hear(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.world == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """This process's place under torchrun, or alone. ``device`` is "cpu" or "cuda"; None takes a GPU where one is.

    ValueError where it is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usable(kind)
    if not dist.is_torchelastic_launched():
        yield Ranks(device=torch.device(kind))
        return
    place = torch.device(kind, dist.get_node_local_rank()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """End this process, if torchrun started it, without taking the interpreter down first.

    gloo's threads let go of their last tensors a little after a collective has returned. Where the interpreter ends in
    that moment, torch aborts the process (pytorch/pytorch issue 190489) and the launcher calls a finished run failed.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def spread(model: OmniMamba, ranks: Ranks) -> OmniMamba:
    """Shard the model's parameters, layer by layer, over all processes; alone it only moves to the device."""
    model.to(ranks.device)
    if ranks.world > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.backbone.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=False)
    return model


def recompute(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass and compute the layer again there."""
    from torch.utils.checkpoint import checkpoint

    for layer in model.backbone.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
