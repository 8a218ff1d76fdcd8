"""Started by torchrun: trains by settings files one after another in the same processes, and notes what learned. Each
model comes with its tables folded, which as shards cannot be.

OUT/gradients.json    the parameters that had a gradient at any step, by name, seen on the first process
OUT/passes.json       how often a layer was computed there
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from omnimamba_model.backbone import MambaLayer
from omnimamba_model.training import Trainer, parallel, run, settings

learn, forward, spread = Trainer.learn, MambaLayer.forward, run.spread
reached, passes = [set()], [0]


def noting(trainer):
    losses = learn(trainer)
    reached[-1].update(name for name, p in trainer.model.named_parameters() if p.grad is not None)
    return losses


def counting(layer, *arguments, **options):
    passes[-1] += 1
    return forward(layer, *arguments, **options)


def spreading(model, ranks):
    model.fold()
    found = spread(model, ranks)
    assert found.backbone.img_embeddings.folded is found.backbone.caption_embed.folded is None
    try:
        found.fold()
    except RuntimeError as error:
        assert "sharded over processes" in str(error)
    else:
        raise AssertionError("a shard was folded")
    return found


Trainer.learn, MambaLayer.forward, run.spread = noting, counting, spreading
with parallel.joined("cpu") as ranks:
    run.joined = lambda device: nullcontext(ranks)
    for path in sys.argv[1:]:
        reached.append(set())
        passes.append(0)
        wanted = settings.read(path)
        run.run(wanted, lambda line: None, progress=False)
        if ranks.first:
            (Path(wanted.out) / "gradients.json").write_text(json.dumps(sorted(reached[-1])))
            (Path(wanted.out) / "passes.json").write_text(json.dumps(passes[-1]))
parallel.leave()
