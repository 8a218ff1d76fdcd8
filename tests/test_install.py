"""The package installs everywhere: without a compiler it runs on the reference and says why."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "MANIFEST.in")
FOLDERS = ("csrc", "omnimamba_kernels", "omnimamba_model")

RUN_CONV = """
import torch, omnimamba_kernels as ok
from omnimamba_kernels import native
y = ok.causal_conv1d_fn(torch.ones(1, 2, 5), torch.ones(2, 4))
print(native.why_not(), "|", y[0, 0].tolist())
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources alone, as a newcomer's checkout has them."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run on an installed package without its sources")
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMNIMAMBA_CUDA": "off", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def build_info(package):
    scope = {}
    exec((package / "_build_info.py").read_text(), scope)
    return scope["INFO"]


def test_installs_without_a_compiler_and_says_so(checkout, tmp_path):
    target = tmp_path / "site"
    missing = str(tmp_path / "no-compiler")
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target), ".")
    installed = run(*pip, cwd=checkout, CC=missing, CXX=missing)
    assert installed.returncode == 0, installed.stderr
    assert not list(target.glob("omnimamba_kernels/_native_*"))
    assert build_info(target / "omnimamba_kernels")["flags"] == {}

    # -S: an editable installation would lend its own compiled modules.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    used = run("-S", "-c", RUN_CONV, cwd=tmp_path, PYTHONPATH=path)
    assert used.returncode == 0, used.stderr
    reason, values = used.stdout.strip().split(" | ")
    assert reason.startswith("no C++17 compiler was found")
    assert "install g++ or clang++" in reason
    assert values == "[1.0, 2.0, 3.0, 4.0, 4.0]"


def test_sources_that_do_not_compile_leave_the_reference(checkout, tmp_path):
    (checkout / "csrc" / "bindings.cpp").write_text("#error this compiler is too strange\n")
    for source in checkout.glob("csrc/*/cpu*.cpp"):
        source.unlink()
    built = run("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), cwd=checkout)
    assert built.returncode == 0, built.stderr
    info = build_info(tmp_path / "lib" / "omnimamba_kernels")
    assert info["flags"] == {}
    assert "did not compile" in info["reason"]


def test_strict_build_fails_without_a_compiler(checkout, tmp_path):
    missing = str(tmp_path / "no-compiler")
    built = run("setup.py", "-q", "build_ext", "--inplace", "--strict", cwd=checkout, CC=missing, CXX=missing)
    assert built.returncode != 0
    assert "no C++17 compiler was found" in built.stderr


def test_cuda_on_without_kernels_is_refused_with_the_reason(checkout):
    for kernel in checkout.glob("csrc/*/cuda*.cu"):
        kernel.unlink()
    built = run("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, OMNIMAMBA_CUDA="on")
    assert built.returncode != 0
    assert "OMNIMAMBA_CUDA=on, but this release of omnimamba contains no CUDA kernels" in built.stderr


def broken_nvcc(checkout, tmp_path):
    """A PATH whose nvcc fails, and a checkout whose native module is quickly built."""
    for name in ("bindings", "module"):
        (checkout / "csrc" / f"{name}.cpp").write_text(f"int no_{name};\n")
    for source in checkout.glob("csrc/*/cpu*.cpp"):
        source.unlink()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return os.pathsep.join([str(nvcc.parent), os.environ["PATH"]])


def test_an_nvcc_that_does_not_work_leaves_the_native_kernels(checkout, tmp_path):
    path = broken_nvcc(checkout, tmp_path)
    built = run("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), cwd=checkout, PATH=path,
                CUDACXX=str(tmp_path / "bin" / "nvcc"), OMNIMAMBA_CUDA="auto")  # fmt: skip
    assert built.returncode == 0, built.stderr
    info = build_info(tmp_path / "lib" / "omnimamba_kernels")
    assert info["reason"] is None and info["flags"]
    assert "nvcc does not work with" in info["cuda"]["reason"] and info["cuda"]["architectures"] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_a_strict_build_fails_where_a_cuda_kernel_does_not_compile(checkout, tmp_path):
    broken_nvcc(checkout, tmp_path)
    for source in checkout.glob("csrc/*/*.cu"):
        source.unlink()
    (checkout / "csrc" / "gated_norm" / "cuda.cu").write_text("#error this kernel is too strange\n")
    build = ("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"))
    built = run(*build, "--strict", cwd=checkout, OMNIMAMBA_CUDA="auto", OMNIMAMBA_CUDA_ARCHS="90a")
    assert built.returncode != 0 and "the cuda kernels did not compile" in built.stderr
    built = run(*build, cwd=checkout, OMNIMAMBA_CUDA="auto", OMNIMAMBA_CUDA_ARCHS="90a")
    assert built.returncode == 0, built.stderr
    assert "did not compile" in build_info(tmp_path / "lib" / "omnimamba_kernels")["cuda"]["reason"]


def without_nvcc(checkout, tmp_path, cuda):
    """What a build says of CUDA on a PATH with a compiler alone, and the folder that it filled."""
    broken_nvcc(checkout, tmp_path)
    found = {tool: shutil.which(tool) for tool in ("sh", "c++", "g++", "ld", "as", "ar", "ranlib")}
    alone = tmp_path / "alone"
    alone.mkdir()
    for tool, path in found.items():
        if path:
            (alone / tool).symlink_to(path)
    built = run("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), cwd=checkout, PATH=str(alone),
                OMNIMAMBA_CUDA=cuda)  # fmt: skip
    assert built.returncode == 0, built.stderr
    folder = tmp_path / "lib" / "omnimamba_kernels"
    return build_info(folder)["cuda"], folder


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="NVIDIA's driver is here")
def test_without_nvcc_the_build_says_so(checkout, tmp_path):
    cuda, folder = without_nvcc(checkout, tmp_path, "auto")
    assert cuda["reason"].startswith("nvcc was not found") and not cuda["on_demand"]
    assert not (folder / "_csrc").exists()


def test_without_nvcc_the_kernels_are_left_to_nvrtc_where_they_are_asked_for(checkout, tmp_path):
    """Of one operation: the emulator's build, without which tests/test_nvrtc.py fails, compiles all of them so."""
    for source in checkout.glob("csrc/*/cuda*.cu"):
        if source.parent.name not in ("common", "gated_norm"):
            source.unlink()
    cuda, folder = without_nvcc(checkout, tmp_path, "on")
    assert cuda == {"wanted": "on", "reason": None, "architectures": [], "on_demand": True}
    assert list(folder.glob("_native_cuda*"))
    for name in ("gated_norm/cuda.cu", "gated_norm/gate.h", "common/launch.h", "common/memory.cuh"):
        assert (folder / "_csrc" / name).read_text() == (checkout / "csrc" / name).read_text()


@pytest.mark.parametrize(
    "given, in_place, wanted",
    [("", True, ["90a"]), ("", False, ["80", "90a", "120"]), ("all", True, ["80", "90a", "120"]), ("75", True, ["75"])],
)
def test_the_chips_of_a_build(given, in_place, wanted, tmp_path, monkeypatch):
    assert chips_of_a_build(given, in_place, tmp_path, monkeypatch) == wanted


@pytest.mark.parametrize("given", ["8.6", "sm_90a", "80,90a", "all;90a", "native"])
def test_what_names_no_chip_is_refused(given, tmp_path, monkeypatch):
    """nvcc would compile for minutes, and an installation then go on without CUDA kernels."""
    with pytest.raises(OptionError, match=f"OMNIMAMBA_CUDA_ARCHS is '{given}'; expected all, or chips such as"):
        chips_of_a_build(given, True, tmp_path, monkeypatch)


def chips_of_a_build(given, in_place, tmp_path, monkeypatch):
    """With an nvcc that knows three of the release's chips, and no GPU."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_120\n")
    nvcc.chmod(0o755)
    (tmp_path / "nvidia-smi").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMNIMAMBA_CUDA_ARCHS", given)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    scope = {"__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text(), scope)
    return scope["architectures"](in_place)


def test_unknown_cuda_setting_is_refused(checkout):
    built = run("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, OMNIMAMBA_CUDA="maybe")
    assert built.returncode != 0
    assert "'maybe'; expected auto, on or off" in built.stderr


def test_info_prints_json_with_every_section():
    shown = run("-c", "from omnimamba_model.cli import main; main()", "info", "--json", cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    info = json.loads(shown.stdout)
    assert set(info) == {"versions", "processor", "gpu", "instruction_sets", "backends", "build"}
    assert info["versions"]["torch"]
    assert info["backends"]["reference"] is None
    sets = info["instruction_sets"]
    assert sets["chosen"] is None or sets["reasons"][sets["chosen"]] is None
    assert info["backends"]["native"] is None or sets["chosen"] is None


def test_info_as_text_names_every_backend_and_its_state():
    from omnimamba_kernels import info

    collected = info.collect()
    lines = info.as_text(collected).splitlines()
    for name, reason in collected["backends"].items():
        assert any(line.split(maxsplit=1) == [name, reason or "ready"] for line in lines)
