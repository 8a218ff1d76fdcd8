"""The counters by which a GPU's decode step finds its last block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Each state's tickets (slots, h), all 0 between steps. They belong to the state, which one step at a time may change.
_TICKETS = WeakTensorKeyDictionary()


def tickets(ssm_state: Tensor) -> Tensor:
    shape = ssm_state.shape[:2]
    found = _TICKETS.get(ssm_state)
    if found is None or found.shape != shape:
        found = torch.zeros(shape, dtype=torch.int32, device=ssm_state.device)
        if not is_capturing(ssm_state):  # else they are zeroed by the graph's own runs, and by nothing else
            _TICKETS[ssm_state] = found
    return found


def is_capturing(t: Tensor) -> bool:
    """Whether work on ``t`` is being captured into a CUDA graph, to run later, instead of running now."""
    return t.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
