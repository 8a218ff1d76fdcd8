"""What nvcc made of the CUDA kernels in this checkout's own build, and what a machine without a GPU says of them."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from omnimamba_kernels import backends, cuda, native

ROOT = Path(__file__).resolve().parents[1]
LOGS = sorted((ROOT / "build" / "cuda" / sys.implementation.cache_tag).rglob("*.cu.o.txt"))
CUDA = native.build_info().get("cuda", {})
built = pytest.mark.skipif(
    importlib.util.find_spec("omnimamba_kernels._native_cuda") is None, reason=str(CUDA.get("reason"))
)


def kernels(log):
    """(kernel, chip, what ptxas says of it) for each kernel in a log of -Xptxas -v."""
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", log.read_text())
    return list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))


@built
def test_every_kernel_source_was_compiled_for_every_chip():
    sources = {path.name + ".o.txt" for path in ROOT.glob("csrc/*/cuda*.cu")}
    assert sources <= {log.name for log in LOGS}
    chips = {chip for log in LOGS for _, chip, _ in kernels(log)}
    assert chips == {f"sm_{arch}" for arch in CUDA["architectures"]}


@built
@pytest.mark.parametrize("log", LOGS, ids=lambda log: "/".join(log.parts[-2:]))
def test_no_kernel_spills(log):
    for kernel, chip, said in kernels(log):
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert spilled and spilled.groups() == ("0", "0"), f"{kernel} on {chip}: {said.strip()}"


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_loads_without_a_gpu_and_says_why_it_cannot_run():
    module = importlib.import_module("omnimamba_kernels._native_cuda")
    assert module.why_no_device()
    assert "sees no CUDA GPU" in backends()["cuda"]


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_is_an_error():
    module = importlib.import_module("omnimamba_kernels._native_cuda")
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="CUDA: launch: "):
        module.kernels["gated_norm_forward"](
            x=x, y=x, weight=x[0], outer=1, inner=2, width=8, group_size=8, eps=1e-5, norm_before_gate=True
        )


@pytest.mark.parametrize(
    "capability, architectures, refused",
    [
        ((8, 0), "80 86 89 90a 100 120", None),
        ((8, 7), "80 86 89 90a 100 120", None),
        ((9, 0), "90a", None),
        ((10, 3), "80 86 89 90a 100 120", None),
        ((11, 0), "80 90a", None),  # through the PTX of 80
        ((7, 5), "80 90a", "has compute capability 7.5; 8.0 is needed"),
        ((8, 6), "90a", "compiled for compute capabilities 90a, this is 8.6"),
        ((10, 0), "90a", "compiled for compute capabilities 90a, this is 10.0"),
        ((8, 0), "86", "compiled for compute capabilities 86, this is 8.0"),
    ],
)
def test_a_chip_without_code_is_refused_with_the_reason(capability, architectures, refused):
    reason = cuda.no_code_for(capability, architectures.split())
    assert (reason is None) if refused is None else refused in reason
