"""Training: phases in which some parameters learn from some tasks and the rest stay bit for bit as they are.

| file | what it holds |
| --- | --- |
| phase.py | what learns, from what, for how long, at which rate |
| loop.py | the optimizer and one step: losses of all tasks, gradients, clipping, update |
| records.py, json_list.py | files on disk as records |
| lessons.py | records as batches, each a function of seed and step alone |
| ahead.py, beside.py | batches made ready before their step; on a CPU each task in a process of its own |
| features.py | what the frozen encoders saw, kept on disk |
| checkpoints.py | the run at a step, written whole or not at all; the last few are kept |
| parallel.py | one process, or many under torchrun with every layer sharded (FSDP2) |
| merge.py | the two halves of stage 1 as one model |
| run.py | a YAML file to a trained model: ``omnimamba train`` |
"""

from .loop import Trainer, train
from .phase import Batch, Phase

__all__ = ["Batch", "Phase", "Trainer", "train"]
