"""The ``omnimamba`` command. Each subcommand imports what it needs when it runs; errors end with status 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

FAILED, INTERRUPTED = 2, 130
TASKS = ("mmu", "t2i")
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

    generate = commands.add_parser("generate", help="draw what a prompt asks for")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--out", type=Path, required=True, help="the PNG to write")
    generate.add_argument("--count", type=_count, default=1, help="how many drawings, in rows of ten")
    generate.set_defaults(run=_generate)

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

    merge = commands.add_parser("merge", help="join the two halves of stage 1 into stage 2's start")
    merge.add_argument("understanding", type=Path, help="the model that stage1-mmu trained")
    merge.add_argument("drawing", type=Path, help="the model that stage1-t2i trained")
    merge.add_argument("target", type=Path, help="the folder to write")
    merge.set_defaults(run=_merge)

    ask = commands.add_parser("ask", help="answer a question about an image")
    ask.add_argument("--image", type=Path, required=True)
    ask.add_argument("--question", required=True)
    ask.set_defaults(run=_ask)

    for command, temperature in ((generate, 0.7), (ask, 0.0)):
        command.add_argument("--checkpoint", type=Path, required=True, help="a folder that the demo wrote")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
        command.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
        command.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that reach p together")
    return parser


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
    from .pipeline import Pipeline, contact_sheet, write_png

    sampling = _sampling(arguments)
    regular_target(arguments.out)  # said before the work, not after it
    drawings = Pipeline.load(arguments.checkpoint).draw([arguments.prompt] * arguments.count, sampling)
    write_png(contact_sheet(drawings), arguments.out)


def _convert(arguments: argparse.Namespace) -> None:
    from . import convert

    wanted = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    print(convert.convert(**wanted))


def _train(arguments: argparse.Namespace) -> None:
    from .training import run, settings

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    trained = run.run(settings.read(arguments.settings, arguments.changes), say)
    if trained is not None:
        print(f"the trained model is in {trained}")


def _merge(arguments: argparse.Namespace) -> None:
    from .training.merge import merge

    merge(arguments.understanding, arguments.drawing, arguments.target)
    print(f"stage 2's start is in {arguments.target}")


def _ask(arguments: argparse.Namespace) -> None:
    from .pipeline import Pipeline, read_image

    sampling, image = _sampling(arguments), read_image(arguments.image)
    (said,) = Pipeline.load(arguments.checkpoint).ask([image], [arguments.question], sampling)
    print(said)


def _sampling(arguments: argparse.Namespace):
    from .generation import Sampling

    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
