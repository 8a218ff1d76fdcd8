"""The CUDA kernels without nvcc: compiled by NVRTC when they are first started, kept on disk, started by the driver."""

import json
import os
import pwd
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import emulated
import pytest

from omnimamba_kernels import nvrtc

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80")
NORM = "gated_norm/cuda.cu", "omnimamba::gated_norm_forward_kernel<float, omnimamba::Gate::NONE, 4>"


def path_of_module():
    (path,) = (emulated.build() / "on_demand").glob("_native_cuda*.so")
    return path


LOAD = """
import importlib.machinery, importlib.util, json, sys
import torch
loader = importlib.machinery.ExtensionFileLoader("_native_cuda", sys.argv[1])
spec = importlib.util.spec_from_file_location("_native_cuda", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
"""


def told_by(code, folder, **environment):
    """What Python code says, as JSON, of the module."""
    command = [sys.executable, "-c", LOAD + code, str(path_of_module())]
    given = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def instances():
    """(source, expression) of every kernel that the module may start."""
    return told_by("print(json.dumps(module.instances))", ROOT)


def first_of_each_kernel(source):
    """One instance of each kernel of a source."""
    kernels = {}
    for where, expression in instances():
        if where == source:
            kernels.setdefault(expression.partition("<")[0], expression)
    return list(kernels.values())


SOURCES = sorted(str(path.relative_to(ROOT / "csrc")) for path in ROOT.glob("csrc/*/cuda*.cu"))


def test_every_source_with_kernels_has_instances():
    for source in SOURCES:
        defined = set(re.findall(r"\b(\w+_kernel)\(const __grid_constant__", (ROOT / "csrc" / source).read_text()))
        started = {expression.partition("<")[0].rpartition("::")[2] for _, expression in instances()}
        assert defined <= started, source


@needs_nvrtc
@pytest.mark.parametrize(
    "source, target",
    [(source, target) for source in SOURCES for target in TARGETS if target == "sm_90a" or "/cuda_sm90" not in source],
)
def test_every_kernel_compiles_for_every_chip(source, target):
    expressions = first_of_each_kernel(source)
    if not expressions:
        pytest.skip("there is no kernel in it")
    code, names = nvrtc.compile_kernels(source, expressions, target)
    assert code.startswith(b"\x7fELF" if target.startswith("sm_") else b"//")
    for expression in expressions:
        assert names[expression].encode() in code
        assert expression.partition("<")[0].rpartition(":")[2] in names[expression]


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path / "cache")
    code, name = nvrtc.kernel(*NORM, (9, 0))
    assert code.startswith(b"\x7fELF") and name.encode() in code
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_kernels", lambda *_: pytest.fail("compiled again"))
        assert nvrtc.kernel(*NORM, (9, 0)) == (code, name)
    assert nvrtc.kernel(*NORM, (8, 0))[0] != code
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(nvrtc, "_sources_hash", lambda: "changed")
    nvrtc.kernel(*NORM, (9, 0))
    assert len(list((tmp_path / "cache").iterdir())) == 3


@needs_nvrtc
def test_a_kept_file_that_is_not_whole_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    code = nvrtc.kernel(*NORM, (9, 0))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole.split(b"\n")[0] + b"\n", b"", whole[:-9] + bytes(9)):
        file.write_bytes(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(nvrtc, "compile_kernels", lambda *_: (code[0], {NORM[1]: code[1]}))
            assert nvrtc.kernel(*NORM, (9, 0)) == code
        assert file.read_bytes() == whole


@needs_nvrtc
def test_a_disk_that_takes_nothing_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path / "cache")
    assert nvrtc.kernel(*NORM, (9, 0))[0].startswith(b"\x7fELF")


@needs_nvrtc
def test_a_disk_that_is_full_keeps_nothing_of_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    monkeypatch.setattr(nvrtc.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert nvrtc.kernel(*NORM, (9, 0))[0].startswith(b"\x7fELF") and not list(tmp_path.iterdir())


@needs_nvrtc
def test_a_user_without_a_home_compiles_anew(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    assert nvrtc._cache() is None
    monkeypatch.setattr(nvrtc, "CACHE", nvrtc._cache())
    assert nvrtc.kernel(*NORM, (9, 0))[0].startswith(b"\x7fELF")


@needs_nvrtc
def test_chips_that_nvrtc_does_not_know_get_the_code_of_earlier_ones(monkeypatch):
    assert nvrtc.target((9, 0)) == "sm_90a" and nvrtc.target((8, 6)) == "sm_86"
    assert nvrtc.target((99, 9)) == f"compute_{nvrtc.architectures()[-1]}"
    with pytest.raises(RuntimeError, match="no code for compute capability 2.0"):
        nvrtc.target((2, 0))


@needs_nvrtc
def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"NVRTC: CompileProgram: [\s\S]*no_such_kernel"):
        nvrtc.compile_kernels(NORM[0], ["omnimamba::no_such_kernel<float>"], "sm_80")


def test_without_nvrtc_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name, **_: (_ for _ in ()).throw(OSError(name)))
    assert "pip install 'omnimamba[nvrtc]'" in nvrtc._library.__wrapped__()


LAUNCH = """
asked, answer = [], ["image", "name"]
def compile(source, expression):
    asked.append([source, expression])
    return tuple(answer)
module.compile_with(compile, lambda: 3)
def norm(x):
    sizes = dict(outer=x.shape[0], inner=1, width=64, group_size=64)
    module.kernels["gated_norm_forward"](x=x, y=x, weight=torch.ones(64), eps=1e-5, stream=4660, **sizes)
errors, x = [], torch.ones(5, 1, 64)
for rows, name in ((5, "name"), (5, "name"), (77 * 4, "name")):
    try:
        norm(x if rows == 5 else torch.ones(rows, 1, 64))
    except RuntimeError as error:
        errors.append(str(error))
answer[1] = "unknown"
try:
    norm(x.half())
except RuntimeError as error:
    errors.append(str(error))
print(json.dumps({"device": module.why_no_device(), "asked": asked, "errors": errors, "x": x.data_ptr()}))
"""


def build_driver(folder):
    driver = ROOT / "tests" / "on_demand" / "driver.cpp"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", driver], check=True)


def test_kernels_are_compiled_on_demand_and_started_by_the_driver(tmp_path):
    """With a driver of our own in place of NVIDIA's."""
    build_driver(tmp_path)
    told = told_by(LAUNCH, tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    half = NORM[1].replace("float", "omnimamba::f16").replace("4", "8")
    assert told["device"] == ""
    assert told["asked"] == [list(NORM), [NORM[0], half]], "each kernel is compiled when it is first started"
    refusal = f"CUDA: launch of {NORM[1]}, 77 x 1 x 1 blocks of 128 threads and 0 bytes of shared memory: no such thing"
    assert told["errors"] == [refusal, f"CUDA: {half}: no such thing"]
    launch = f"launch 2 1 1, 128 1 1, shared 0, stream 4660, attributes 0, mode 0, x {told['x']}"
    *lines, refused, load, find = (tmp_path / "calls").read_text().splitlines()
    assert lines == ["retain 3", "load image, mode 2", "find name", launch, launch]
    assert refused.startswith("launch 77 1 1, ") and [load, find] == ["load image, mode 2", "find unknown"]


THREADS = """
import threading
devices, errors = [5, 6, 6, 7], []
module.compile_with(lambda source, expression: ("image", "name"), lambda: devices.pop(0))
def norm():
    x = torch.ones(5, 1, 64)
    sizes = dict(outer=5, inner=1, width=64, group_size=64)
    module.kernels["gated_norm_forward"](x=x, y=x, weight=torch.ones(64), eps=1e-5, **sizes)
def product():  # which asks for the chip first
    x = torch.ones(8, 8)
    module.kernels["lora_matmul"](a=x, b=x, c=x, m=8, n=8, k=8)
def tried(*calls):
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        errors.append(str(error))
for calls in ((norm,), (norm, norm), (norm,), (product,)):
    thread = threading.Thread(target=tried, args=calls)
    thread.start()
    thread.join()
print(json.dumps(errors))
"""


def test_a_thread_that_has_no_context_gets_that_of_its_device(tmp_path):
    """As the first backward of a process runs, in a thread of autograd's."""
    build_driver(tmp_path)
    assert told_by(THREADS, tmp_path, LD_LIBRARY_PATH=str(tmp_path)) == []
    calls = [line.partition(" ")[::2] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [name for name, _ in calls] == [
        "retain", "load", "find", "launch", "retain", "load", "find", "launch", "launch", "retain", "launch",
        "retain", "load", "find", "launch",
    ]  # fmt: skip
    assert [which for name, which in calls if name == "retain"] == ["5", "6", "6", "7"]


def test_without_a_driver_the_module_says_so():
    reason = told_by("print(json.dumps(module.why_no_device()))", ROOT)
    assert reason in ("", "the NVIDIA driver's libcuda.so.1 was not found")
