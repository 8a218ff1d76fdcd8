"""OmniMamba: text to image and image understanding on one Mamba-2 backbone."""

from .backbone import MambaBackbone, MambaLM, cast_matrices
from .config import BASE, MMU, T2I, TASKS, MambaConfig, OmniMambaConfig, SpecialTokens
from .generation import answer, draw, generate_text
from .omnimamba import OmniMamba, Prediction
from .sampling import GREEDY, Sampling
from .state import MambaState
from .weights import CheckpointError, load, save

__all__ = [
    "BASE",
    "GREEDY",
    "MMU",
    "T2I",
    "TASKS",
    "CheckpointError",
    "MambaBackbone",
    "MambaConfig",
    "MambaLM",
    "MambaState",
    "OmniMamba",
    "OmniMambaConfig",
    "Prediction",
    "Sampling",
    "SpecialTokens",
    "answer",
    "cast_matrices",
    "draw",
    "generate_text",
    "load",
    "save",
]
