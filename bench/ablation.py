"""The paper's ablation on real digits: ``python -m bench.ablation``.

Is a vocabulary of its own worth it, an adapter for each task, a first stage of its own? Arms differ in that alone: the
demo's sizes, data and rates, the same initial numbers, the same batches of each task in the same order for a seed, and
as many steps of the optimizer. What is there already is not run again, so that a long ablation can be had in pieces:
``--arms 1 --seeds 0 1``.

    two stages   stage 0, then each task on its own parameters for STAGE1 steps, then everything on both tasks
    one stage    stage 0, then everything; 2 STAGE1 steps, evenly spread, are one task's in turn, the others both tasks'
    one vocabulary   text and image tokens share one softmax; while drawing, only image tokens can be drawn. A table of
                 both is both tables one above the other, so nothing but the softmax differs
    no adapters  they stay the zeros they start as

Scored on the held-out scans, without guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimamba_model import OmniMamba
from omnimamba_model.demo import Settings
from omnimamba_model.demo.digits import Scans, split
from omnimamba_model.demo.experiment import prepare
from omnimamba_model.demo.judge import Judge
from omnimamba_model.demo.score import EXAM, answer_accuracy, losses, make_answers, make_drawings
from omnimamba_model.layers import linear
from omnimamba_model.pipeline import Pipeline, load_tokenizers
from omnimamba_model.training import Phase, Trainer
from omnimamba_model.training.lessons import Drawing, Lesson, Reading, Understanding
from omnimamba_model.training.phase import Batch
from omnimamba_model.training.records import open_records
from omnimamba_model.weights import load

from . import machine, results

FILE = results.FOLDER / "ablation" / "digits.json"
SEEDS = tuple(range(5))
STEPS, STAGE1 = 600, 100
"""Batches of each task after stage 0, and how many of them are stage 1."""
ONE_STAGE = "one stage"
SCORES = ("t2i_accuracy", "mmu_accuracy", "t2i_loss", "mmu_loss")


@dataclass(frozen=True)
class Arm:
    vocabularies: bool = True
    adapters: bool = True
    stages: bool = True


ARMS = {
    "OmniMamba": Arm(),
    "one vocabulary": Arm(vocabularies=False),
    "no adapters": Arm(adapters=False),
    "one vocabulary, no adapters": Arm(vocabularies=False, adapters=False),
    "one stage": Arm(stages=False),
}


class Ablated(OmniMamba):
    """An OmniMamba without what its arm leaves out."""

    arm = Arm()

    def train_only(self, stage: str) -> list[str]:
        learning = super().train_only(stage)
        if self.arm.adapters:
            return learning
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "_lora_" not in name)
        return [name for name in learning if "_lora_" not in name]

    def text_head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, super().text_head, self.backbone.img_embeddings.word_embeddings.weight)

    def image_head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, super().image_head, self.backbone.embedding.weight)

    def _head(self, hidden: Tensor, own, others: Tensor) -> Tensor:
        """The own logits; with one vocabulary the others' behind them while training: one softmax over both."""
        logits = own(hidden)
        if self.arm.vocabularies or not self.training:
            return logits
        return torch.cat([logits, linear(hidden, others)], dim=-1)


def lessons_of(work: Path, settings: Settings, config: Any, seed: int) -> dict[str, Lesson]:
    words, pixels = load_tokenizers(work / "start", config)
    data = work / "data"

    def records(name: str) -> Any:
        return open_records([data / name])[0]

    given, options = (settings.batch, config, words), dict(seed=seed)
    drawing = records("t2i.jsonl")
    return {
        "text": Reading(records("text.jsonl"), *given, length=16, **options),
        "blind": Drawing(drawing, *given, caption_dropout=1.0, **options),
        "t2i": Drawing(drawing, *given, caption_dropout=settings.caption_dropout, **options),
        "mmu": Understanding(
            records("mmu.json"), *given, pixels, images=data / "images", text_length=20, **options
        ),
    }  # fmt: skip


class InTurn:
    """A lesson's batches one after another, whatever the phase and its step."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson, self.taken = lesson, 0

    def __call__(self, place: int) -> Batch:
        self.taken += 1
        return self.lesson(self.taken - 1)


def phases(arm: Arm, settings: Settings, steps: int, stage1: int) -> list[Phase]:
    alike = dict(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    begin = Phase("stage 0", "base", ("text", "blind"), settings.stage0, **alike)
    if not arm.stages:
        return [begin, Phase(ONE_STAGE, "joint", ("t2i", "mmu"), steps + stage1, **alike)]
    return [
        begin,
        Phase("stage 1: understanding", "mmu", ("mmu",), stage1, **alike),
        Phase("stage 1: drawing", "t2i", ("t2i",), stage1, **alike),
        Phase("stage 2", "joint", ("t2i", "mmu"), steps - stage1, **alike),
    ]


def learned(phase: Phase, stage1: int) -> list[tuple[str, ...]]:
    """The lessons of each step of a phase."""
    found = [phase.lessons] * phase.steps
    if phase.name == ONE_STAGE:
        alone = [
            at for at in range(phase.steps) if (at + 1) * 2 * stage1 // phase.steps > at * 2 * stage1 // phase.steps
        ]
        for i, at in enumerate(alone):
            found[at] = (("mmu", "t2i")[i % 2],)
    return found


def teach(model: Ablated, schedule: list[Phase], stage1: int, lessons: dict[str, Lesson]) -> None:
    """All phases, one after the other: the halves of stage 1 share no parameter that the other's loss reads, so that
    this is as merged."""
    dealt = {name: InTurn(lesson) for name, lesson in lessons.items()}
    for phase in schedule:
        trainer = Trainer(model, phase, dealt)
        for names in learned(phase, stage1):
            trainer.lessons = {name: dealt[name] for name in names}
            trainer.step()
        trainer.finish()


def run(arm: Arm, seed: int, steps: int, stage1: int, settings: Settings, data: tuple[Scans, Scans]) -> dict[str, Any]:
    """One arm from one seed, and its scores."""
    started = time.perf_counter()
    training, scored = data
    with tempfile.TemporaryDirectory(prefix="omnimamba-ablation-") as folder:
        work = Path(folder)
        prepare(work, settings, training, scored, seed)
        model = load(work / "start")
        model.__class__, model.arm = Ablated, arm
        words, pixels = load_tokenizers(work / "start", model.config)
        torch.manual_seed(seed)
        teach(model, phases(arm, settings, steps, stage1), stage1, lessons_of(work, settings, model.config, seed))
        pipeline = Pipeline(model, words, pixels)
        drawn = make_drawings(pipeline, settings, seed)
        right = answer_accuracy(make_answers(pipeline, scored), scored.labels)
        nats = losses(pipeline, work / EXAM)
    return {
        "t2i_accuracy": Judge(training).accuracy(drawn.images, drawn.digits),
        "mmu_accuracy": statistics.mean(right.values()),
        "t2i_loss": nats["t2i"],
        "mmu_loss": nats["mmu"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def table() -> tuple[list[str], list[list[str]]]:
    """Header and lines of the README's table: mean and standard deviation over seeds, and the difference from the
    first arm seed by seed with its standard error."""
    header = ["arm", "seeds", "t2i accuracy", "mmu accuracy", "t2i, nats a token", "mmu, nats a token"]
    header += ["t2i accuracy, difference", "mmu accuracy, difference"]
    if not FILE.exists():
        return header, []
    runs = {(r["arm"], r["seed"]): r for r in results.read(FILE)["runs"]}
    lines = []
    for arm in ARMS:
        mine = [runs[arm, seed] for seed in SEEDS if (arm, seed) in runs]
        if len(mine) < 2:
            continue
        shown = [_spread([r[score] for r in mine], 2 if score == "t2i_loss" else 3) for score in SCORES]
        for score in SCORES[:2]:
            pairs = [(r, runs.get((next(iter(ARMS)), r["seed"]))) for r in mine]
            apart = [r[score] - other[score] for r, other in pairs if other]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
            shown.append("" if arm == next(iter(ARMS)) else f"{statistics.mean(apart):+.3f} ± {error:.3f}")
        lines.append([arm, str(len(mine)), *shown])
    return header, lines


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)), help="their places, 0 to 4")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of each task after stage 0")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if not set(options.arms) <= set(range(len(ARMS))):
        parser.error(f"--arms: got {' '.join(map(str, options.arms))}, expected some of 0 to {len(ARMS) - 1}")
    settings = Settings(guidance=1.0, drawings=500)
    about = {"steps": options.steps, "stage1": STAGE1, "settings": dataclasses.asdict(settings)}
    about["optimizer_steps"] = settings.stage0 + options.steps + STAGE1
    torch.set_num_threads(1)
    for seed in options.seeds:
        for place in options.arms:
            name = list(ARMS)[place]
            try:
                content = results.read(options.out) if options.out.exists() else {**about, "runs": []}
            except ValueError as error:
                parser.error(str(error))
            if {key: content.get(key) for key in about} != about:
                parser.error(f"{options.out} holds runs with other settings; name another --out, or remove it")
            if any((r["arm"], r["seed"]) == (name, seed) for r in content["runs"]):
                continue
            found = run(ARMS[name], seed, options.steps, STAGE1, settings, split())
            content["machine"] = machine.describe()
            content["runs"].append({"arm": name, "seed": seed, **found})
            results.save(options.out, content)
            print(f"{name}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
