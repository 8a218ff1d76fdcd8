"""The optimizer and the step.

A lesson's loss is the mean over all its targets of a step, over accumulated batches and over processes alike:

    loss = (sum over batches of loss_i n_i) / (sum of n_i),  n_i the targets of batch i,

so that neither cutting a batch into pieces nor dealing it to more processes changes what is learned. Dropout draws from
a seed of its own for each step and lesson, so that neither does going on after a stop, nor where a lesson is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from random import Random

import torch
from torch import Tensor, nn

from ..config import OmniMambaConfig
from ..omnimamba import IGNORE, OmniMamba
from .beside import Beside
from .parallel import ALONE, Ranks
from .phase import Batch, Phase

Lesson = Callable[[int], Batch]
"""The batch of a place: batch i of every step s has place s * accumulate + i."""


class Trainer:
    """One phase of a model's training, step by step."""

    def __init__(
        self,
        model: OmniMamba,
        phase: Phase,
        lessons: Mapping[str, Lesson],
        *,
        ranks: Ranks = ALONE,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        seed: int | None = None,
        prefetch: int = 0,
    ) -> None:
        """``seed`` of the dropout, another on every rank; None draws one from torch's global generator. ``prefetch``:
        batches of each lesson made beforehand, within ``ahead.ahead``."""
        missing = [name for name in phase.lessons if name not in lessons]
        if missing:
            raise ValueError(
                f"phase {phase.name!r} learns from {', '.join(missing)}, but there are {', '.join(lessons)}"
            )
        self.model, self.phase, self.ranks, self.autocast = model, phase, ranks, autocast
        self.lessons = {name: lessons[name] for name in phase.lessons}
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.prefetch = prefetch
        self.ahead: Mapping[str, Lesson] = {}
        """What gives the batches in a lesson's place."""
        self.beside: Mapping[str, Beside] = {}
        """Lessons that other processes learn, on the same parameters."""
        model.train_only(phase.stage)
        model.train()
        self.optimizer = _optimizer(model, phase)
        self.done = 0
        """Steps taken."""
        self.norm = 0.0
        """Of the last step's gradients together, before they were clipped."""
        self.tokens = 0
        """That this process learned from in the last step, without padding, those learned beside it included."""

    def step(self) -> dict[str, float]:
        """Learn from the next batches; each lesson's loss over all processes.

        RuntimeError where a loss or the gradients' norm is not finite: no parameter or moment has changed then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate(self.done)
        losses = self.learn()
        self.norm = self._clip()
        if not all(map(math.isfinite, (self.norm, *losses.values()))):
            self.optimizer.zero_grad()
            raise RuntimeError(
                f"step {self.done + 1} is not finite: gradient norm {self.norm}, losses {losses}; start another run "
                "from the last checkpoint, with a lower learning_rate or clip, or in fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return losses

    def _clip(self) -> float:
        """Scale the gradients down to ``clip`` where their norm is larger; the norm."""
        reached = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(reached, self.phase.clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # sharded: over all processes

    def learn(self) -> dict[str, float]:
        """Add the gradients of this step's batches; each lesson's loss over all processes."""
        for other in self.beside.values():
            other.begin(self.done)
        self.tokens = 0
        losses = {name: self._learn(name, lesson) for name, lesson in self.lessons.items() if name not in self.beside}
        for name, other in self.beside.items():
            losses[name] = other.add_gradients()
            self.tokens += other.tokens
        return losses

    def _learn(self, name: str, lesson: Lesson) -> float:
        """Add the gradients of a lesson's batches; its mean loss."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Random(f"{self.seed} {self.done} {name}").getrandbits(63))
            return self._mean_loss(self.ahead.get(name, lesson))

    def _mean_loss(self, lesson: Lesson) -> float:
        first = self.done * self.phase.accumulate
        batches = [lesson(first + i) for i in range(self.phase.accumulate)]
        counts = [targets(batch) for batch in batches]
        self.tokens += sum(present(batch, self.model.config) for batch in batches)
        whole = self.ranks.sum(float(sum(counts)))
        total = 0.0
        for (task, arguments), count in zip(batches, counts, strict=True):
            with self.autocast():
                loss = self.model(task, **{name: _moved(value, self.ranks) for name, value in arguments.items()}).loss
            share = count / max(whole, 1.0)
            # Gradients are averaged over the processes; a batch without any target has no loss to weigh.
            (torch.nan_to_num(loss) if count == 0 else loss).mul(share * self.ranks.world).backward()
            total += loss.item() * share if count else 0.0
        return self.ranks.sum(total)

    def finish(self) -> None:
        """Leave the model for use: every parameter free again, no dropout."""
        self.model.train_only("joint")
        self.model.eval()


def train(
    model: OmniMamba, phase: Phase, lessons: Mapping[str, Lesson], report: Callable[[dict[str, float]], None]
) -> None:
    """Run one phase in place; ``report`` gets each step's loss by lesson."""
    trainer = Trainer(model, phase, lessons)
    while trainer.done < phase.steps:
        report(trainer.step())
    trainer.finish()


def targets(batch: Batch) -> int:
    """How many tokens a batch asks to predict."""
    task, arguments = batch
    if task == "t2i":
        return arguments["image"].numel()
    return int((arguments["labels"] != IGNORE).sum())


def present(batch: Batch, config: OmniMambaConfig) -> int:
    """How many tokens a batch has without padding: the opening's frame tokens, image features, words, image tokens."""
    task, arguments = batch
    if task == "text":
        return targets(batch)
    words = arguments["caption" if task == "t2i" else "text"]
    each = 4 + (config.image_tokens if task == "t2i" else config.image_features)
    return int((words != config.tokens.pad).sum()) + len(words) * each


def _moved(value: Tensor | bool, ranks: Ranks) -> Tensor | bool:
    return value.to(ranks.device) if isinstance(value, Tensor) else value


def _optimizer(model: OmniMamba, phase: Phase) -> torch.optim.Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim == 2], "weight_decay": phase.weight_decay},
        {"params": [p for p in learning if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=phase.betas, fused=True)
