"""A training run's settings: one YAML file, ``key=value`` on the command line on top, every mistake named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..omnimamba import STAGES

MOST_THREADS = 1024
"""OpenMP ends the process where it cannot have as many as it is told to take."""
PRECISIONS = ("fp32", "bf16")
SHIPPED = ("stage1-mmu", "stage1-t2i", "stage2")
FREE = (
    "save_every", "keep", "log_every", "tensorboard", "wandb", "device", "threads", "out", "recompute", "side_by_side",
    "prefetch",
)  # fmt: skip
"""Settings that may change between a run's start and its continuation."""


@dataclass(frozen=True)
class TextData:
    """Files of plain text, which a backbone learns before it meets a task, and the batch over all processes."""

    files: tuple[str, ...] = ()
    batch: int = 1
    length: int = 1024
    """Tokens of a row at most."""


@dataclass(frozen=True)
class DrawingData:
    """T2I files, and the batch over all processes."""

    files: tuple[str, ...] = ()
    batch: int = 1
    caption_dropout: float = 0.0


@dataclass(frozen=True)
class UnderstandingData:
    """MMU files, the folder that their images lie in, and the batch over all processes."""

    files: tuple[str, ...] = ()
    batch: int = 1
    images: str = "."
    form: str = "instruct"
    text_length: int = 449
    cache: str | None = None
    """A folder for what the frozen encoders saw; null looks every time."""


@dataclass(frozen=True)
class Run:
    """``model``: a folder, a hub repository or the official file to start from, a plain Mamba-2 included. ``fresh``: a
    config instead."""

    out: str
    stage: str
    steps: int
    learning_rate: float
    model: str | None = None
    fresh: dict[str, Any] | None = None
    tokenizers: str | None = None
    """A place of such kinds with both tokenizers; null takes ``model``'s."""
    text: TextData | None = None
    t2i: DrawingData | None = None
    mmu: UnderstandingData | None = None
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    recompute: bool = False
    side_by_side: bool = False
    """On a CPU: every task but the first learned in a process of its own, the same losses sooner."""
    prefetch: int = 2
    """Batches of each task made ready while the step before them is taken; 0 makes each within its step. They wait in
    memory: stage1-mmu's with 1.6 GB of features each, or 0.8 GB from a cache, in 16 bits; a process has its share."""
    seed: int = 0
    device: str | None = None
    threads: int | None = None
    """Of the CPU, a process; null takes those that torch has, dealt out to what runs side by side."""
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    """A project of Weights & Biases to report to."""

    def __post_init__(self) -> None:
        _expect("stage", self.stage in STAGES, f"one of {', '.join(STAGES)}", self.stage)
        _expect("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}", self.precision)
        _expect("model and fresh", (self.model is None) != (self.fresh is None), "one of the two", "both or none")
        _expect("text, t2i and mmu", bool(self.text or self.t2i or self.mmu), "data for at least one task", "none")
        unreached = [name for name in ("text", "t2i") if getattr(self, name) and self.stage == "mmu"]
        _expect("data", not unreached, "mmu's alone in stage mmu, whose parameters no other reaches", unreached)
        for name, least in (("save_every", 1), ("keep", 1), ("log_every", 1), ("threads", 1), ("prefetch", 0)):
            value = getattr(self, name)
            if name == "threads" and value is None:
                continue
            _expect(name, type(value) is int and value >= least, f"a whole number of at least {least}", value)
        _expect("threads", (self.threads or 1) <= MOST_THREADS, f"at most {MOST_THREADS}", self.threads)
        _expect("seed", type(self.seed) is int and 0 <= self.seed < 2**63, "a whole number of 63 bits", self.seed)
        for name, data in (("text", self.text), ("t2i", self.t2i), ("mmu", self.mmu)):
            if data is not None:
                fits = type(data.batch) is int and data.batch >= 1
                _expect(f"{name}.batch", fits, "a whole number of at least 1", data.batch)
                _expect(f"{name}.files", bool(data.files), "at least one file", "none")

    def fixed(self) -> dict[str, Any]:
        """What may not change between a run's start and its continuation."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}


def read(source: str | Path, changes: Sequence[str] = ()) -> Run:
    """The run that a YAML file, or the name of a shipped one, describes; ``changes`` are ``key.key=value``.

    ValueError names what is unknown, missing or unfit.
    """
    import yaml

    text = _text(source)
    try:
        values = _loaded(text)
        for change in changes:
            key, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"expected key=value, got {change!r}")
            _put(values, key.strip(), _loaded(value))
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    return _filled(Run, values, "")


def _loaded(text: str) -> Any:
    """What YAML text says; of a setting that is given twice PyYAML would take the last without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys, met = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)], set()
            for key in keys:
                if key.value in met:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
                met.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _text(source: str | Path) -> str:
    if str(source) in SHIPPED:
        return resources.files(__package__).joinpath("configs", f"{source}.yaml").read_text(encoding="utf-8")
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error


def _put(values: Any, key: str, value: Any) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        if not isinstance(values, dict):
            raise ValueError(f"{key} cannot be set: {folder} is no group of settings")
        if values.get(folder) is None:
            values[folder] = {}
        values = values[folder]
    if not isinstance(values, dict):
        raise ValueError(f"{key} cannot be set: it is no group of settings")
    values[last] = value


_GROUPS = {"text": TextData, "t2i": DrawingData, "mmu": UnderstandingData}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool}


def _filled(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the file'} must be a group of settings, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [where + str(name) for name in values if name not in fields]
    required = [f.name for f in fields.values() if f.default is dataclasses.MISSING]
    missing = [where + name for name in required if name not in values]
    if unknown or missing:
        known = ", ".join(fields)
        raise ValueError(f"unknown settings: {unknown}, missing ones: {missing}; there are {known}")
    made = {}
    for name, value in values.items():
        if name in _GROUPS and value is not None and kind is Run:
            value = _filled(_GROUPS[name], value, f"{name}.")
        elif name == "files":
            value = (value,) if isinstance(value, str) else tuple(value or ())
            _expect(where + name, all(isinstance(part, str) for part in value), "texts", value)
        else:
            _check_kind(where + name, str(fields[name].type), value)
        made[name] = value
    return kind(**made)


def _check_kind(name: str, wanted: str, value: Any) -> None:
    """That a value is of its field's type; numbers in quotes (8e-4 without a point is text in YAML) are no numbers."""
    if value is None and "None" in wanted:
        return
    kind = _KINDS.get(wanted.split(" ")[0])
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        hint = "; write 1.0e-4 for 1e-4" if kind == (int, float) and isinstance(value, str) else ""
        raise ValueError(f"{name} must be {wanted}, got {value!r}{hint}")


def _expect(name: str, fits: bool, wanted: str, got: object) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")
