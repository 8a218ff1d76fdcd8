"""How rows find their adapter: ``task`` names each row's, or is None and ``one_task`` is that of all rows."""

from __future__ import annotations

import torch
from torch import Tensor


def tasks_of_rows(x: Tensor, lora_A: Tensor | None, task: Tensor | None, one_task: int) -> Tensor | None:
    """(rows,) integers, for implementations that take nothing else; None without adapters."""
    if lora_A is None or task is not None:
        return task
    return torch.full((x.shape[0],), one_task, dtype=torch.int32, device=x.device)
