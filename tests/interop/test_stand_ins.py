"""What imports mamba_ssm and causal_conv1d gets these kernels, whether those are installed or not."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

import omnimamba_kernels
from omnimamba_kernels.interop.mamba2 import Mamba2, RMSNorm
from omnimamba_kernels.interop.stand_ins import NAMES, stand_in

ROOTS = ("mamba_ssm", "causal_conv1d")
FUNCTIONS = {
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.layernorm_gated": ("rmsnorm_fn",),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
}


def of_theirs():
    return [name for name in sys.modules if name.split(".")[0] in ROOTS]


@pytest.fixture
def nothing_imported():
    before = {name: sys.modules.pop(name) for name in of_theirs()}
    yield
    for name in of_theirs():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def neither(nothing_imported):
    if any(importlib.util.find_spec(root) for root in ROOTS):
        pytest.skip("mamba_ssm or causal_conv1d is installed")


@pytest.fixture
def installed(nothing_imported, tmp_path, monkeypatch):
    """Packages of those names with something of their own in them."""
    for root, own in (("mamba_ssm", "modules/mamba2"), ("causal_conv1d", "cpp")):
        path = tmp_path / root / f"{own}.py"
        path.parent.mkdir(parents=True)
        path.write_text("from causal_conv1d import causal_conv1d_fn\nMamba2 = 'its own'\n")
        (tmp_path / root / "__init__.py").write_text("")
    (tmp_path / "causal_conv1d/__init__.py").write_text(
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn\n"
    )
    (tmp_path / "causal_conv1d/causal_conv1d_interface.py").write_text("raise ImportError('needs a GPU')\n")
    triton = tmp_path / "mamba_ssm/ops/triton"
    triton.mkdir(parents=True)
    (triton / "ssd_combined.py").write_text("mamba_chunk_scan_combined = 'its own'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def test_without_them_every_name_is_ours_until_undone(neither):
    undo = stand_in()
    try:
        for module, names in FUNCTIONS.items():
            for name in names:
                assert getattr(importlib.import_module(module), name) is getattr(omnimamba_kernels, name)
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm import Mamba2 as found
        from mamba_ssm.modules.mamba2 import Mamba2 as deeper
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as norm

        assert causal_conv1d_fn is omnimamba_kernels.causal_conv1d_fn
        assert found is deeper is Mamba2 and norm is RMSNorm
        import mamba_ssm.ops.triton.ssd_combined

        scan = mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined
        assert scan is omnimamba_kernels.mamba_chunk_scan_combined
        assert importlib.util.find_spec("mamba_ssm") is not None  # what transformers asks
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    finally:
        undo()
    undo()  # a second time changes nothing
    for root in ROOTS:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(root)


def test_with_them_their_own_modules_stand_on_our_functions(installed):
    undo = stand_in()
    try:
        mamba2 = importlib.import_module("mamba_ssm.modules.mamba2")
        assert mamba2.Mamba2 == "its own"
        assert mamba2.causal_conv1d_fn is omnimamba_kernels.causal_conv1d_fn
        for module in NAMES:
            importlib.import_module(module)
        scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        assert scan.mamba_chunk_scan_combined is omnimamba_kernels.mamba_chunk_scan_combined
    finally:
        undo()
    assert importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined == "its own"
    with pytest.raises(ImportError, match="needs a GPU"):
        importlib.import_module("causal_conv1d")


def test_too_late_is_an_error_and_changes_nothing(installed):
    importlib.import_module("mamba_ssm")
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match="mamba_ssm was imported before"):
        stand_in()
    assert sys.meta_path == before
