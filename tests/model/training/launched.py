"""Started by torchrun: trains by settings files one after another in the same processes, and notes what learned.

OUT/gradients.json    the parameters that had a gradient at any step, by name, seen on the first process
OUT/passes.json       how often a layer was computed there
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from omnimamba_model.backbone import MambaLayer
from omnimamba_model.training import Trainer, parallel, run, settings

learn, forward = Trainer.learn, MambaLayer.forward
reached, passes = [set()], [0]


def noting(trainer):
    losses = learn(trainer)
    reached[-1].update(name for name, p in trainer.model.named_parameters() if p.grad is not None)
    return losses


def counting(layer, *arguments, **options):
    passes[-1] += 1
    return forward(layer, *arguments, **options)


Trainer.learn, MambaLayer.forward = noting, counting
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
