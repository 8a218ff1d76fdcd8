"""The ``omnimamba`` command. Each subcommand imports what it needs when it runs; errors end with status 2.

making.py    checkpoints from other projects, and by training      convert, train, tokenize, merge
using.py     what a checkpoint can do                              generate, ask, chat, web
judging.py   what it is worth                                      evaluate
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import judging, making, using
from .options import seed

FAILED, INTERRUPTED = 2, 130


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
    demo.add_argument("--seed", type=seed, default=0)
    demo.add_argument(
        "--control", action="store_true", help="train both tasks in one stage from the start, for as many steps"
    )
    demo.add_argument(
        "--validate", action="store_true", help="score a part of the training scans, never the held-out ones"
    )
    demo.set_defaults(run=_demo)

    making.add(commands)
    using.add(commands)
    judging.add(commands)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    from omnimamba_kernels import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if arguments.json else info.as_text(facts))


def _demo(arguments: argparse.Namespace) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("sklearn", "matplotlib", "tokenizers") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'omnimamba[demo]'")
    from ..demo import Settings, run

    settings = Settings(staged=not arguments.control)
    metrics = run(arguments.out, seed=arguments.seed, settings=settings, validate=arguments.validate)
    print(json.dumps(metrics, indent=2))
    print(f"pictures, metrics and the checkpoint are in {arguments.out}")
