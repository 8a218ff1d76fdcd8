"""What nvcc made of the CUDA kernels in this checkout's own build, and what a machine without a GPU says of them."""

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from omnimamba_kernels import backends, cuda, native
from omnimamba_kernels.backends import OPS
from omnimamba_kernels.report import cuda as report

ROOT = Path(__file__).resolve().parents[1]
LOGS = sorted((ROOT / "build" / "cuda" / sys.implementation.cache_tag).rglob("*.cu.o.txt"))
CUDA = native.build_info().get("cuda", {})
built = pytest.mark.skipif(
    importlib.util.find_spec("omnimamba_kernels._native_cuda") is None, reason=str(CUDA.get("reason"))
)


named = cache(lambda log: report.of_object(log, disassembled=False))


@built
def test_every_kernel_source_was_compiled_for_every_chip_and_hoppers_own_for_hopper():
    sources = {path.relative_to(ROOT / "csrc") for path in ROOT.glob("csrc/*/cuda*.cu")}
    built = {Path(*log.parts[-2:]).with_name(log.name.removesuffix(".o.txt")): named(log) for log in LOGS}
    for source in sources:
        for_hopper = source.name.startswith("cuda_sm90")
        wanted = {f"sm_{arch}" for arch in CUDA["architectures"] if arch == "90a" or not for_hopper}
        assert (source in built) == bool(wanted), source
        assert {kernel.chip for kernel in built.get(source, [])} in (wanted, set()), source
    assert any(built.values())


@built
@pytest.mark.parametrize("log", LOGS, ids=lambda log: "/".join(log.parts[-2:]))
def test_no_kernel_breaks_a_rule_of_the_report(log):
    """And each kernel with products is named in MATRIX: one that lost its matrix instructions would not go unseen."""
    rows = report.of_object(log)
    broken = {f"{kernel.name} on {kernel.chip}": report.faults(kernel) for kernel in rows}
    assert not {name: faults for name, faults in broken.items() if faults}
    assert all(kernel.must_use() or not kernel.instructions(("HMMA", "HGMMA")) for kernel in rows)


@built
def test_kernels_that_must_use_the_matrix_units_exist():
    found = {(kernel.op, kernel.name.partition("<")[0]) for log in LOGS for kernel in named(log)}
    for op in OPS:
        for_hopper = "".join(path.read_text() for path in ROOT.glob(f"csrc/{op}/cuda_sm90*.cu"))
        missing = {name for name in report._declared(op) if (op, name) not in found}
        assert not missing or ("90a" not in CUDA["architectures"] and all(f"{name}(" in for_hopper for name in missing))
    assert report._declared("ssd_scan") and report._declared("lora_linear")


def compiled(source, folder, chip, *options):
    """The report's rows of a source that nvcc compiles now."""
    target = folder / "small" / f"{source.name}.o"
    target.parent.mkdir(exist_ok=True)
    code = f"arch=compute_{chip},code=sm_{chip}"
    command = ["nvcc", "-std=c++17", "-c", "-Xptxas=-v", "-gencode", code, *options, f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, "-o", target, source], capture_output=True, text=True, check=True)
    log = target.with_name(target.name + ".txt")
    log.write_text(done.stdout + done.stderr)
    return report.of_object(log)


@built
@pytest.mark.parametrize("name, chip, instruction", [("sm80", "80", "HMMA"), ("sm90", "90a", "HGMMA")])
def test_the_report_finds_matrix_instructions_and_misses_them(name, chip, instruction, tmp_path, monkeypatch):
    """In the small kernels that try the emulator: so what the vocabulary says in PTX is compiled, too."""
    monkeypatch.setattr(report, "_declared", lambda op: ("product_kernel", "scale_kernel", "share_kernel"))
    rows = compiled(ROOT / "tests" / "emulator" / f"trials_{name}.cu", tmp_path, chip)
    products = [kernel for kernel in rows if "product_kernel" in kernel.name]
    others = [kernel for kernel in rows if re.match("(scale|share)_kernel", kernel.name)]
    if report.disassembler() is None:
        pytest.skip("without cuobjdump and nvdisasm instructions are not counted")
    assert products and all(kernel.code[instruction] >= 4 for kernel in products)
    assert others and all(report.faults(k) == [f"multiplies matrices without {instruction}"] for k in others)
    # One fault of the trials is a product that is not waited for: the assembler must wait in its place.
    assert {kernel.name for kernel in rows if kernel.serialized} == ({"product_kernel<3>"} if name == "sm90" else set())
    assert not any(report.faults(kernel) for kernel in products if not kernel.serialized)


SPILLS = """
__global__ void spills_kernel(float* p) {
  float kept[64];
  for (int i = 0; i < 64; i++) kept[i] = p[i * blockDim.x + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; i++) p[(63 - i) * blockDim.x + threadIdx.x] = kept[i] * kept[i ^ 1];
}
"""


@built
def test_the_report_finds_spills(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    (kernel,) = compiled(source, tmp_path, "90a", "-maxrregcount=32")
    assert kernel.registers <= 32 and kernel.spilled > 0
    assert re.match(r"spills \d+ bytes a thread", report.faults(kernel)[0])
    assert kernel.code is None or kernel.code["STL"] > 0


def test_the_report_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no CUDA kernels were built in .*: run 'make native'"):
        report.kernels(tmp_path)
    row = report.Kernel("gated_norm", "cuda.cu", "k", "k", "sm_80", 40, 0, 0, 0, False)
    assert "unknown; cuobjdump and nvdisasm come with" in report.text([row])
    monkeypatch.setattr(report, "disassembler", lambda: None)
    assert report.machine_code(tmp_path) is None


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
    launch = r"CUDA: launch of gated_norm_forward_kernel<float, .*>, 1 x 1 x 1 blocks of 128 threads and 0 bytes of sha"
    with pytest.raises(RuntimeError, match=launch):
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
