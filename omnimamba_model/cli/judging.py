"""What a checkpoint is worth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import FORMS, add_generation, count, loaded, named, sampling_of


def add(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="score a checkpoint on POPE, MME, GQA or VQAv2, or drawings by FID")
    kinds = evaluate.add_subparsers(dest="benchmark", required=True)
    for name, files in (("pope", "+"), ("mme", "*"), ("gqa", "+"), ("vqav2", "+")):
        command = kinds.add_parser(name, help=f"answers to {name.upper()}'s questions")
        command.add_argument("questions", type=Path, nargs=files, help="its files; of MME some kinds' folders, or all")
        command.add_argument("--images", type=Path, required=True, help="the folder of images; MME's own folder")
        command.add_argument("--ending", help="text behind every question; by default the benchmark's own")
        command.add_argument("--format", choices=FORMS, help="how a question is put; by default as the model learned")
        command.set_defaults(run=_judge, annotations=None)
        if name == "vqav2":
            command.add_argument("--annotations", type=Path, help="people's answers; without, only yours are written")
        add_generation(command, "mmu", 0.0)
    drawings = kinds.add_parser("draw", help="draw every caption of a file into a folder, for FID")
    drawings.add_argument("captions", type=Path, help="a caption a line, or COCO's captions file")
    drawings.add_argument("--guidance", type=float, default=1.0)
    drawings.set_defaults(run=_draw_captions)
    add_generation(drawings, "t2i", 1.0)
    for command in kinds.choices.values():
        command.add_argument("--out", type=Path, required=True, help="the folder to write; a stopped run goes on")
        command.add_argument("--batch", type=count, default=16)
    distance = kinds.add_parser("fid", help="the distance between two folders of pictures")
    distance.add_argument("real", type=Path)
    distance.add_argument("drawn", type=Path)
    eyes = distance.add_mutually_exclusive_group()
    eyes.add_argument("--features", type=Path, help="what torch.export saved, its batch dynamic, for Inception v3")
    eyes.add_argument("--inception", type=Path, help="its weights, pt_inception-2015-12-05-6726825d.pth: no download")
    distance.add_argument("--device", default="cpu")
    distance.set_defaults(run=_fid)


def _judge(arguments: argparse.Namespace) -> None:
    from ..evaluation import judge

    with loaded(arguments) as pipeline:
        scores = judge(
            arguments.benchmark, pipeline, arguments.questions, arguments.images, arguments.out,
            annotations=arguments.annotations, checkpoint=named(arguments.checkpoint), ending=arguments.ending,
            batch=arguments.batch, sampling=sampling_of(arguments), form=arguments.format,
        )  # fmt: skip
    print(json.dumps(scores, indent=2))


def _draw_captions(arguments: argparse.Namespace) -> None:
    from ..evaluation import draw_captions
    from ..evaluation.drawings import read_captions

    sampling, captions = sampling_of(arguments), read_captions(arguments.captions)
    with loaded(arguments) as pipeline:
        checkpoint = named(arguments.checkpoint)
        draw_captions(
            pipeline, captions, arguments.out, sampling, arguments.guidance, arguments.batch, checkpoint=checkpoint
        )
    print(f"{len(captions)} drawings in {arguments.out}")


def _fid(arguments: argparse.Namespace) -> None:
    from ..evaluation import fid
    from ..evaluation.fid import read_features
    from ..weights import usable

    device = usable(arguments.device)
    features = read_features(arguments.features).to(device) if arguments.features else None
    given = dict(device=device, inception=arguments.inception)
    print(f"FID {fid(arguments.real, arguments.drawn, features, **given):.4f}")
