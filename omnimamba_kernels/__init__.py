"""Hand-written kernels of Mamba-2 and of task-routed LoRA, forward and backward, under the field's own names.

Every function takes ``backend=None``, keyword only: the best implementation for the device is chosen. ``backends()``
says which can run and why the others cannot, ``use_backend(name)`` fixes one for a block.
"""

from .backends import backends, use_backend
from .capture import CannotCapture, capture
from .causal_conv1d.api import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from .gated_norm.api import add_rmsnorm, rmsnorm_fn
from .lora_linear.api import lora_linear
from .lora_linear.int8 import dequantize_int8, quantize_int8
from .mamba_mixer.api import mamba_mixer_step, mamba_split_conv1d_scan_combined
from .ssd_scan.api import mamba_chunk_scan_combined
from .state_update.api import selective_state_update

__version__ = "0.1.0"

__all__ = [
    "CannotCapture",
    "add_rmsnorm",
    "backends",
    "capture",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "dequantize_int8",
    "lora_linear",
    "mamba_chunk_scan_combined",
    "mamba_mixer_step",
    "mamba_split_conv1d_scan_combined",
    "quantize_int8",
    "rmsnorm_fn",
    "selective_state_update",
    "use_backend",
]
