"""Compiles the CUDA kernels with NVRTC, one when it is first started, and keeps them on disk: no nvcc is needed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path


def _cache() -> Path | None:
    """Where machine code is kept; None for a user without a home: an account that only a container knows."""
    try:
        return Path("~/.cache/omnimamba").expanduser()
    except RuntimeError:
        return None


CACHE = _cache()
_PACKAGE = Path(__file__).resolve().parent
_FORMAT = 2

# NVRTC has no standard library; the kernels need this much of it.
_HEADERS = {
    "cstdint": """
        typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
        typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
        typedef unsigned long uint64_t; typedef unsigned long uintptr_t;""",
    "cstring": "",
    "cmath": "",
    "initializer_list": "",  # built in
    "type_traits": """
        namespace std {
        template <class T, T v> struct integral_constant { static constexpr T value = v; };
        using true_type = integral_constant<bool, true>; using false_type = integral_constant<bool, false>;
        template <class A, class B> constexpr bool is_same_v = false;
        template <class A> constexpr bool is_same_v<A, A> = true;
        template <bool yes, class A, class B> struct conditional { using type = A; };
        template <class A, class B> struct conditional<false, A, B> { using type = B; };
        template <bool yes, class A, class B> using conditional_t = typename conditional<yes, A, B>::type;
        template <class T> struct remove_const { using type = T; };
        template <class T> struct remove_const<const T> { using type = T; };
        template <class T> using remove_const_t = typename remove_const<T>::type;
        }""",
}  # fmt: skip


def sources() -> Path | None:
    """The folder of the kernels' sources: installed with the package, or the checkout's own; None without either."""
    return next(
        (p for p in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc") if (p / "common" / "launch.h").exists()), None
    )


def why_not() -> str | None:
    """Why NVRTC cannot be used, or None."""
    if sources() is None:
        return "the sources of the CUDA kernels are not installed"
    return _library() if isinstance(_library(), str) else None


@cache
def _library() -> ctypes.CDLL | str:
    """NVRTC, as torch's or CuPy's own packages bring it, or the system's; or why there is none."""
    found = next(_candidates(), None)
    if found is not None:
        for part in sorted(found.parent.glob("libnvrtc-builtins.so*")):  # NVRTC opens it by name alone
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    for name in [str(found)] if found else ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        with contextlib.suppress(OSError):
            return _typed(ctypes.CDLL(name))
    return "neither nvcc nor NVRTC was found: pip install 'omnimamba[nvrtc]', or install the CUDA toolkit and reinstall"


def _candidates() -> Iterator[Path]:
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or ()) if package else ():
        found = Path(folder).glob("**/libnvrtc.so.*")
        yield from sorted((p for p in found if re.fullmatch(r"libnvrtc\.so\.\d+", p.name)), reverse=True)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


class _Program:
    """One compilation; what NVRTC says of an error becomes a RuntimeError."""

    def __init__(self, source: Path) -> None:
        self.library = _library()
        self.handle = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
        texts = (ctypes.c_char_p * len(_HEADERS))(*(f"#pragma once\n{text}\n".encode() for text in _HEADERS.values()))
        self.call("CreateProgram", source.read_bytes(), str(source).encode(), len(_HEADERS), texts, names, first=False)

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.nvrtcDestroyProgram(ctypes.byref(self.handle))

    def call(self, function: str, *arguments: object, first: bool = True) -> None:
        handle = self.handle if first else ctypes.byref(self.handle)
        status = getattr(self.library, f"nvrtc{function}")(handle, *arguments)
        if status:
            raise RuntimeError(f"NVRTC: {function}: {self.library.nvrtcGetErrorString(status).decode()}{self.log()}")

    def text(self, kind: str) -> bytes:
        """The log, or the code: CUBIN or PTX."""
        size = ctypes.c_size_t()
        self.call(f"Get{kind}Size", ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"Get{kind}", buffer)
        return buffer.raw

    def log(self) -> str:
        size = ctypes.c_size_t()
        if self.library.nvrtcGetProgramLogSize(self.handle, ctypes.byref(size)) or size.value <= 1:
            return ""
        return "\n" + self.text("ProgramLog").rstrip(b"\0").decode()

    def name(self, expression: str) -> str:
        name = ctypes.c_char_p()
        self.call("GetLoweredName", expression.encode(), ctypes.byref(name))
        return name.value.decode()


def architectures() -> list[int]:
    """Those that this NVRTC knows, such as 80 and 120, in ascending order."""
    library, count = _library(), ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(found)
    return sorted(found)


def target(capability: tuple[int, int]) -> str:
    """``--gpu-architecture`` for a chip: its own machine code where this NVRTC knows it, else PTX of an earlier one."""
    wanted, known = capability[0] * 10 + capability[1], architectures()
    if wanted in known:
        return f"sm_{wanted}a" if wanted == 90 else f"sm_{wanted}"
    earlier = [arch for arch in known if arch < wanted]
    if not earlier:
        raise RuntimeError(f"NVRTC: it has no code for compute capability {capability[0]}.{capability[1]}")
    return f"compute_{earlier[-1]}"


def compile_kernels(source: str, expressions: Iterable[str], architecture: str) -> tuple[bytes, dict[str, str]]:
    """Machine code (PTX for compute_*) of instances of kernels of csrc/``source``, and what each is called in it."""
    folder, expressions = sources(), list(expressions)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", f"-I{folder}"]
    options.append(f"-I{(folder / source).parent}")
    with _Program(folder / source) as program:
        for expression in expressions:
            program.call("AddNameExpression", expression.encode())
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        program.call("CompileProgram", len(options), given)
        code = program.text("CUBIN" if architecture.startswith("sm_") else "PTX")
        return code, {expression: program.name(expression) for expression in expressions}


def kernel(source: str, expression: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """One kernel for a chip, from the disk or compiled and put there: its code and its name."""
    architecture = target(capability)
    path = None if CACHE is None else CACHE / f"{_key(source, expression, architecture)}.bin"
    if path is not None and (kept := _kept(path)) is not None:
        return kept
    code, names = compile_kernels(source, [expression], architecture)
    if path is not None:
        content = names[expression].encode() + b"\n" + code
        _keep(path, _sum_of(content) + b"\n" + content)
    return code, names[expression]


def _sum_of(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _kept(path: Path) -> tuple[bytes, str] | None:
    """The code of a file that ``kernel`` wrote, and its name; None where it is missing, or not as it was written."""
    try:
        found, content = path.read_bytes().split(b"\n", 1)
        symbol, code = content.split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return (code, symbol.decode()) if found == _sum_of(content) else None


def _key(source: str, expression: str, architecture: str) -> str:
    """What the machine code depends on."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    given = (_FORMAT, major.value, minor.value, _sources_hash(), source, expression, architecture)
    return hashlib.sha256(repr(given).encode()).hexdigest()


@cache
def _sources_hash() -> str:
    found = hashlib.sha256(repr(_HEADERS).encode())
    for path in sorted(p for p in sources().rglob("*") if p.suffix in (".h", ".cuh", ".cu")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _keep(path: Path, content: bytes) -> None:
    """Whole or not at all; a disk that takes nothing only costs the next process its time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
