"""The counters by which a GPU's decode step finds its last block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# The tickets (slots, h) of each state, all 0 between steps: by its memory, whatever view of it a step is given. They
# belong to the state, which one step at a time may change.
_TICKETS = WeakIdKeyDictionary()
# Of each device and stream what no state has yet of the tickets that were zeroed last.
_ZEROED: dict[tuple, Tensor] = {}
_AT_ONCE = 2**16


def tickets(ssm_state: Tensor) -> Tensor:
    storage, place = ssm_state.untyped_storage(), (ssm_state.storage_offset(), *ssm_state.shape[:2])
    known = _TICKETS.get(storage)
    found = None if known is None else known.get(place)
    if found is None:
        if is_capturing(ssm_state):  # zeroed by the graph's own runs, and by nothing else
            return torch.zeros(place[1:], dtype=torch.int32, device=ssm_state.device)
        found = _zeroed(ssm_state.device, *place[1:])
        _TICKETS.setdefault(storage, {})[place] = found
    return found


def _zeroed(device: torch.device, slots: int, h: int) -> Tensor:
    """Tickets that nobody has. They are zeroed many at once, on the stream of those who ask: it needs no wait."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    size, rest = slots * h, _ZEROED.pop(key, None)  # two threads get no ticket twice
    if rest is None or rest.numel() < size:
        rest = torch.zeros(max(size, _AT_ONCE), dtype=torch.int32, device=device)
    _ZEROED[key] = rest[size:]
    return rest[:size].view(slots, h)


def is_capturing(t: Tensor) -> bool:
    """Whether work on ``t`` is being captured into a CUDA graph, to run later, instead of running now."""
    return t.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
