"""The two halves of stage 1 as one model, stage 2's start."""

from __future__ import annotations

from pathlib import Path

import torch

from ..omnimamba import OmniMamba, trained_in
from ..pipeline import with_pixels
from ..weights import CheckpointError, load, read_tokenizer, save


def merge(understanding: str | Path, drawing: str | Path, target: str | Path) -> OmniMamba:
    """Write into ``target`` the model that has from each folder what that half of stage 1 trains.

    CheckpointError where the folders do not grow from one model: their configs differ, or a tensor that neither trains;
    and where a tokenizer is missing, damaged or unlike the model. All is read and checked before a file is written.
    """
    halves = {"mmu": load(understanding), "t2i": load(drawing)}
    for folder, half in zip((understanding, drawing), halves.values(), strict=True):
        if not isinstance(half, OmniMamba):
            raise CheckpointError(f"{folder} holds a plain language model, not a half of stage 1")
    model = halves["t2i"]
    if model.config != halves["mmu"].config:
        raise CheckpointError(f"{understanding} and {drawing} differ in their config.json")
    looked = dict(halves["mmu"].named_parameters())
    unlike = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained_in("mmu", name):
                parameter.copy_(looked[name])
            elif not trained_in("t2i", name) and not torch.equal(parameter, looked[name]):
                unlike.append(name)
    if unlike:
        listed = ", ".join(unlike[:10]) + (f" and {len(unlike) - 10} more" if len(unlike) > 10 else "")
        raise CheckpointError(f"{understanding} and {drawing} differ in what neither half trains: {listed}")
    text = read_tokenizer(drawing) or read_tokenizer(understanding)
    if text is None:
        raise CheckpointError(f"neither {understanding} nor {drawing} has a tokenizer.json")
    _, pixels = with_pixels(text, drawing, model.config)
    save(model, target, text)
    pixels.save(target)
    return model
