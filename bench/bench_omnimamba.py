"""OmniMamba at its published size on this machine: a checkpoint with the official names and shapes, random values.

1.61 B numbers in bf16, the tied heads counted: it is written as the official pickle, converted, loaded, and must come
back bit for bit. Then one image of 256 tokens is drawn and a question about an image answered in 32, batch 1, the
answer's tokens alone after that; and 16 images at once, as in the paper's Table 3, from a piece of their tokens.
The floor is the matrices that a token needs, read once at the DRAM rate, and beyond one image the states there and
back; peak memory is a child's, over the weights' bytes.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnimamba_model import MambaConfig, OmniMamba, OmniMambaConfig, answer, draw
from omnimamba_model.cli import main
from omnimamba_model.config import MMU
from omnimamba_model.engine import stream
from omnimamba_model.generation import answer_rows, drawing_rows
from omnimamba_model.sampling import GREEDY

from . import inputs
from .integrated import sampled
from .measure import Contender, Work, relative_error
from .published import AT_ONCE, TABLE_3, at_once_case

GROUP, OURS = "OmniMamba", "OmniMamba, bf16 weights"
QUESTION, ANSWER, PIECE = 16, 32, 16
STORE = 2**24 - 3
"""Numbers of noise, a prime: no width of a matrix divides it, so that no two rows of one are the same."""
full = pytest.mark.full


PREFIX = "llm_backbone.mamba."
TIED = {
    f"{PREFIX}lm_head.weight": f"{PREFIX}backbone.embedding.weight",
    f"{PREFIX}img_head.weight": f"{PREFIX}backbone.img_embeddings.word_embeddings.weight",
}
"""The heads, which the file names beside the tables that they are."""
SMALL, FULL = "two layers of width 64", "1.3B"
CONFIGS = {SMALL: OmniMambaConfig(MambaConfig(d_model=64, n_layer=2, d_state=16, headdim=32)), FULL: OmniMambaConfig()}


@functools.cache
def _folder(size: str) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix=f"omnimamba-{len(size)}-")


@functools.cache
def checkpoint(size: str) -> Path:
    """The folder that `omnimamba convert` makes of a file with the official names."""
    folder = Path(_folder(size).name)
    torch.manual_seed(0)
    tensors = official_tensors(size)
    torch.save(tensors, folder / "OmniMamba-1.3b.pth")
    assert main(["convert", str(folder / "OmniMamba-1.3b.pth"), str(folder / "converted")]) == 0
    (folder / "OmniMamba-1.3b.pth").unlink()
    found = OmniMamba.from_pretrained(folder / "converted").state_dict()
    for name, tensor in tensors.items():
        if name not in TIED:
            assert torch.equal(found[name.removeprefix("llm_backbone.mamba.")], tensor), name
    return folder / "converted"


def official_tensors(size: str) -> dict[str, Tensor]:
    """bf16; matrices scaled to keep activations of order one. Their noise is of one store that is gone through again
    and again, as so many numbers take long to draw: tensors begin at different places of it."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in OmniMamba(CONFIGS[size]).state_dict().items()}
    found, store, at = {}, torch.randn(STORE).bfloat16(), 0
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1)
        elif name.endswith("A_log"):
            tensor.uniform_(0, 2.7)
        elif name.endswith("dt_bias"):
            tensor.uniform_(-6, -2)
        else:
            at = stored(store, at, tensor.view(-1)) + 1
            tensor.mul_(0.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.3)
        found[name if name.startswith("projector.") else f"llm_backbone.mamba.{name}"] = tensor
    found |= {head: found[table] for head, table in TIED.items()}
    assert size != FULL or len(found) == 645, "the official file's tensors"
    return found


def stored(store: Tensor, at: int, into: Tensor) -> int:
    """Fills ``into`` with what follows in the store from ``at`` on, from its beginning after its end; where that
    ends."""
    done = 0
    while done < len(into):
        at %= len(store)
        some = min(len(store) - at, len(into) - done)
        into[done : done + some] = store[at : at + some]
        done, at = done + some, at + some
    return at


@functools.cache
def model(size: str) -> OmniMamba:
    return OmniMamba.from_pretrained(checkpoint(size))


def token_bytes(size: str, head: Tensor) -> int:
    """What a token reads: every layer's matrices, and its task's table as the head."""
    layers = model(size).backbone.layers.named_parameters()
    return head.nbytes + sum(p.nbytes for name, p in layers if p.ndim == 2 and "_lora_" not in name)


def caption(count: int = 1) -> Tensor:
    return torch.randint(1, 50000, (count, 68), generator=torch.Generator().manual_seed(0))


def sight(config: OmniMambaConfig = CONFIGS[FULL]) -> tuple[Tensor, Tensor]:
    """An image's features and a question."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.randn(1, config.image_features, config.feature_dim, generator=generator)
    return looks, torch.randint(1, 50000, (1, QUESTION), generator=generator)


@torch.inference_mode()
def first_token_error(size: str, task: str) -> float:
    """The first token's logits against plain PyTorch in fp32 on the same weights."""
    network = model(size)

    def logits() -> Tensor:
        state = network.backbone.new_state(1)
        opening = network.t2i_opening(caption()) if task == "t2i" else network.mmu_opening(sight()[0])
        hidden = network.backbone.prefill(opening, state, 1 if task == "t2i" else 0)
        return (network.image_head if task == "t2i" else network.text_head)(hidden)

    got = logits()
    with inputs.by_definition(network):
        return relative_error(got, logits())


def peak(size: str, task: str) -> Iterator[None]:
    """For bench.memory: loading the weights and using them."""
    yield
    yield
    network = OmniMamba.from_pretrained(checkpoint_of_parent(size))
    if task == "t2i":
        draw(network, caption())
    else:
        answer(network, *sight(), ANSWER, stop=[])


def checkpoint_of_parent(size: str) -> Path:
    """The newest folder of that size; a child process makes none of its own."""
    found = Path(tempfile.gettempdir()).glob(f"omnimamba-{len(size)}-*/converted")
    return max(found, key=lambda path: path.stat().st_mtime)


CASES = [(SMALL, "t2i"), pytest.param(FULL, "t2i", marks=full), pytest.param(FULL, "mmu", marks=full)]


@pytest.mark.parametrize(("size", "task"), CASES)
def test_official_names(bench, benchmark, size, task):
    network, drawing = model(size), task == "t2i"
    backbone = network.backbone
    head = backbone.img_embeddings.word_embeddings.weight if drawing else backbone.embedding.weight
    tokens = 256 if drawing else ANSWER
    run = (lambda: draw(network, caption())) if drawing else (lambda: answer(network, *sight(), ANSWER, stop=[]))
    bound = 2 * inputs.BOUND[torch.float32]
    expected = 20.0 if size == FULL else 0.0
    contender = Contender(OURS, run, lambda: first_token_error(size, task), bound, expected=expected)
    judged = size == FULL and drawing
    did = "draws an image of 256 tokens" if drawing else f"answers {QUESTION} tokens about an image in {ANSWER}"
    work = Work("read", bytes=tokens * token_bytes(size, head))
    rows = bench.compare(benchmark, GROUP, f"{size}: {did}", [contender], work, tokens=tokens, judged=judged)
    bench.peaks(benchmark, rows, "official_names", size=size, kind=task)
    weights = sum(p.nbytes for p in network.parameters())
    read = network.config.t2i_prompt if drawing else network.config.image_features + 4 + QUESTION
    for row in rows:
        row.note = f"the floor is the tokens' reads alone, without the products of the {read} positions before them"
        if row.peak_bytes:
            row.note += f"; peak {row.peak_bytes / weights:.2f} of the weights"


class Answering:
    """An answer whose question is taken in already: each call of ``more`` is PIECE tokens, a step and a choice each."""

    def __init__(self, size: str) -> None:
        self.network = model(size)
        self.state = self.network.backbone.new_state(1)
        rows = answer_rows(self.network, *sight(self.network.config), steps=10**9, stop=[])
        self.spoken = stream(self.network, rows, GREEDY, self.state)
        next(self.spoken)

    def more(self) -> None:
        for _ in range(PIECE):
            next(self.spoken)

    @torch.inference_mode()
    def error(self) -> float:
        """A further token's logits against plain PyTorch in fp32 on the same weights and state."""
        backbone = self.network.backbone

        def logits() -> Tensor:
            step = backbone.bind_step(self.state.take([0]), MMU)
            return self.network.text_head(step(backbone.embedding(torch.tensor([QUESTION]))))

        got = logits()
        with inputs.by_definition(self.network):
            return relative_error(got, logits())


@pytest.mark.parametrize("size", [SMALL, pytest.param(FULL, marks=full)])
def test_tokens_of_an_answer(bench, benchmark, size):
    """After the prefill of the image and the question, which is most of a short answer's time."""
    answering = Answering(size)
    bound, expected = 2 * inputs.BOUND[torch.float32], 4.0 if size == FULL else 0.0
    contender = Contender(OURS, answering.more, answering.error, bound, expected=expected)
    work = Work("read", bytes=PIECE * token_bytes(size, answering.network.backbone.embedding.weight))
    case = f"{size}: decodes {PIECE} tokens of an answer"
    bench.compare(benchmark, GROUP, case, [contender], work, tokens=PIECE, judged=size == FULL)


class Drawing:
    """Images that are drawn together: ``begin`` takes the captions in and gives all first tokens, each call of ``more``
    PIECE further ones, which all cost the same."""

    def __init__(self, size: str, captions: Tensor) -> None:
        self.network, self.captions = model(size), captions

    def begin(self) -> None:
        self.drawn = stream(self.network, drawing_rows(self.network, self.captions), GREEDY)
        self.tokens = [next(self.drawn)[1]]

    def more(self) -> None:
        self.tokens += [next(self.drawn)[1] for _ in range(PIECE)]


@pytest.mark.parametrize("size", [pytest.param(FULL, marks=full)])
def test_images_at_once(bench, benchmark, size):
    """The captions and a piece of the tokens are measured, and the piece is taken for all of them."""
    drawing = Drawing(size, caption(AT_ONCE))
    network, count = drawing.network, drawing.network.config.image_tokens
    steps = [(1.0, drawing.begin), ((count - 1) / PIECE, drawing.more)]
    check = lambda: first_tokens_error(size, drawing.captions)  # noqa: E731
    bound, expected = 2 * inputs.BOUND[torch.float32], 20.0 if size == FULL else 1.0
    head = network.backbone.img_embeddings.word_embeddings.weight
    states = 2 * network.backbone.new_state(AT_ONCE).nbytes
    work = Work("read", bytes=count * (token_bytes(size, head) + states))
    contender = sampled(OURS, steps, check, bound, expected=expected)
    (row,) = bench.compare(benchmark, GROUP, at_once_case(size), [contender], work, tokens=count * AT_ONCE)
    assert torch.stack(drawing.tokens).shape == (1 + PIECE, AT_ONCE)
    if row.seconds:
        theirs = ", ".join(f"{who} {rate}" for who, rate in TABLE_3.items())
        row.note = f"{AT_ONCE / row.seconds:.3g} images/s; the paper's, on one RTX 4090: {theirs}"
        row.note += f"; the captions and {1 + PIECE} of {count} tokens measured"


@torch.inference_mode()
def first_tokens_error(size: str, captions: Tensor) -> float:
    """The first token's logits of all captions at once, against plain PyTorch on the first and the last alone."""
    network = model(size)

    def logits(some: Tensor) -> Tensor:
        state = network.backbone.new_state(len(some))
        return network.image_head(network.backbone.prefill(network.t2i_opening(some), state, 1))

    together = logits(captions)[[0, -1]]
    with inputs.by_definition(network):
        return relative_error(together, torch.cat([logits(captions[:1]), logits(captions[-1:])]))
