"""Started by torchrun: takes a run up at its last step, and notes each process's peak of memory while it does; then
damages the last step and tries again.

OUT/memory-RANK.json    bytes of memory of its own (no file's) at most while it resumed, beyond those before; of all
                        moments; of those that it is left with
OUT/error-RANK          what the second try said
"""

import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import torch

from omnimamba_model.training import checkpoints, parallel, run, settings

torch.set_num_threads(1)
resume = checkpoints.resume


def anonymous() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def measured(trainer, out):
    trainer.ranks.sum(1.0)  # what gloo takes once
    before, over, seen = anonymous(), threading.Event(), [0]

    def watch():
        while not over.is_set():
            seen.append(anonymous())
            over.wait(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    found = resume(trainer, out)
    over.set()
    watching.join()
    sizes = [(p.to_local().nbytes, p.numel() * p.element_size()) for p in trainer.model.parameters()]
    shards, whole = map(sum, zip(*sizes, strict=True))
    told = {"peak": max(seen) - before, "moments": 2 * whole, "mine": 2 * shards}
    (out / f"memory-{trainer.ranks.rank}.json").write_text(json.dumps(told))
    return found


checkpoints.resume = measured
with parallel.joined("cpu") as ranks:
    run.joined = lambda device: nullcontext(ranks)
    wanted = settings.read(sys.argv[1])
    run.run(wanted, lambda line: None, progress=False)
    if ranks.first:
        (checkpoints.kept(Path(wanted.out))[-1][1] / checkpoints.EXTRA).write_bytes(b"x")
    ranks.wait()
    try:
        run.run(wanted, lambda line: None, progress=False)
    except checkpoints.CheckpointError as error:  # on every process, none waiting for another
        Path(wanted.out, f"error-{ranks.rank}").write_text(str(error))
parallel.leave()
