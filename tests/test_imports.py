"""Importing a package changes nothing and needs nothing optional."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("omnimamba_kernels", "omnimamba_model")
OPTIONAL = ("triton", "cupy", "pynvml", "sklearn", "matplotlib", "joblib", "transformers", "mamba_ssm", "causal_conv1d")

OBSERVE = """
import importlib, json, os, random, sys, threading, time, warnings
import numpy, torch

def state():
    return {
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "running": threading.active_count(),
        "default dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch seed": torch.initial_seed(),
        "torch random": torch.get_rng_state().sum().item(),
        "numpy random": int(numpy.random.get_state()[1].sum()),
        "random": hash(random.getstate()),
        "filters": len(warnings.filters),
        "path": list(sys.path),
        "cuda started": torch.cuda.is_initialized(),
    }

before, already = state(), set(sys.modules)
start = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - start
after = state()
loaded = sorted({name.split(".")[0] for name in set(sys.modules) - already})
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "seconds": seconds, "loaded": loaded}))
"""

WITHOUT_OPTIONAL = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
importlib.import_module(sys.argv[1])
"""

CAPTURE = """
import contextlib, sys, torch
from omnimamba_kernels import CannotCapture, capture, rmsnorm_fn

with contextlib.suppress(CannotCapture):
    capture(lambda x: rmsnorm_fn(x, torch.ones(8), None), torch.ones(2, 8))
print("torch._dynamo" in sys.modules)
"""


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("package", PACKAGES)
def test_import_has_no_effect(package):
    shown = python(OBSERVE, package)
    seen = json.loads(shown.stdout)
    assert seen["changed"] == []
    assert not set(seen["loaded"]) & {"triton", "sklearn", "matplotlib", "transformers", "cupy"}
    assert shown.stderr == ""


def test_import_after_torch_is_quick():
    """Whatever else the machine does: the fastest of three counts, and one below a second is enough."""
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 1.0:
        seconds.append(json.loads(python(OBSERVE, "omnimamba_kernels").stdout)["seconds"])
    assert min(seconds) < 1.0, f"importing omnimamba_kernels took {min(seconds):.2f} s beyond torch's own import"


def test_recording_a_step_does_not_bring_in_torchs_compiler():
    assert python(CAPTURE).stdout == "False\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_without_optional_packages(package):
    python(WITHOUT_OPTIONAL, package, ",".join(OPTIONAL))
