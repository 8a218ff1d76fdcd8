"""Mamba-2 models of the transformers library on these kernels, in one line.

    from omnimamba_kernels.interop.transformers import plug
    unplug = plug()        # or: with plugged(): ...

transformers (5.23) looks five functions up by name in each modelling module at every call. ``plug`` rebinds those names
to the kernels, with the keywords that they know; ``unplug()`` puts back what was there. Models, weights and caches stay
as they are.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .. import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)

ARCHITECTURES = ("mamba2", "bamba", "falcon_h1", "zamba2", "nemotron_h", "granitemoehybrid")

_KERNELS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
    "mamba2_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
}


def _with_known_keywords(kernel: Callable) -> Callable:
    """The kernel, deaf to keywords that it does not have: modelling code passes on all of its own."""
    known = frozenset(inspect.signature(kernel).parameters)

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **{name: value for name, value in kwargs.items() if name in known})

    return call


def plug(*modules: ModuleType) -> Callable[[], None]:
    """Rebinds the Mamba-2 functions of transformers' modelling modules to these kernels.

    Args:
        modules: modelling modules; none: those of every architecture in ``ARCHITECTURES`` that this transformers has.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ImportError: transformers is not installed. ValueError: a module has not the five functions (transformers 5.23
            has them), and nothing is rebound.
    """
    modules = modules or tuple(_modelling_modules())
    for module in modules:
        missing = [name for name in _KERNELS if not callable(getattr(module, name, None))]
        if missing:
            raise ValueError(
                f"{module.__name__} has no {', '.join(missing)}; expected a Mamba-2 modelling module of transformers "
                "5.23 or later, such as transformers.models.mamba2.modeling_mamba2"
            )
    before = [(module, name, getattr(module, name)) for module in modules for name in _KERNELS]
    for module, name, _ in before:
        setattr(module, name, _with_known_keywords(_KERNELS[name]))

    def unplug() -> None:
        for module, name, function in before:
            setattr(module, name, function)

    return unplug


@contextmanager
def plugged(*modules: ModuleType) -> Iterator[None]:
    """``plug`` for the length of a block."""
    unplug = plug(*modules)
    try:
        yield
    finally:
        unplug()


def _modelling_modules() -> Iterator[ModuleType]:
    importlib.import_module("transformers")
    for name in ARCHITECTURES:
        try:
            yield importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        except ModuleNotFoundError:
            continue
