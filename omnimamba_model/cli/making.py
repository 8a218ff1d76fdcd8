"""Checkpoints: from other projects, and by training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import DTYPES, TASKS


def add(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="make a checkpoint of this package from another project's, or back")
    convert.add_argument("source", help="OmniMamba-1.3b.pth, a Mamba-2 folder, a PEFT adapter, or a hub repository")
    convert.add_argument("target", type=Path, help="the folder to write, or a .gguf of a plain Mamba-2 for llama.cpp")
    convert.add_argument("--dtype", choices=(*DTYPES, "q8_0"), help="cast the matrices; q8_0 in a .gguf alone")
    convert.add_argument("--tokenizer", help="a folder with GPT-NeoX's tokenizer.json, or a hub name, to put beside it")
    convert.add_argument("--image-tokenizer", help="vq_ds16_t2i.pt, a folder with it, or a hub name, to put beside it")
    convert.add_argument(
        "--encoders", nargs=2, metavar=("DINO", "SIGLIP"),
        help="folders or hub names of DINOv2 with registers and SigLIP, to note beside it",
    )  # fmt: skip
    convert.add_argument("--base", help="the OmniMamba that a PEFT adapter belongs on: a folder or a hub name")
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
    tokenize.add_argument(
        "--tokenizer", required=True, help="a folder with an image tokenizer, its file, or a hub name"
    )
    tokenize.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    tokenize.add_argument("--device", default="cpu")
    tokenize.set_defaults(run=_tokenize)

    merge = commands.add_parser("merge", help="join the two halves of stage 1 into stage 2's start")
    merge.add_argument("understanding", type=Path, help="the model that stage1-mmu trained")
    merge.add_argument("drawing", type=Path, help="the model that stage1-t2i trained")
    merge.add_argument("target", type=Path, help="the folder to write")
    merge.set_defaults(run=_merge)


def _convert(arguments: argparse.Namespace) -> None:
    from .. import convert

    wanted = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    print(convert.convert(**wanted))


def _train(arguments: argparse.Namespace) -> None:
    from ..training import parallel, run, settings

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    trained = run.run(settings.read(arguments.settings, arguments.changes), say)
    if trained is not None:
        print(f"the trained model is in {trained}")
    parallel.leave()


def _tokenize(arguments: argparse.Namespace) -> None:
    from ..hub import locate
    from ..pipeline import PIXELS, load_pixels
    from ..training.tokenize import tokenize
    from ..weights import usable

    pixels = load_pixels(locate(arguments.tokenizer, wanted=PIXELS)).to(usable(arguments.device))
    written, passed_over = tokenize(arguments.images, arguments.out, pixels, arguments.captions)
    for reason in list(passed_over)[:20]:
        print(f"passed over: {reason}", file=sys.stderr)
    print(f"{written} pictures in {arguments.out}, {sum(passed_over.values())} passed over")


def _merge(arguments: argparse.Namespace) -> None:
    from ..training.merge import merge

    merge(arguments.understanding, arguments.drawing, arguments.target)
    print(f"stage 2's start is in {arguments.target}")
