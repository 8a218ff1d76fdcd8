"""The ``omnimamba`` command. Each subcommand imports what it needs when it runs; errors end with status 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .sampling import Sampling

FAILED, INTERRUPTED = 2, 130
TASKS = ("mmu", "t2i")
FORMS = ("instruct", "user", "plain")
BACKENDS = ("cuda", "triton", "native", "reference")
DTYPES = ("float32", "bfloat16", "float16")
MOST_DRAWINGS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 after an error told in one line, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"omnimamba {arguments.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omnimamba", description="Text to image and image understanding on Mamba-2, and its kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, processor, and which kernels can run here")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="train on real handwritten digits, draw some, answer about others")
    demo.add_argument("--out", type=Path, required=True, help="folder for metrics, pictures and the checkpoint")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--control", action="store_true", help="train both tasks in one stage from the start, for as many steps"
    )
    demo.add_argument(
        "--validate", action="store_true", help="score a part of the training scans, never the held-out ones"
    )
    demo.set_defaults(run=_demo)

    _add_making(commands)
    _add_using(commands)
    return parser


def _add_making(commands: argparse._SubParsersAction) -> None:
    """Checkpoints: from other projects, and by training."""
    convert = commands.add_parser("convert", help="make a checkpoint of this package from another project's, or back")
    convert.add_argument("source", help="OmniMamba-1.3b.pth, a Mamba-2 folder, a PEFT adapter, or a hub repository")
    convert.add_argument("target", type=Path, help="the folder to write")
    convert.add_argument("--dtype", choices=DTYPES, help="cast the matrices")
    convert.add_argument("--tokenizer", help="a folder with GPT-NeoX's tokenizer.json, or a hub name, to put beside it")
    convert.add_argument("--image-tokenizer", type=Path, help="vq_ds16_t2i.pt, to put beside it")
    convert.add_argument("--base", help="the OmniMamba checkpoint that a PEFT adapter belongs on")
    convert.add_argument("--task", choices=TASKS, help="whose adapter a PEFT folder is; without --base, write one")
    convert.add_argument("--as-omnimamba", action="store_true", help="grow an OmniMamba around a Mamba-2")
    convert.set_defaults(run=_convert)

    train = commands.add_parser("train", help="train by a settings file; the same command goes on after a stop")
    train.add_argument("settings", help="a YAML file, or stage1-mmu, stage1-t2i or stage2: the paper's schedules")
    train.add_argument("changes", nargs="*", metavar="key=value", help="settings on top, such as t2i.batch=48")
    train.set_defaults(run=_train)

    tokenize = commands.add_parser("tokenize", help="turn pictures and captions into what drawing learns from")
    tokenize.add_argument("images", type=Path, help="a folder of pictures, captions beside them in NAME.txt")
    tokenize.add_argument("--captions", type=Path, help="COCO's captions file instead, with names in that folder")
    tokenize.add_argument("--tokenizer", type=Path, required=True, help="a folder with an image tokenizer")
    tokenize.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    tokenize.add_argument("--device", default="cpu")
    tokenize.set_defaults(run=_tokenize)

    merge = commands.add_parser("merge", help="join the two halves of stage 1 into stage 2's start")
    merge.add_argument("understanding", type=Path, help="the model that stage1-mmu trained")
    merge.add_argument("drawing", type=Path, help="the model that stage1-t2i trained")
    merge.add_argument("target", type=Path, help="the folder to write")
    merge.set_defaults(run=_merge)


def _add_using(commands: argparse._SubParsersAction) -> None:
    """What a checkpoint can do."""
    generate = commands.add_parser("generate", help="draw what a prompt asks for")
    generate.add_argument("--prompt", required=True, action="append", help="may be given many times")
    generate.add_argument("--out", type=Path, required=True, help="the PNG to write")
    generate.add_argument("--count", type=_count, default=1, help="drawings of each prompt, in rows of ten")
    generate.add_argument("--guidance", type=float, default=1.0, help="above 1 follows the prompt more closely")
    generate.set_defaults(run=_generate)

    ask = commands.add_parser("ask", help="answer a question about an image")
    ask.add_argument("--question", required=True)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="talk about an image, turn by turn, until the end of input")
    chat.add_argument("--tokens", type=_count, default=256, help="the longest answer")
    chat.set_defaults(run=_chat)

    for command in (ask, chat):
        command.add_argument("--image", type=Path, required=True)
        command.add_argument("--format", choices=FORMS, help="how the question is put; by default as the model learned")
    for command, temperature in ((generate, 0.7), (ask, 0.0), (chat, 0.0)):
        _add_generation(command, temperature)


def _add_generation(command: argparse.ArgumentParser, temperature: float) -> None:
    """What every command that runs a model takes."""
    command.add_argument("--checkpoint", type=Path, required=True, help="a folder of demo, train or convert")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    command.add_argument("--dtype", choices=DTYPES, help="cast the matrices; by default they stay as they are")
    command.add_argument("--backend", choices=BACKENDS, help="the kernels to run on; by default the best that can")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
    command.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    command.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that reach p together")
    command.add_argument("--min-p", type=float, default=0.0, help="keep tokens p times as likely as the likeliest")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes drawn tokens less likely")


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_DRAWINGS:
        raise argparse.ArgumentTypeError(f"expected a whole number in 1..{MOST_DRAWINGS}, got {text!r}")
    return int(text)


def _info(arguments: argparse.Namespace) -> None:
    from omnimamba_kernels import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if arguments.json else info.as_text(facts))


def _demo(arguments: argparse.Namespace) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'omnimamba[demo]'")
    from .demo import ONE_STAGE, Settings, run

    settings = Settings(phases=ONE_STAGE) if arguments.control else Settings()
    metrics = run(arguments.out, seed=arguments.seed, settings=settings, validate=arguments.validate)
    print(json.dumps(metrics, indent=2))
    print(f"pictures, metrics and the checkpoint are in {arguments.out}")


def _generate(arguments: argparse.Namespace) -> None:
    from .files import regular_target
    from .pipeline import contact_sheet, write_png

    sampling = _sampling(arguments)
    regular_target(arguments.out)  # said before the work, not after it
    with _pipeline(arguments) as pipeline:
        drawings = pipeline.draw(arguments.prompt, sampling, arguments.guidance, arguments.count)
    write_png(contact_sheet(drawings), arguments.out)


def _convert(arguments: argparse.Namespace) -> None:
    from . import convert

    wanted = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    print(convert.convert(**wanted))


def _train(arguments: argparse.Namespace) -> None:
    from .training import parallel, run, settings

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    trained = run.run(settings.read(arguments.settings, arguments.changes), say)
    if trained is not None:
        print(f"the trained model is in {trained}")
    parallel.leave()


def _tokenize(arguments: argparse.Namespace) -> None:
    from .pipeline import load_pixels
    from .training.tokenize import tokenize

    pixels = load_pixels(arguments.tokenizer).to(arguments.device)
    written, passed_over = tokenize(arguments.images, arguments.out, pixels, arguments.captions)
    for reason in list(passed_over)[:20]:
        print(f"passed over: {reason}", file=sys.stderr)
    print(f"{written} pictures in {arguments.out}, {sum(passed_over.values())} passed over")


def _merge(arguments: argparse.Namespace) -> None:
    from .training.merge import merge

    merge(arguments.understanding, arguments.drawing, arguments.target)
    print(f"stage 2's start is in {arguments.target}")


def _ask(arguments: argparse.Namespace) -> None:
    from .pipeline import read_image

    sampling, image = _sampling(arguments), read_image(arguments.image)
    with _pipeline(arguments) as pipeline:
        (said,) = pipeline.ask([image], [arguments.question], sampling, arguments.format)
    print(said)


def _chat(arguments: argparse.Namespace) -> None:
    from .dialogue import Chat
    from .pipeline import read_image

    sampling, image = _sampling(arguments), read_image(arguments.image)
    with _pipeline(arguments) as pipeline:
        chat = Chat(pipeline, image, arguments.format)
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                print()
                return
            if not question:
                continue
            try:
                for piece in chat.ask(question, sampling, arguments.tokens):
                    print(piece, end="", flush=True)
                print()
            except ValueError as error:
                print(error, file=sys.stderr)


@contextmanager
def _pipeline(arguments: argparse.Namespace) -> Iterator[Pipeline]:
    """The checkpoint on its device, within the back end that was named."""
    import torch

    from omnimamba_kernels import use_backend

    from .pipeline import Pipeline

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with use_backend(arguments.backend):
        yield Pipeline.load(arguments.checkpoint, arguments.device, dtype)


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from .sampling import Sampling

    return Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed,
        arguments.min_p, arguments.repetition_penalty,
    )  # fmt: skip
