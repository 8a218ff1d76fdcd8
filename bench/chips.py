"""Time and memory of a prefill on many chips: counted bytes and FLOPs over a chip's rates, and what its links take.

Every figure here is a prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from omnimamba_model import MambaConfig

from . import counts
from .counts import Decoder, Part
from .tables import duration, table


@dataclass
class Rates:
    """FLOP/s and byte/s by kind of part; a kind that is not named moves and computes at ``*``."""

    flops: dict[str, float]
    bytes: dict[str, float]

    def seconds(self, parts: list[Part]) -> float:
        return sum(
            max(p.flops / self.flops.get(p.kind, self.flops["*"]), p.bytes / self.bytes.get(p.kind, self.bytes["*"]))
            for p in parts
        )


@dataclass(frozen=True)
class Cluster:
    """Chips of one kind and the link between neighbours; the default is a data sheet's H200 with NVLink."""

    flops: float = 989e12
    bandwidth: float = 4.8e12
    link: float = 450e9
    latency: float = 5e-6
    share: float = 0.6
    """Of ``flops`` and ``bandwidth`` that is reached: an assumption, to be replaced by what a chip shows."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = value >= 0 if name == "latency" else value > 0
            if not (low and value < math.inf and (name != "share" or value <= 1)):
                least = "0 or more" if name == "latency" else "more than 0" + ", at most 1" * (name == "share")
                raise ValueError(f"{name}: got {value:g}, expected {least}")

    @property
    def rates(self) -> Rates:
        return Rates({"*": self.share * self.flops}, {"*": self.share * self.bandwidth})


def prefill(config: MambaConfig, l: int, gpus: int, split: str, on: Cluster) -> tuple[float, float]:
    """Seconds, and bytes on each chip, of taking in l tokens in 16 bits, batch 1, split over ``gpus``.

    sequence: each chip has l / gpus tokens; in a layer it gets the scan states of all others and the halo of d_conv - 1
    rows before its own. tensor: each has heads / gpus; a layer adds its outputs up in a ring. The bytes are of one
    pass over all tokens at once: what no chip holds must come in segments, which costs Mamba-2 nothing but launches.
    """
    _check_split(config, l, gpus, split)
    size, layers = 2, config.n_layer
    tokens = -(-l // gpus) if split == "sequence" else l
    inside = layers * on.rates.seconds(counts.mamba_layer(config, 1, tokens, size))
    between = (
        on.rates.seconds(counts.mamba_pass(config, 1, tokens, size)) - inside
    )  # what each chip of a tensor split has
    alone = between + inside / (1 if split == "sequence" else gpus)
    state = counts.state_bytes(config) / layers
    sent = _exchange(config, l, gpus, split, state, on) if gpus > 1 else 0.0
    weights = size * counts.weight_count(config) / (1 if split == "sequence" else gpus)
    each = config.in_proj_dim + config.conv_dim + config.d_inner
    held = tokens * (config.d_model * (counts.FLOAT + size) + size * each / (1 if split == "sequence" else gpus))
    return alone + layers * sent, weights + held + layers * state


def _exchange(config: MambaConfig, l: int, gpus: int, split: str, state: float, on: Cluster) -> float:
    """Seconds that a layer's chips wait for one another."""
    if split == "sequence":
        return (gpus - 1) * (on.latency + state / on.link) + on.latency
    moved = 2 * (gpus - 1) / gpus * 2 * l * config.d_model
    return 2 * (gpus - 1) * on.latency + moved / on.link


def attention_prefill(of: Decoder, l: int, gpus: int, on: Cluster) -> tuple[float, float]:
    """The same of a Transformer, keys and values going round a ring behind the computation (sequence split)."""
    tokens = -(-l // gpus)
    whole = on.rates.seconds(counts.decoder_pass(of, 1, l, 2)) / gpus
    ring = of.layers * (gpus - 1) * (on.latency + 2 * 2 * tokens * of.width / on.link)
    weights = 2 * (of.layers * of.matrices + of.width * of.vocab)
    held = tokens * (of.width * (counts.FLOAT + 2 + 3 * 2) + 2 * of.hidden) + counts.cache_bytes(of, tokens, 2)
    return max(whole, ring), weights + held


def _check_split(config: MambaConfig, l: int, gpus: int, split: str) -> None:
    if split not in ("sequence", "tensor"):
        raise ValueError(f"split: got {split!r}, expected 'sequence' or 'tensor'")
    if split == "tensor" and config.nheads % gpus:
        raise ValueError(f"a tensor split needs a divisor of the {config.nheads} heads, got {gpus} chips")
    if gpus < 1 or l < gpus:
        raise ValueError(f"got {l} tokens and {gpus} chips, expected at least one token a chip")


def _cell(l: int, gpus: int, split: str, on: Cluster) -> tuple[float | None, str]:
    """Seconds of the 1.3B shape on so many chips, with its memory in words; None with the reason."""
    try:
        seconds, held = prefill(LARGE, l, gpus, "sequence" if gpus == 1 else split, on)
    except ValueError as error:
        return None, f"none: {error}"
    return seconds, f"{duration(seconds)}, {held / 1e9:.1f} GB"


LENGTHS = tuple(2**k for k in (12, 14, 17, 20, 22, 24))
LARGE, LARGE_PEER = MambaConfig(), Decoder(width=2048, layers=24, hidden=8192)
"""1.3B each."""


def extrapolated(gpus: list[int], on: Cluster) -> str:
    """Time and memory of a prefill of the 1.3B shape, up to 16M tokens, on one chip and on many; a split that so many
    chips cannot share says why."""
    lines = []
    for l in LENGTHS:
        for count in gpus:
            cells = [_cell(l, count, split, on) for split in ("sequence", "tensor")]
            times = [seconds for seconds, _ in cells if seconds]
            shown, ratio = [text for _, text in cells], ""
            if count <= l:
                theirs, held = attention_prefill(LARGE_PEER, l, count, on)
                shown.append(f"{duration(theirs)}, {held / 1e9:.1f} GB")
                ratio = f"{theirs / min(times):.3g}x"
            lines.append([f"{l:,}", str(count), *shown, *([""] if count > l else []), ratio])
    header = ["tokens", "chips", "Mamba-2, sequence split", "tensor split", "Transformer, ring", "its time over ours"]
    return table(header, lines)
