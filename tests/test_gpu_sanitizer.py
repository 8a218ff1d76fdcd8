"""The GPU check's look at the CUDA kernels with compute-sanitizer, and that it leaves the emulator out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import gpu_check  # noqa: E402

SANITIZER = """#!/bin/sh
echo "$*" > {folder}/asked
echo "========= COMPUTE-SANITIZER"
shift 3
"$@"
{end}
"""
CLEAN, DIRTY = "echo '========= ERROR SUMMARY: 0 errors'", "echo '========= ERROR SUMMARY: 2 errors'; exit 86"


@pytest.mark.parametrize(
    "end, found, told", [(CLEAN, "ok", "0 errors"), (DIRTY, "failed", "2 errors; see racecheck.log")]
)
def test_the_kernels_are_run_under_compute_sanitizer(tmp_path, monkeypatch, end, found, told):
    """With a program of our own in its place, and one test that fits the name."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(folder=tmp_path, end=end))
    program.chmod(0o755)
    test = tmp_path / "test_small.py"
    test.write_text(
        "import os\n"
        "def test_matches_cuda(): assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\n"
        "def test_matches_triton(): assert False\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_check, "backends", lambda: {"cuda": None})
    part = gpu_check.run_sanitizer("racecheck", tmp_path, 60.0, str(test))
    assert (part.name, part.status) == ("compute-sanitizer, racecheck", found)
    assert part.detail.startswith(f"1 passed, 0 failed, 0 skipped; {told}")
    assert (tmp_path / "asked").read_text().startswith("--tool=racecheck --error-exitcode=86 ")
    monkeypatch.setattr(gpu_check, "backends", lambda: {"cuda": "no GPU"})
    assert vars(gpu_check.run_sanitizer("memcheck", tmp_path, 60.0)) == vars(
        gpu_check.Part("compute-sanitizer, memcheck", "skipped", detail="no GPU")
    )


@pytest.mark.parametrize(
    "said, found",
    [("", "stopped"), ("========= Invalid __global__ read of size 4 bytes\n", "failed"), ("F [100%]\n", "failed")],
)
def test_a_sanitizer_that_is_stopped_has_found_what_it_has(tmp_path, monkeypatch, said, found):
    def child(command, seconds, log, *_, **__):
        log.write_text(f"========= COMPUTE-SANITIZER\n..s [ 50%]\n{said}")

    monkeypatch.setattr(gpu_check, "child", child)
    monkeypatch.setattr(gpu_check, "backends", lambda: {"cuda": None})
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: "compute-sanitizer")
    part = gpu_check.run_sanitizer("memcheck", tmp_path, 1.0)
    assert part.status == found and part.detail.startswith("2 passed") and "stopped after" in part.detail


def test_beside_a_gpu_no_kernel_runs_on_the_emulator():
    collect = "import sys, common; sys.exit('cuda-emulated' in common.runs('gated_norm'))"
    for environment, status in ((gpu_check.NO_EMULATOR, 0), ({}, int(emulated.why_not() is None))):
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "kernels")))
        done = subprocess.run([sys.executable, "-c", collect], env={**os.environ, "PYTHONPATH": path, **environment})
        assert done.returncode == status
