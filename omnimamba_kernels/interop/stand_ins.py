"""Code that imports mamba_ssm or causal_conv1d, unchanged, on these kernels; neither need be installed.

    from omnimamba_kernels.interop.stand_ins import stand_in
    undo = stand_in()      # before that code is imported
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined    # omnimamba's

Where one of the two is installed, its other modules are its own: its ``Mamba2`` then runs on these functions. Where it
is not, there is what ``NAMES`` lists and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .. import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_state_update,
)
from .mamba2 import Mamba2, RMSNorm

_CONV = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
_SCAN = {
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
}
NAMES: dict[str, dict[str, Any]] = {
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": causal_conv1d_varlen_states},
    "mamba_ssm.ops.triton.ssd_combined": _SCAN,
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn, "RMSNorm": RMSNorm},
}
"""What each module has, installed or not."""

ABSENT: dict[str, dict[str, Any]] = {
    "causal_conv1d": _CONV,
    "mamba_ssm": {"Mamba2": Mamba2},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
}
"""What the modules around them have where the package is not installed."""

_LEAVES = frozenset(NAMES) | {"mamba_ssm.modules.mamba2"}


class _StandIns(MetaPathFinder, Loader):
    """Finds and fills the modules of NAMES, and of ABSENT where nothing else would be found."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        if name in NAMES or (name in ABSENT and self._nobody_else(name, path)):
            return ModuleSpec(name, self, is_package=name not in _LEAVES)
        return None

    def _nobody_else(self, name: str, path: Sequence[str] | None) -> bool:
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        return all(finder.find_spec(name, path) is None for finder in others)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "omnimamba's kernels under the names of another project."
        vars(module).update(NAMES.get(module.__name__) or ABSENT[module.__name__])


def stand_in() -> Callable[[], None]:
    """From now on ``import mamba_ssm...`` and ``import causal_conv1d...`` give these kernels.

    Returns:
        A function without arguments that undoes it. What was imported in between keeps what it got.

    Raises:
        RuntimeError: one of the two was imported already, so that its names are bound; nothing has changed.
    """
    roots = {name.split(".")[0] for name in NAMES}
    imported = sorted(name for name in sys.modules if name in roots)
    if imported:
        raise RuntimeError(
            f"{', '.join(imported)} was imported before stand_in(); call it first, or import from omnimamba_kernels"
        )
    finder = _StandIns()
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder not in sys.meta_path:
            return
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in roots]:
            del sys.modules[name]

    return undo
