"""How tokens and features become vectors: decoupled vocabularies, caption path, projector, positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import MambaBackbone, activation_dtype
from .config import BASE, TASKS, OmniMambaConfig
from .layers import Linear, Table, Task


class Projector(nn.Module):
    """Three linear maps with biases, GELU between: ``width_in`` to ``hidden`` to ``width_out`` to ``width_out``."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            Linear(width_in, hidden), nn.GELU(), Linear(hidden, width_out), nn.GELU(), Linear(width_out, width_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)


QUICK_TO_FOLD = 1e11
"""FLOPs of folding that a CPU does unasked: about a second on two cores, which multiply fp32 matrices at some 100
GFLOP/s. At 1.3B they are 2e12, more than one drawing saves: it looks up 72 of the caption table's rows."""


def folding_flops(table: Table, then: nn.Module) -> int:
    """Of ``folded``: two for each row of the table and each number in the matrices that it passes."""
    return 2 * table.num_embeddings * sum(p.numel() for p in then.parameters() if p.ndim == 2)


@torch.no_grad()
def folded(table: Table, then: nn.Module, rows: int = 1024) -> Tensor:
    """``then`` of each row of a table (rows, width), as wide and in its dtype, computed ``rows`` at a time.

    Of int8 rows in bf16, twice the table's bytes: its rounding, 1 part in 512, is less than theirs.
    """
    weight = table.weight
    found = torch.empty_like(weight, dtype=weight.dtype if table.weight_scale is None else torch.bfloat16)
    for ids, place in zip(torch.arange(len(weight), device=weight.device).split(rows), found.split(rows), strict=True):
        part = table(ids)
        place.copy_(then(part.to(activation_dtype(part))))
    return found


class Lookup:
    """What ``folded`` made, for as long as the weights that it was made from are as they were then.

    Another tensor in a weight's place shows, and so does writing into one, but for through its ``.data`` or into what
    inference mode made, which torch does not count.
    """

    def __init__(self, table: Table, then: nn.Module) -> None:
        self.rows = folded(table, then)
        self._places = [
            (module._parameters, name)
            for part in (table, then)
            for module in part.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self._note()

    def _note(self) -> None:
        # While these views live, no other tensor can come to lie where a weight did.
        views = [held[name].detach() for held, name in self._places]
        self._made_from = [(view, _written(view)) for view in views]

    def holds(self) -> bool:
        return all(
            held[name].data_ptr() == view.data_ptr() and _written(held[name]) == count
            for (held, name), (view, count) in zip(self._places, self._made_from, strict=True)
        )

    def __getstate__(self) -> tuple:
        return self.rows, self._places, self.holds()

    def __setstate__(self, state: tuple) -> None:
        """A copy is of copied weights, which have places and counts of their own."""
        self.rows, self._places, held = state
        self._note()
        if not held:
            self._made_from = [(view, -1) for view, _ in self._made_from]


def _written(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class Foldable(nn.Module):
    """A module with a ``lookup`` of what it makes of every token, or None."""

    lookup: Lookup | None = None

    @property
    def folded(self) -> Tensor | None:
        """The lookup's rows; None, from then on, where there is none or a weight has changed since."""
        if self.lookup is not None and not self.lookup.holds():
            self.lookup = None
        return None if self.lookup is None else self.lookup.rows


class ImageEmbeddings(Foldable):
    """The image vocabulary: a table of its own, each looked-up row refined by an MLP.

    The head that predicts image tokens is tied to the raw table, not to the MLP's output.
    """

    def __init__(self, vocab_size: int, d_model: int, mlp_ratio: int) -> None:
        super().__init__()
        self.word_embeddings = Table(vocab_size, d_model)
        self.project_in = Projector(d_model, mlp_ratio * d_model, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = None if torch.is_grad_enabled() else self.folded
        if rows is not None:
            return F.embedding(tokens, rows)
        return self.project_in(self.word_embeddings(tokens))

    def fold(self) -> None:
        self.lookup = Lookup(self.word_embeddings, self.project_in)


class FeedForward(nn.Module):
    """Two square linear maps without bias, tanh-approximated GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, width, bias=False)
        self.fc2 = Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbed(Foldable):
    """What text passes on top of the token table when it asks for a drawing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cap_proj = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.cap_proj(x)


class OmniBackbone(MambaBackbone):
    """The Mamba-2 stack with adapters for both tasks, the image vocabulary and the learned positions."""

    def __init__(self, config: OmniMambaConfig) -> None:
        size = config.backbone
        super().__init__(
            size, TASKS, lora_rank=config.lora_rank, lora_scale=config.lora_scale, lora_dropout=config.lora_dropout
        )
        self.img_embeddings = ImageEmbeddings(config.image_vocab_size, size.d_model, config.mlp_ratio)
        self.caption_embed = CaptionEmbed(size.d_model)
        self.pos_embed = nn.Parameter(torch.empty(1, config.t2i_positions, size.d_model))
        self.mmu_pos_embed = nn.Parameter(torch.empty(1, config.mmu_positions, size.d_model))
        for table in (self.pos_embed, self.mmu_pos_embed):
            nn.init.normal_(table, std=0.02)
        self.register_load_state_dict_pre_hook(_unfold)

    def forward(self, embeddings: Tensor, task: Task = BASE) -> Tensor:
        """As MambaBackbone's; one with gradients is of a model that learns, whose tables are not looked up from now on:
        the weights that they were folded from change, be it by another task."""
        if torch.is_grad_enabled():
            self.unfold()
        return super().forward(embeddings, task)

    def train(self, mode: bool = True) -> OmniBackbone:
        """As ``nn.Module.train``; what learns is no longer looked up."""
        if mode:
            self.unfold()
        return super().train(mode)

    def embed_caption(self, ids: Tensor) -> Tensor:
        """Text ids (b, l) that open a drawing, at positions 0 to l - 1: (b, l, d_model)."""
        folded = None if torch.is_grad_enabled() else self.caption_embed.folded
        words = self.caption_embed(self.embedding(ids)) if folded is None else F.embedding(ids, folded)
        return words + self.pos_embed[:, : ids.shape[1]]

    def embed_image(self, tokens: Tensor, start: int) -> Tensor:
        """Image tokens (b, l) of a drawing, the first of them at position ``start``: (b, l, d_model)."""
        return self.img_embeddings(tokens) + self.pos_embed[:, start : start + tokens.shape[1]]

    def fold(self) -> None:
        """Pass both tables through what follows them, once: drawing then looks up and no longer multiplies, until a
        pass with gradients, ``train``, ``load_state_dict``, or any weight that they passed changes (``Lookup``).

        The tables as trained stay, for the heads and for ``save``. RuntimeError where they are sharded.
        """
        if hasattr(self.embedding.weight, "full_tensor"):
            raise RuntimeError("the model is sharded over processes; load what it saved, and fold that")
        self.img_embeddings.fold()
        self.caption_embed.lookup = Lookup(self.embedding, self.caption_embed.cap_proj)

    def quick_to_fold(self) -> bool:
        """Whether ``fold`` takes about a second or less: off the CPU always, on it up to QUICK_TO_FOLD."""
        image = folding_flops(self.img_embeddings.word_embeddings, self.img_embeddings.project_in)
        caption = folding_flops(self.embedding, self.caption_embed.cap_proj)
        return self.embedding.weight.device.type != "cpu" or image + caption <= QUICK_TO_FOLD

    def unfold(self) -> None:
        """Compute again, each time."""
        self.img_embeddings.lookup = self.caption_embed.lookup = None

    def embed_understanding(self, vectors: Tensor, start: int) -> Tensor:
        """Add the understanding positions from ``start``; past the table's end its last row serves."""
        last = self.mmu_pos_embed.shape[1] - 1
        places = torch.arange(start, start + vectors.shape[1], device=vectors.device).clamp(max=last)
        return vectors + self.mmu_pos_embed[:, places]


def _unfold(backbone: OmniBackbone, *_: object) -> None:
    """Before other weights are loaded, into the backbone or into what holds it."""
    backbone.unfold()
