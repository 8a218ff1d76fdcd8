"""The one loop that generates: rows of any task and length side by side, each on a state of constant size.

A prompt enters by one scan. Rows of unlike lengths are packed one after another, so that no padding enters a state;
then each token is one step of all rows that are not yet done. Tokens are kept, logits are not: memory does not grow by
a vocabulary a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import MambaBackbone, MambaLM
from .config import BASE, MMU, T2I
from .layers import Task, wide
from .omnimamba import OmniMamba
from .sampling import LARGEST, Sampling, penalised, sample
from .state import MambaState


@dataclass(frozen=True)
class Row:
    """One sequence to go on with: ``prompt`` (l, d_model) embedded, l at least 1.

    ``null`` (l, d_model) and ``guidance`` g: tokens are drawn from ``null's + g (prompt's - null's)`` logits.
    ``copies`` continuations are drawn from one prefill.
    """

    task: int
    prompt: Tensor
    steps: int
    stop: tuple[int, ...] = ()
    null: Tensor | None = None
    guidance: float = 1.0
    copies: int = 1
    place: int | None = None
    """The next token's position; None is the prompt's length."""


@torch.inference_mode()
def generate(model: OmniMamba | MambaLM, rows: Sequence[Row], sampling: Sampling) -> list[Tensor]:
    """Each row's continuation, its copies one after another: ids (at most ``steps``,), the stop token the last."""
    count, ends = sum(row.copies for row in rows), [0] * sum(row.copies for row in rows)
    if not count:
        return []
    found = torch.empty(count, max(row.steps for row in rows), dtype=torch.long, device=rows[0].prompt.device)
    living: list[int] = []
    for step, (alive, tokens) in enumerate(stream(model, rows, sampling)):
        if alive != living:
            living, places = alive, torch.tensor(alive, device=found.device)
        found[places, step] = tokens
        for i in alive:
            ends[i] = step + 1
    return [row[:end] for row, end in zip(found, ends, strict=True)]


@torch.inference_mode()  # of each step alone: the caller keeps its own mode between two
def stream(
    model: OmniMamba | MambaLM, rows: Sequence[Row], sampling: Sampling, state: MambaState | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Step by step the rows that are not done and their new tokens. ``state``: what the rows' prompts come after,
    brought up to date in place; then there is one row, without guidance or copies.
    """
    if not rows:
        return
    batch = _Batch(model, rows, sampling, state)
    try:
        while batch.alive:
            tokens = batch.draw()
            yield list(batch.alive), tokens
            batch.advance(tokens)
    finally:
        batch.step.release(keep=state is not None)


class _Batch:
    """The rows that are not done: their states, the logits of their next tokens, and what each has drawn.

    A guided row has a twin, the null prompt's, behind all the rows: states, places and tasks are theirs too. Logits are
    kept by task, since vocabularies differ.
    """

    def __init__(
        self, model: OmniMamba | MambaLM, rows: Sequence[Row], sampling: Sampling, state: MambaState | None
    ) -> None:
        self.model, self.sampling = model, sampling
        self.generator = sampling.generator(rows[0].prompt.device)
        guided = [i for i, row in enumerate(rows) if row.null is not None]
        owners = [*rows, *(rows[i] for i in guided)]
        prompts = [row.prompt for row in rows] + [rows[i].null for i in guided]
        tasks = [row.task for row in owners]
        self.state, hidden = _prefill(model.backbone, prompts, tasks, state)
        pairs = zip(prompts, owners, strict=True)
        ends = [len(prompt) if row.place is None else row.place for prompt, row in pairs]
        if state is not None:
            ends = [self.state.position]
        pick = [i for i, row in enumerate(rows) for _ in range(row.copies)]
        pick += [len(rows) + k for k, i in enumerate(guided) for _ in range(rows[i].copies)]
        if pick != list(range(len(prompts))):
            self.state, hidden = self.state.take(pick), hidden[pick]
        self.rows = [row for row in rows for _ in range(row.copies)]
        self.alive = list(range(len(self.rows)))
        self.taken = 0
        self.tasks, self.room = [tasks[i] for i in pick], len(pick)
        self.at = torch.tensor([ends[i] for i in pick], device=hidden.device)
        self._bind()
        self.logits = self._logits(hidden)
        marked = self.logits if sampling.repetition_penalty != 1.0 else {}
        self.drawn = {task: torch.zeros_like(logits, dtype=torch.bool) for task, logits in marked.items()}

    def _bind(self) -> None:
        given = self.tasks, self.rows, self.at.device, wide(self.model.backbone.dtype)
        self.groups = {task: _Group.of(task, *given) for task in sorted(set(self.tasks))}
        mixed = len(self.groups) > 1
        self.task: Task = torch.tensor(self.tasks, device=self.at.device) if mixed else self.tasks[0]
        self.twins = [k for k, row in enumerate(self.rows) if row.null is not None]
        self.guided = torch.tensor(self.twins, dtype=torch.long, device=self.at.device)
        self.step = self.model.backbone.bind_step(self.state, self.task, self.room)

    def draw(self) -> Tensor:
        """A token for each living row."""
        penalty, found = self.sampling.repetition_penalty, {}
        for task, logits in self.logits.items():
            if penalty != 1.0:
                logits = penalised(logits, self.drawn[task], penalty)
            found[task] = sample(logits, self.sampling, self.generator)
            if penalty != 1.0:
                self.drawn[task].scatter_(1, found[task][:, None], True)
        if len(found) == 1:
            return found.popitem()[1]
        tokens = self.at.new_empty(len(self.rows))
        for task, group in self.groups.items():
            tokens[group.own] = found[task]
        return tokens

    def advance(self, tokens: Tensor) -> None:
        """Take the tokens in; rows that are done leave. Without stop tokens no value is read back from the device."""
        self.taken += 1
        keep = [k for k, row in enumerate(self.rows) if self.taken < row.steps]
        if keep and any(self.rows[k].stop for k in keep):
            known = tokens.tolist()
            keep = [k for k in keep if known[k] not in self.rows[k].stop]
        if not keep:
            self.alive = []
            return
        if len(keep) < len(self.rows):
            tokens = tokens[keep]
            self._leave(keep)
        if self.twins:
            tokens = torch.cat([tokens, tokens[self.guided]])
        self.logits = self._logits(self.step(self._embed(tokens)))
        self.at = self.at + 1

    def _leave(self, keep: list[int]) -> None:
        """Only rows ``keep``, and their twins, go on, in room for the next power of two: few graphs serve all."""
        twin = {k: len(self.rows) + i for i, k in enumerate(self.twins)}
        pick = keep + [twin[k] for k in keep if k in twin]
        self.state, self.at = self.state.take(pick), self.at[pick]
        self.room = min(self.room, 1 << (len(pick) - 1).bit_length())
        self.step.release(keep=False)
        if self.drawn:
            living = torch.zeros(len(self.rows), dtype=torch.bool, device=self.at.device)
            living[keep] = True
            kept = {task: drawn[living[self.groups[task].own]] for task, drawn in self.drawn.items()}
            self.drawn = {task: drawn for task, drawn in kept.items() if len(drawn)}
        self.tasks = [self.tasks[i] for i in pick]
        self.rows, self.alive = ([v[k] for k in keep] for v in (self.rows, self.alive))
        self._bind()

    def _logits(self, hidden: Tensor) -> dict[int, Tensor]:
        """By task (its rows, its vocabulary), guidance applied."""
        logits = {}
        for task, group in self.groups.items():
            found = _head(self.model, task)(hidden if len(self.groups) == 1 else hidden[group.places])
            if len(group.guided):
                found, free = found.to(wide(found.dtype)).split([len(group.own), len(group.guided)])
                asked = found[group.guided]
                found[group.guided] = free.lerp(asked, group.scales).clamp(-LARGEST, LARGEST)
            logits[task] = found
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        """(rows and twins, d_model), each token at its row's place."""
        backbone = self.model.backbone
        if len(self.groups) == 1:
            return _embedding(backbone, self.tasks[0], tokens, self.at)
        parts = [_embedding(backbone, t, tokens[g.places], self.at[g.places]) for t, g in self.groups.items()]
        joined, order = torch.cat(parts), torch.cat([group.places for group in self.groups.values()])
        return torch.empty_like(joined).index_copy(0, order, joined)


@dataclass(frozen=True)
class _Group:
    """One task's part of a batch, in index tensors."""

    places: Tensor
    """Of its rows, then of its twins, among all."""
    own: Tensor
    """Of its rows."""
    guided: Tensor
    """Those of its rows that have a twin, counted among its rows."""
    scales: Tensor
    """Their guidance (guided, 1), in fp32 at least."""

    @classmethod
    def of(cls, task: int, tasks: list[int], rows: list[Row], device: torch.device, dtype: torch.dtype) -> _Group:
        places = [i for i, other in enumerate(tasks) if other == task]
        own = [i for i in places if i < len(rows)]
        guided = [n for n, i in enumerate(own) if rows[i].null is not None]
        scales = torch.tensor([[rows[own[n]].guidance] for n in guided], dtype=dtype, device=device)
        return cls(*(torch.tensor(v, dtype=torch.long, device=device) for v in (places, own, guided)), scales)


def _head(model: OmniMamba | MambaLM, task: int):
    if isinstance(model, MambaLM):
        return model.head
    return model.image_head if task == T2I else model.text_head


def _embedding(backbone: MambaBackbone, task: int, tokens: Tensor, at: Tensor) -> Tensor:
    if task == T2I:
        return backbone.img_embeddings(tokens) + backbone.pos_embed[0, at]
    vectors = backbone.embedding(tokens)
    if task == MMU:
        return vectors + backbone.mmu_pos_embed[0, at.clamp(max=backbone.mmu_pos_embed.shape[1] - 1)]
    assert task == BASE
    return vectors


def _prefill(
    backbone: MambaBackbone, prompts: list[Tensor], tasks: list[int], state: MambaState | None
) -> tuple[MambaState, Tensor]:
    """States and last hidden states (rows, d_model) after the prompts."""
    alike = len({len(prompt) for prompt in prompts}) == 1
    task: Task = tasks[0] if len(set(tasks)) == 1 else torch.tensor(tasks, device=prompts[0].device)
    if alike:
        state = backbone.new_state(len(prompts)) if state is None else state
        return state, backbone.prefill(torch.stack(prompts), state, task)
    if state is not None:
        raise ValueError(f"prompts after a state must have one length, got {[len(prompt) for prompt in prompts]}")
    return backbone.prefill_packed(prompts, task)
