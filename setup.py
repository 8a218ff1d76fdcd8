"""Builds omnimamba: plain Python and, where a C++17 compiler is at hand, the native modules of CMakeLists.txt.

Read at build time only: OMNIMAMBA_CUDA (auto, on, off) and OMNIMAMBA_CUDA_ARCHS (e.g. "80;90a;120", or "all" of
CUDA_ARCHS; without it an installation has machine code for all, a build in the checkout for the chips at hand).
Whatever happens is recorded in omnimamba_kernels/_build_info.py, which `omnimamba info` shows.
"""

import json
import os
import pprint
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

ROOT = Path(__file__).resolve().parent
PACKAGE = "omnimamba_kernels"
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")  # chips with machine code of their own
DEVELOPERS_CHIP = "90"  # compiled for in a checkout on a machine without a GPU
SEE_LOG = "reinstall with pip's -v to see the compiler's messages"


class CannotBuild(Exception):
    """The native modules cannot be built here; the message says why and what to do."""


class DidNotCompile(CannotBuild):
    """All that a build needs is at hand, and the sources are at fault, or what compiles them."""


class NativeBuild(build_ext):
    """`build_ext` through CMake and Ninja. Without `--strict` a failure leaves a package that runs on the reference."""

    user_options = build_ext.user_options + [
        ("strict", None, "fail when the native modules cannot be built"),
        ("sanitize=", None, "sanitizers to compile in, comma separated, e.g. address,undefined"),
    ]
    boolean_options = build_ext.boolean_options + ["strict"]

    def initialize_options(self):
        super().initialize_options()
        self.strict = False
        self.sanitize = ""

    def run(self):
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        info = {"reason": None, "compiler": None, "openmp": None, "flags": {}, "cuda": cuda_slot(in_place)}
        try:
            kind = "sanitize" if self.sanitize else "native" if in_place else None
            with build_folder(kind) as folder:
                info.update(run_cmake(folder, target, self.sanitize))
        except CannotBuild as problem:
            if self.strict:
                raise CompileError(str(problem)) from None
            info["reason"] = str(problem)
            self.warn(f"installing without native kernels: {problem}")
        if info["cuda"]["reason"] is None:
            self.build_cuda(target, info, in_place)
        remove_modules(target, kept=[*info["flags"], *([] if info["cuda"]["reason"] else ["cuda"])])
        write_build_info(target / "_build_info.py", info)

    def build_cuda(self, target, info, in_place):
        """The CUDA kernels. Failing leaves the others, unless they were asked for or a strict build cannot compile."""
        cuda = info["cuda"]
        try:
            if info["reason"] is not None or self.sanitize:
                raise CannotBuild(info["reason"] or "CUDA kernels are not built with sanitizers")
            part = "on_demand" if cuda["on_demand"] else "cuda"
            with build_folder(part if in_place else None) as folder:
                cuda.update(run_cmake(folder, target, "", part=part, architectures=cuda["architectures"]))
            if cuda["on_demand"] and not in_place:
                copy_sources(target / "_csrc")
        except CannotBuild as problem:
            if cuda["wanted"] == "on":
                raise CompileError(f"OMNIMAMBA_CUDA=on, but {problem}") from None
            if self.strict and isinstance(problem, DidNotCompile):
                raise CompileError(str(problem)) from None
            cuda.update(reason=str(problem), architectures=[], on_demand=False)
            self.warn(f"installing without CUDA kernels: {problem}")

    def get_outputs(self):
        target = Path(self.build_lib) / PACKAGE
        sources = (path for path in (target / "_csrc").rglob("*") if path.is_file())
        return [str(path) for path in [*native_modules(target), target / "_build_info.py", *sources]]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class EmulatorBuild(Command):
    """`build_emulator`: the CUDA kernels compiled for the CPU, into build/, for the tests alone."""

    user_options = [("sanitize=", None, "sanitizers to compile in, comma separated, e.g. address")]

    def initialize_options(self):
        self.sanitize = ""

    def finalize_options(self):
        pass

    def run(self):
        kind = "emulator-sanitized" if self.sanitize else "emulator"
        with build_folder(kind) as folder:
            try:
                run_cmake(folder, folder / "modules", self.sanitize, part="emulator")
            except CannotBuild as problem:
                raise CompileError(str(problem)) from None


def native_modules(folder):
    """Every compiled module of this Python in `folder`."""
    return sorted(folder.glob("_native_*" + sysconfig.get_config_var("EXT_SUFFIX")))


def remove_modules(folder, kept):
    """Delete the modules that an earlier build left for instruction sets outside `kept`."""
    for path in native_modules(folder):
        if path.name.split(".")[0].removeprefix("_native_") not in kept:
            path.unlink()


def copy_sources(folder):
    """What NVRTC compiles when a kernel is first started."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu") and path.parent.name != "host_gpu":
            copy = folder / path.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


@contextmanager
def build_folder(kind):
    """A developer's builds are incremental and keep their folder, build/<kind>; an installation starts from nothing."""
    if kind is None:
        with tempfile.TemporaryDirectory(prefix="omnimamba-") as name:
            yield Path(name)
        return
    folder = ROOT / "build" / kind / sys.implementation.cache_tag
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        cache = folder / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(folder)  # the checkout was moved or copied
            folder.mkdir()
        yield folder


@contextmanager
def alone_in(folder):
    """Within the block no other build uses the folder: pip and `make` may compile side by side."""
    with open(f"{folder}.lock", "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_cmake(folder, target, sanitize, part="native", architectures=()):
    """Configure and build in `folder`, leave the modules in `target`, return what CMake says it built."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        missing = "cmake" if cmake is None else "ninja"
        raise CannotBuild(f"{missing} was not found: pip install {missing} and reinstall")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_folder()}",
        f"-DOMNIMAMBA_OUTPUT={target}",
        f"-DOMNIMAMBA_SANITIZE={sanitize}",
        f"-DOMNIMAMBA_PART={part}",
        f"-DOMNIMAMBA_CUDA_ARCHS={';'.join(architectures)}",
    ]  # fmt: skip
    if subprocess.run(configure, check=False).returncode != 0:
        reason = folder / "reason.txt"
        if reason.exists():
            raise CannotBuild(reason.read_text())
        raise CannotBuild(f"CMake could not configure the {part} kernels: {SEE_LOG}")
    if subprocess.run([cmake, "--build", str(folder)], check=False).returncode != 0:
        raise DidNotCompile(f"the {part} kernels did not compile: {SEE_LOG}")
    return json.loads((folder / "built.json").read_text())


def tool(name):
    """The path of a command: beside this Python, from its package, or on PATH; None if there is none."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


def pybind11_folder():
    """The folder with pybind11's CMake files."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 was not found: pip install pybind11 and reinstall") from None
    return pybind11.get_cmake_dir()


def cuda_slot(in_place):
    """Whether the CUDA kernels are to be built, and if not, why.

    Without nvcc it is NVRTC that compiles them, on demand: where NVIDIA's driver is, or where they are asked for.
    """
    wanted = os.environ.get("OMNIMAMBA_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise OptionError(f"OMNIMAMBA_CUDA is {wanted!r}; expected auto, on or off")
    on_demand = shutil.which("nvcc") is None
    if wanted == "off":
        reason = "CUDA was switched off when omnimamba was installed (OMNIMAMBA_CUDA=off)"
    elif not list(ROOT.glob("csrc/*/cuda*.cu")):
        reason = "this release of omnimamba contains no CUDA kernels"
    elif on_demand and wanted == "auto" and not has_driver():
        reason = "nvcc was not found when omnimamba was installed: install the CUDA toolkit and reinstall"
    else:
        reason = None
    if wanted == "on" and reason is not None:
        raise OptionError(f"OMNIMAMBA_CUDA=on, but {reason}")
    built = [] if reason or on_demand else architectures(in_place)
    return {"wanted": wanted, "reason": reason, "architectures": built, "on_demand": on_demand and reason is None}


def has_driver():
    """Whether NVIDIA's driver is on this machine."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def architectures(in_place):
    """Those that OMNIMAMBA_CUDA_ARCHS names; else, of CUDA_ARCHS that this nvcc knows, those at hand or all."""
    given = [arch for arch in os.environ.get("OMNIMAMBA_CUDA_ARCHS", "").split(";") if arch]
    if given and given != ["all"]:
        if not all(re.fullmatch(r"\d{2,3}a?", arch) for arch in given):
            raise OptionError(f"OMNIMAMBA_CUDA_ARCHS is {';'.join(given)!r}; expected all, or chips such as 80;90a;120")
        return given
    code = run_quietly("nvcc", "--list-gpu-code").split()
    known = [arch for arch in CUDA_ARCHS if not code or f"sm_{arch.rstrip('a')}" in code]
    present = run_quietly("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    present = {capability.replace(".", "") for capability in present} or {DEVELOPERS_CHIP}
    at_hand = [arch for arch in known if arch.rstrip("a") in present]
    return at_hand if in_place and at_hand and not given else known


def run_quietly(*command):
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_build_info(path, info):
    """Record the build as a Python module with one dictionary."""
    content = pprint.pformat(info, width=100, sort_dicts=False)
    text = f'"""How the native kernels were built; written by setup.py."""\n\nINFO = {content}\n'
    path.write_text(text)


COMMANDS = {"build_ext": NativeBuild, "build_emulator": EmulatorBuild}
setup(ext_modules=[Extension(f"{PACKAGE}._native", sources=[])], cmdclass=COMMANDS)
