"""What a layer or a model computes and moves, part by part, counted by the operations' own cost models.

A part's ``kind`` says which measured rate it runs at: ``product`` (matrix products), ``scan``, ``scores`` (attention),
``stream`` (elementwise: bytes once in, once out), ``weights`` (matrices read once for one token), ``cache``, ``fresh``
(memory that the system hands out anew at each call, whose pages it clears when they are first written).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimamba_kernels.causal_conv1d import cost as conv
from omnimamba_kernels.gated_norm import cost as norm
from omnimamba_kernels.lora_linear import cost as linear
from omnimamba_model import MambaConfig

from .inputs import CHUNK

FLOAT = 4
FRESH = 2**25
"""Bytes from which on glibc maps memory anew at each allocation: the most that its threshold grows to."""


@dataclass(frozen=True)
class Part:
    kind: str
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Decoder:
    """Sizes of bench.baselines.transformer's Transformer; ``layers`` without ``hidden`` are attention alone."""

    width: int = 768
    layers: int = 12
    hidden: int = 3352
    vocab: int = 50288

    @property
    def matrices(self) -> int:
        """Parameters of a layer's matrices."""
        return 4 * self.width**2 + 2 * self.width * self.hidden


def _meta(*shape: int, size: int = FLOAT) -> Tensor:
    return torch.empty(shape, dtype={2: torch.bfloat16, 4: torch.float32}[size], device="meta")


def _product(rows: int, columns: int, out: int, size: int) -> Part:
    floor = linear.forward_floor(
        _meta(rows, columns, size=size), _meta(out, columns, size=size), None, None, None, None
    )
    return Part("product", floor.flops, floor.loaded + floor.stored)


def scan_flops(config: MambaConfig, tokens: int) -> float:
    """As bench.inputs.scan_flops counts them: at chunk 64, C B^T once a group."""
    p, n = config.headdim, config.d_state
    return tokens * (config.nheads * (2 * CHUNK * p + 4 * n * p) + config.ngroups * 2 * CHUNK * n)


def mamba_layer(config: MambaConfig, b: int, l: int, size: int = FLOAT) -> list[Part]:
    """The forward of one layer on (b, l) tokens; activations and weights of ``size`` bytes a number."""
    rows, inner, channels = b * l, config.d_inner, config.conv_dim
    taps = _meta(channels, config.d_conv)
    mixed = conv.forward_floor(_meta(b, channels, l, size=size), taps, None, None, None, return_final_states=False)
    gated = norm.forward_floor(_meta(rows, inner, size=size), _meta(inner), None, _meta(rows, inner, size=size))
    moved = size * rows * (channels + config.nheads + inner)
    return [
        _product(rows, config.d_model, config.in_proj_dim, size),
        Part("stream", bytes=mixed.loaded + mixed.stored),
        Part("scan", scan_flops(config, rows), moved),
        Part("stream", bytes=gated.loaded + gated.stored),
        _product(rows, inner, config.d_model, size),
    ]


def fresh_memory(config: MambaConfig, rows: int, size: int = FLOAT) -> Part:
    """What the outputs of a layer's operations take of it on a CPU."""
    widths = (config.in_proj_dim, config.conv_dim, config.d_inner, config.d_inner, config.d_model)
    return Part("fresh", bytes=float(sum(size * rows * width for width in widths if size * rows * width >= FRESH)))


def mamba_pass(config: MambaConfig, b: int, l: int, size: int = FLOAT) -> list[Part]:
    """The prefill of a model: its layers, the norms and residuals between them, the head of the last position."""
    between = Part("stream", bytes=b * l * config.d_model * (2 * FLOAT + size + FLOAT))
    head = Part("weights", 2.0 * b * config.d_model * config.vocab_size, size * config.d_model * config.vocab_size)
    return [*config.n_layer * mamba_layer(config, b, l, size), *config.n_layer * [between], head]


def state_bytes(config: MambaConfig) -> int:
    """Of one sequence in fp32: every layer's scan state, and the convolution's last inputs."""
    scan = config.nheads * config.headdim * config.d_state
    return FLOAT * config.n_layer * (scan + config.conv_dim * (config.d_conv - 1))


def weight_count(config: MambaConfig) -> int:
    """Numbers in the matrices that a token reads, the table as the head."""
    layer = config.d_model * (config.in_proj_dim + config.d_inner)
    return config.n_layer * layer + config.d_model * config.vocab_size


def mamba_step(config: MambaConfig, b: int, size: int) -> list[Part]:
    """One token of b sequences: every matrix once, every state there and back."""
    weights = size * weight_count(config)
    return [Part("weights", 2.0 * b * weight_count(config), weights + 2.0 * b * state_bytes(config))]


def attention_layer(width: int, b: int, l: int, size: int = FLOAT) -> list[Part]:
    """Causal attention with its projections: scores and values below the diagonal."""
    products = [_product(b * l, width, 3 * width, size), _product(b * l, width, width, size)]
    return [*products, Part("scores", 2.0 * b * l**2 * width, 4.0 * size * b * l * width)]


def decoder_pass(of: Decoder, b: int, l: int, size: int = FLOAT) -> list[Part]:
    """The whole Transformer over (b, l) tokens, and the head of the last position."""
    feed = [_product(b * l, of.width, of.hidden, size), _product(b * l, of.hidden, of.width, size)]
    head = Part("weights", 2.0 * b * of.width * of.vocab, size * of.width * of.vocab)
    return [*of.layers * (attention_layer(of.width, b, l, size) + feed), head]


def cache_bytes(of: Decoder, l: int, size: int) -> int:
    """Keys and values of l tokens of one sequence."""
    return 2 * of.layers * of.width * l * size


def decoder_step(of: Decoder, b: int, context: float, size: int) -> list[Part]:
    """One token of b sequences with a key-value cache of ``context`` tokens."""
    count = of.layers * of.matrices + of.width * of.vocab
    return [
        Part("weights", 2.0 * b * count, size * count),
        Part("cache", 4.0 * b * of.layers * context * of.width, b * cache_bytes(of, 1, size) * context),
    ]


def backward_too(parts: list[Part]) -> list[Part]:
    """Forward and backward: three times the forward's FLOPs, and bytes."""
    return [Part(p.kind, 3 * p.flops, 3 * p.bytes) for p in parts]
