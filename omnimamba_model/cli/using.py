"""What a checkpoint can do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import FORMS, add_fold, add_generation, add_place, count, loaded, sampling_of


def add(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="draw what a prompt asks for")
    generate.add_argument(
        "--prompt", required=True, action="extend", nargs="+", help="one or many; given once or often"
    )
    generate.add_argument("--out", type=Path, required=True, help="the PNG to write")
    generate.add_argument(
        "--count",
        type=count,
        default=1,
        help="drawings of each prompt: side by side in a row where there are many prompts",
    )
    generate.add_argument("--guidance", type=float, default=1.0, help="above 1 follows the prompt more closely")
    generate.add_argument(
        "--exact", action="store_true", help="keep the padding of short prompts out of the state; models learn with it"
    )
    generate.set_defaults(run=_generate)

    ask = commands.add_parser("ask", help="answer a question about an image")
    ask.add_argument("--question", required=True)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="talk about an image, turn by turn, until the end of input")
    chat.add_argument("--dialogue", type=Path, help="a file that keeps the dialogue; where it is there, go on from it")
    chat.set_defaults(run=_chat)

    web = commands.add_parser("web", help="a page in the browser on which to draw and ask")
    web.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    web.add_argument("--port", type=int, choices=range(1, 65536), metavar="1..65535", default=7860)
    web.add_argument("--share", action="store_true", help="a public address, through Gradio's servers")
    web.set_defaults(run=_web)
    add_place(web)
    add_fold(web)

    for command in (ask, chat):
        command.add_argument("--tokens", type=count, default=256, help="the longest answer")
        command.add_argument("--image", type=Path, required=command is ask)
        command.add_argument("--format", choices=FORMS, help="how the question is put; by default as the model learned")
    for command, task, temperature in ((generate, "t2i", 0.7), (ask, "mmu", 0.0), (chat, "mmu", 0.0)):
        add_generation(command, task, temperature)


def _generate(arguments: argparse.Namespace) -> None:
    from ..files import regular_target
    from ..pipeline import contact_sheet, write_png

    sampling = sampling_of(arguments)
    regular_target(arguments.out)  # said before the work, not after it
    with loaded(arguments) as pipeline:
        drawings = pipeline.draw(arguments.prompt, sampling, arguments.guidance, arguments.count, arguments.exact)
    many = len(arguments.prompt) > 1 and arguments.count > 1
    write_png(contact_sheet(drawings, columns=arguments.count if many else 10), arguments.out)


def _ask(arguments: argparse.Namespace) -> None:
    from ..pictures import read_image

    sampling, image = sampling_of(arguments), read_image(arguments.image)
    with loaded(arguments) as pipeline:
        (said,) = pipeline.ask([image], [arguments.question], sampling, arguments.format, arguments.tokens)
    print(said)


def _chat(arguments: argparse.Namespace) -> None:
    from ..dialogue import Chat
    from ..files import regular_target
    from ..pictures import read_image

    sampling, kept, form = sampling_of(arguments), arguments.dialogue, arguments.format
    goes_on = kept is not None and regular_target(kept).exists()
    if arguments.image is None and not goes_on:
        raise ValueError("--image must name the picture of a new dialogue")
    image = None if arguments.image is None else read_image(arguments.image)
    with loaded(arguments) as pipeline:
        chat = Chat.load(pipeline, kept, image, form) if goes_on else Chat(pipeline, image, form)
        if kept is not None and not goes_on:
            chat.save(kept)  # a place that cannot be written is told before the first question
        for asked, said in chat.turns:
            print(f"> {asked}\n{said}")
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
            else:
                if kept is not None:
                    chat.save(kept)


def _web(arguments: argparse.Namespace) -> None:
    try:
        from ..web import serve
    except ModuleNotFoundError as error:
        raise ImportError(f"the page needs Gradio, pip install 'omnimamba[web]': {error}") from error

    with loaded(arguments) as pipeline:
        serve(pipeline, arguments.host, arguments.port, arguments.backend, arguments.share)
