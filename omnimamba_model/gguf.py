"""A plain Mamba-2 as one GGUF file (version 3, architecture mamba2), which llama.cpp and its kin read.

Token ids go in and out of it: the file names no tokenizer.

    header     "GGUF", version, number of tensors, number of facts
    facts      name, type, value
    tensors    name, sizes from the fastest in memory to the slowest, type, offset into the data
    data       each tensor at a multiple of ALIGNMENT

Matrices are float32, bfloat16 or Q8_0: 32 neighbours of a row as one float16 scale and 32 int8. All else is float32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .backbone import MambaLM
from .files import write_whole

SUFFIX = ".gguf"
DTYPES = ("float32", "bfloat16", "q8_0")
VERSION, ALIGNMENT, BLOCK = 3, 32, 32
LONGEST = 2**20
"""The length of context that the file says: a state has none, and readers want a number."""

_UINT32, _FLOAT32, _STRING = 4, 6, 8
_TYPES = {"float32": 0, "q8_0": 8, "bfloat16": 30}
_FILE_TYPES = {"float32": 0, "q8_0": 7, "bfloat16": 32}


@dataclass
class _Entry:
    """A tensor to write; ``values`` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Tensor]

    def nbytes(self) -> int:
        count = int(torch.Size(self.shape).numel())
        return {"float32": 4 * count, "bfloat16": 2 * count, "q8_0": count // BLOCK * (BLOCK + 2)}[self.dtype]

    def to_bytes(self) -> bytes:
        values = self.values().detach().float().reshape(self.shape).contiguous()
        if self.dtype == "q8_0":
            return q8_0(values).numpy().tobytes()
        if self.dtype == "bfloat16":
            return values.bfloat16().view(torch.int16).numpy().tobytes()
        return values.numpy().tobytes()


def save_gguf(model: MambaLM, path: str | Path, dtype: str = "float32") -> None:
    """Write ``model`` into the file ``path``, whole or not at all, its matrices as ``dtype``, one of DTYPES.

    ValueError where the model does not fit the format: widths that are no multiple of 32 under q8_0.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    entries = list(_entries(model, dtype))
    for entry in entries:
        if entry.dtype == "q8_0" and entry.shape[-1] % BLOCK:
            raise ValueError(f"q8_0 needs rows of a multiple of {BLOCK}, and {entry.name} has shape {entry.shape}")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, _facts(model, dtype), entries)

    write_whole(Path(path), write)


def q8_0(values: Tensor) -> Tensor:
    """values (rows, a multiple of 32) float32 as blocks (count, 34) of bytes: a float16 scale, 32 int8."""
    blocks = values.reshape(-1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    rounded = (blocks * inverse).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), rounded.view(torch.uint8)], dim=1)


def _entries(model: MambaLM, dtype: str) -> Iterator[_Entry]:
    config, backbone = model.config, model.backbone
    groups = config.ngroups

    def entry(name: str, tensor: Tensor, *shape: int, kept: str = "float32", change=lambda t: t) -> _Entry:
        return _Entry(name, shape or tuple(tensor.shape), kept, lambda: change(tensor))

    yield entry("token_embd.weight", backbone.embedding.weight, kept=dtype)
    yield entry("output_norm.weight", backbone.norm_f.weight)
    for i, layer in enumerate(backbone.layers):
        mixer, at = layer.mixer, f"blk.{i}."
        yield entry(at + "attn_norm.weight", layer.norm.weight)
        yield entry(at + "ssm_in.weight", mixer.in_proj.weight, kept=dtype)
        yield entry(at + "ssm_conv1d.weight", mixer.conv1d.weight, config.conv_dim, config.d_conv)
        yield entry(at + "ssm_conv1d.bias", mixer.conv1d.bias)
        yield entry(at + "ssm_dt.bias", mixer.dt_bias)
        yield entry(at + "ssm_a", mixer.A_log, config.nheads, 1, change=lambda t: -t.float().exp())
        yield entry(at + "ssm_d", mixer.D, config.nheads, 1)
        yield entry(at + "ssm_norm.weight", mixer.norm.weight, groups, config.d_inner // groups)
        yield entry(at + "ssm_out.weight", mixer.out_proj.weight, kept=dtype)


def _facts(model: MambaLM, dtype: str) -> dict[str, int | float | str]:
    config = model.config
    return {
        "general.architecture": "mamba2",
        "general.name": "Mamba-2",
        "general.alignment": ALIGNMENT,
        "general.file_type": _FILE_TYPES[dtype],
        "mamba2.context_length": LONGEST,
        "mamba2.embedding_length": config.d_model,
        "mamba2.feed_forward_length": 0,
        "mamba2.attention.head_count": 0,
        "mamba2.block_count": config.n_layer,
        "mamba2.vocab_size": config.vocab_size,
        "mamba2.ssm.conv_kernel": config.d_conv,
        "mamba2.ssm.inner_size": config.d_inner,
        "mamba2.ssm.state_size": config.d_state,
        "mamba2.ssm.time_step_rank": config.nheads,
        "mamba2.ssm.group_count": config.ngroups,
        "mamba2.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "no_vocab",
    }


def _write(file: BinaryIO, facts: dict[str, int | float | str], entries: list[_Entry]) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(entries), len(facts)))
    for name, value in facts.items():
        file.write(_string(name) + _value(value))
    offset = 0
    for entry in entries:
        sizes = entry.shape[::-1]
        file.write(_string(entry.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", _TYPES[entry.dtype], offset))
        offset += -(-entry.nbytes() // ALIGNMENT) * ALIGNMENT
    for entry in entries:
        file.write(bytes(-file.tell() % ALIGNMENT))
        file.write(entry.to_bytes())
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)
