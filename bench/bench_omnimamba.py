"""OmniMamba at its published size on this machine: a checkpoint with the official names and shapes, random values.

1.61 B stored numbers in bf16: it is written as the official pickle, converted, loaded, and must come back bit for bit.
Then one image of 256 tokens is drawn and a question about an image answered in 32, batch 1. The floor is
the matrices that a token needs, read once at the DRAM rate; peak memory is a child process's, over the weights' bytes.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnimamba_kernels import use_backend
from omnimamba_model import OmniMamba, OmniMambaConfig, answer, draw
from omnimamba_model.cli import main

from . import inputs
from .measure import Contender, Work, relative_error

GROUP, OURS = "OmniMamba 1.3B", "OmniMamba 1.3B, bf16 weights"
QUESTION, ANSWER = 16, 32
full = pytest.mark.full


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="omnimamba-1.3b-")


@functools.cache
def checkpoint() -> Path:
    """The folder that `omnimamba convert` makes of a file with the official names."""
    folder = Path(_folder().name)
    torch.manual_seed(0)
    tensors = official_tensors()
    torch.save(tensors, folder / "OmniMamba-1.3b.pth")
    assert main(["convert", str(folder / "OmniMamba-1.3b.pth"), str(folder / "converted")]) == 0
    (folder / "OmniMamba-1.3b.pth").unlink()
    found = OmniMamba.from_pretrained(folder / "converted").state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name.removeprefix("llm_backbone.mamba.")], tensor), name
    return folder / "converted"


def official_tensors() -> dict[str, Tensor]:
    """bf16; matrices scaled to keep activations of order one."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in OmniMamba(OmniMambaConfig()).state_dict().items()}
    found = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1)
        elif name.endswith("A_log"):
            tensor.uniform_(0, 2.7)
        elif name.endswith("dt_bias"):
            tensor.uniform_(-6, -2)
        else:
            tensor.normal_(std=0.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.3)
        found[name if name.startswith("projector.") else f"llm_backbone.mamba.{name}"] = tensor
    return found


@functools.cache
def model() -> OmniMamba:
    return OmniMamba.from_pretrained(checkpoint())


def token_bytes(head: Tensor) -> int:
    """What a token reads: every layer's matrices, and its task's table as the head."""
    layers = model().backbone.layers.named_parameters()
    return head.nbytes + sum(p.nbytes for name, p in layers if p.ndim == 2 and "_lora_" not in name)


def caption() -> Tensor:
    return torch.randint(1, 50000, (1, 68), generator=torch.Generator().manual_seed(0))


def sight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 729, 2176, generator=generator), torch.randint(1, 50000, (1, QUESTION), generator=generator)


@torch.inference_mode()
def first_token_error(task: str) -> float:
    """The first token's logits against plain PyTorch in fp32 on the same weights."""
    network = model()

    def logits() -> Tensor:
        state = network.backbone.new_state(1)
        opening = network.t2i_opening(caption()) if task == "t2i" else network.mmu_opening(sight()[0])
        hidden = network.backbone.prefill(opening, state, 1 if task == "t2i" else 0)
        return (network.image_head if task == "t2i" else network.text_head)(hidden)

    got = logits()
    with use_backend("reference"):
        return relative_error(got, logits())


def peak(task: str) -> Iterator[None]:
    """For bench.memory: loading the weights and using them."""
    yield
    yield
    network = OmniMamba.from_pretrained(checkpoint_of_child())
    if task == "t2i":
        draw(network, caption())
    else:
        answer(network, *sight(), ANSWER, stop=[])


def checkpoint_of_child() -> Path:
    """The newest folder that a parent made; a child process has none of its own."""
    return max(Path(tempfile.gettempdir()).glob("omnimamba-1.3b-*/converted"), key=lambda p: p.stat().st_mtime)


@full
@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_official_size(bench, benchmark, task):
    backbone = model().backbone
    drawing = task == "t2i"
    head = backbone.img_embeddings.word_embeddings.weight if drawing else backbone.embedding.weight
    tokens = 256 if drawing else ANSWER
    run = (lambda: draw(model(), caption())) if drawing else (lambda: answer(model(), *sight(), ANSWER, stop=[]))
    bound = 2 * inputs.BOUND[torch.float32]
    contender = Contender(OURS, run, lambda: first_token_error(task), bound, expected=20.0)
    case = "draws an image of 256 tokens" if drawing else f"answers {QUESTION} tokens about an image in {ANSWER}"
    work = Work("read", bytes=tokens * token_bytes(head))
    rows = bench.compare(benchmark, GROUP, case, [contender], work, tokens=tokens)
    weights = sum(p.nbytes for p in model().parameters())
    bench.peaks(benchmark, rows, "official_size", kind=task)
    for row in rows:
        if row.peak_bytes:
            row.note = f"peak {row.peak_bytes / weights:.2f} of the weights"
