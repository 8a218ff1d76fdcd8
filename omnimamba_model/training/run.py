"""``omnimamba train``: a settings file to a trained model.

    OUT/settings.json   what may not change on the way        OUT/checkpoints/   the last steps, to go on from
    OUT/metrics.jsonl   one line a step                       OUT/model/         the trained model

A run that was stopped, however, is started again by the same command and goes on with the same losses.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import OmniMambaConfig
from ..convert import grown
from ..files import clear_temporaries, write_whole
from ..foreign import read_any
from ..hub import locate
from ..layers import wide
from ..omnimamba import OmniMamba
from ..pipeline import PIXELS, ImageTokenizer, load_tokenizers
from ..places import Place
from ..text_tokenizer import TextTokenizer, lacks_additions
from ..weights import CONFIG, TOKENIZER, load, read_tokenizer
from . import checkpoints
from .ahead import ahead
from .beside import side_by_side
from .features import FeatureCache
from .lessons import Drawing, Lesson, Reading, Understanding, together
from .logs import FILE, Logs
from .loop import Trainer
from .parallel import Ranks, joined, recompute, spread
from .phase import Phase
from .records import open_records
from .settings import FREE, Run

Say = Callable[[str], None]
_TOLD = 20
"""Reasons that the summary lists."""


def run(settings: Run, say: Say, progress: bool = True) -> Path | None:
    """Train to the end; the folder of the trained model, on the first process. ``say`` takes lines for people."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    out = Path(settings.out)
    with joined(settings.device) as ranks, _held(out, ranks):
        if ranks.first:
            _claim(out, settings)
        ranks.wait()
        torch.manual_seed(settings.seed)  # the same on every process, so that fresh weights are
        model, words, pixels = _parts(settings)
        lessons, bad = _lessons(settings, model.config, words, pixels, ranks, say if ranks.first else lambda line: None)
        if settings.recompute:
            recompute(model)
        options = dict(autocast=_autocast(settings, ranks), seed=settings.seed * 1_000_003 + ranks.rank)
        options |= dict(ranks=ranks, prefetch=settings.prefetch)
        trainer = Trainer(spread(model, ranks), _phase(settings, lessons), lessons, **options)
        changed = checkpoints.resume(trainer, out)
        if changed is not None and ranks.first:
            say(f"going on after step {trainer.done}")
            for name, (had, now) in changed.items():
                say(f"{name} had {had:,} records and has {now:,} now: they come in another order from here on")
        for name, reason in bad if ranks.first else ():
            lessons[name].passed_over[reason] = 1  # once a file, however often the run was taken up
        beside = side_by_side(trainer, settings.threads) if settings.side_by_side else nullcontext()
        with beside, ahead(trainer):
            _go(trainer, settings, out, words, say, progress)
        return _finish(trainer, out, words, pixels)


def _go(trainer: Trainer, settings: Run, out: Path, words: TextTokenizer, say: Say, progress: bool) -> None:
    steps, first = trainer.phase.steps, trainer.ranks.first
    logs = Logs(out, trainer.done, settings.tensorboard, settings.wandb) if first else None
    if logs is not None and logs.lacks:
        say(logs.lacks)
    bar = tqdm(total=steps, initial=trainer.done, unit="step", disable=not (first and progress), desc=out.name)
    begun, tokens, whole, interrupted = time.perf_counter(), 0, False, False
    try:
        while trainer.done < steps:
            rate = trainer.phase.rate(trainer.done)
            losses = trainer.step()
            learned = int(trainer.ranks.sum(trainer.tokens))
            tokens += learned
            speed = tokens / (time.perf_counter() - begun)
            bar.update()
            passed_over = int(trainer.ranks.sum(sum(together(trainer.lessons).values())))
            if logs is not None:
                values = {**{f"loss {k}": v for k, v in losses.items()}, "rate": rate, "gradient norm": trainer.norm}
                values |= {"tokens": learned, "tokens/s": round(speed, 1), "passed over": passed_over}
                logs.add(trainer.done, {**values, "GiB": round(_memory(trainer.ranks), 3)})
                if trainer.done % settings.log_every == 0:
                    shown = {k: f"{v:.3f}" for k, v in losses.items()}
                    bar.set_postfix({**shown, "tok/s": f"{speed:.0f}", "GiB": f"{_memory(trainer.ranks):.1f}"})
            if trainer.done % settings.save_every == 0 or trainer.done == steps:
                checkpoints.keep(trainer, out, settings.keep, words.to_json())
        whole = True
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:  # after Ctrl-C or an error too; then the other processes are not waited for
        bar.close()
        own = together(trainer.lessons)
        reasons = trainer.ranks.add(own) if whole else own
        if logs is not None:
            logs.close(reasons)
            alone = trainer.ranks.world == 1
            for line in ([logs.lacks] if logs.lacks else []) + _summary(reasons, whole or alone):
                say(line)
            if not whole:
                kept = [0, *(step for step, _ in checkpoints.kept(out))][-1]
                on = f"the same command goes on after {kept}" if interrupted else f"the last one kept is {kept}"
                say(f"stopped after step {trainer.done}; {on}")


def _summary(passed_over: Counter[str], by_all: bool = True) -> list[str]:
    """For the end of a run, when what was told on the way is out of sight. ``by_all``: not by this process alone."""
    if not passed_over:
        return []
    rest = len(passed_over) - _TOLD
    here = "" if by_all else "counted on this process, "
    lines = [f"passed over {sum(passed_over.values()):,} times, {here}a record or a whole file each:"]
    lines += [f"{count:>9,} x {reason}" for reason, count in passed_over.most_common(_TOLD)]
    return lines + ([f"and for {rest:,} reasons more: see {FILE}"] if rest > 0 else [])


def _finish(trainer: Trainer, out: Path, words: TextTokenizer, pixels: ImageTokenizer) -> Path | None:
    """The last checkpoint's model with its tokenizers, in evaluation order."""
    if not trainer.ranks.first:
        return None
    _, folder = checkpoints.kept(out)[-1]
    model = load(folder)
    model.save_pretrained(out / "model", tokenizer=words.to_json())
    pixels.save(out / "model")
    return out / "model"


@contextmanager
def _held(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder, and hold it: RuntimeError where somebody else does, whose files would be mixed with these.

    The system lets it go when the process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
    if not ranks.first or fcntl is None:
        yield
        return
    opened = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise RuntimeError(f"a process trains into {out} just now; wait for its end, or name another out") from None
    except OSError:  # a file system without locks: there nothing can be told
        pass
    try:
        yield
    finally:
        os.close(opened)


def _claim(out: Path, settings: Run) -> None:
    """See that the folder is this run's; ValueError names the settings that differ."""
    checkpoints.clear_unfinished(out)
    for folder in (out, out / "model"):
        clear_temporaries(folder)
    if settings.mmu is not None and settings.mmu.cache is not None:
        FeatureCache.clear(settings.mmu.cache)
    path = out / "settings.json"
    mine = json.loads(json.dumps(settings.fixed()))
    if path.exists() and checkpoints.kept(out):
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
            for name in sorted((mine.keys() | theirs.keys()) - set(FREE))
            if mine.get(name) != theirs.get(name)
        ]
        if changed:
            raise ValueError(f"{out} holds another run ({'; '.join(changed)}); name another out, or remove it")
    text = json.dumps(mine, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _parts(settings: Run) -> tuple[OmniMamba, TextTokenizer, ImageTokenizer]:
    """The model to start from, in fp32 at least: 16 bits would lose small updates and moments; and both tokenizers."""
    beside = None if settings.tokenizers is None else _tokenizers(settings.tokenizers)
    if settings.fresh is not None:
        model, additions = OmniMamba(OmniMambaConfig.from_dict(settings.fresh)), False
    else:
        place = Place.at(locate(settings.model))
        model, beside = read_any(place.model), beside or place
        additions = place.additions or not isinstance(model, OmniMamba)  # as in `convert --as-omnimamba`
        model = model if isinstance(model, OmniMamba) else grown(model, settings.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wide(parameter.dtype))
    if beside is None:
        raise ValueError(
            f"tokenizers must name a folder with {TOKENIZER} and an image tokenizer, where the model is fresh"
        )
    words, pixels = load_tokenizers(beside.tokenizers, model.config, additions or beside.additions)
    return model, words, pixels


def _tokenizers(name: str) -> Place:
    """Where both lie. Of a hub's repository only encoders in folders of it come down with them, so that not its weights
    but its size tells whether a text tokenizer is GPT-NeoX's own."""
    place = Place.at(locate(name, wanted=(CONFIG, TOKENIZER, *PIXELS, "*/*.json", "*/*.safetensors")))
    text = read_tokenizer(place.tokenizers)
    return place._replace(additions=place.additions or (text is not None and lacks_additions(text)))


def _lessons(
    settings: Run, config: OmniMambaConfig, words: TextTokenizer, pixels: ImageTokenizer, ranks: Ranks, say: Say
) -> tuple[dict[str, Lesson], list[tuple[str, str]]]:
    """The lessons by name; and which lesson's files are passed over as a whole, with the reason."""
    found: dict[str, Lesson] = {}
    unreadable: list[tuple[str, str]] = []
    for name in ("text", "t2i", "mmu"):
        data = getattr(settings, name)
        if data is None:
            continue
        records, bad = open_records(data.files)
        for path, reason in bad.items():
            unreadable.append((name, f"{path}: {reason}"))
            say(f"{path} is passed over: {reason}")
        say(f"{name}: {len(records):,} records")
        given = (records, data.batch, config, words)
        shared = dict(seed=settings.seed, ranks=ranks)
        if name == "text":
            found[name] = Reading(*given, length=data.length, **shared)
        elif name == "t2i":
            found[name] = Drawing(*given, caption_dropout=data.caption_dropout, **shared)
        else:
            cache = None if data.cache is None else FeatureCache(data.cache, pixels.describe())
            options = dict(form=data.form, images=data.images, text_length=data.text_length, cache=cache)
            found[name] = Understanding(*given, pixels.to(ranks.device), **options, **shared)
    return found, unreadable


def _phase(settings: Run, lessons: dict[str, Lesson]) -> Phase:
    taken = ("stage", "steps", "learning_rate", "warmup", "weight_decay", "clip", "accumulate")
    return Phase(settings.stage, lessons=tuple(lessons), **{name: getattr(settings, name) for name in taken})


def _autocast(settings: Run, ranks: Ranks) -> Callable[[], AbstractContextManager]:
    if settings.precision == "fp32":
        return nullcontext
    return partial(torch.autocast, ranks.device.type, torch.bfloat16)


def _memory(ranks: Ranks) -> float:
    """GiB in use at most so far: the GPU's, or this process's."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
