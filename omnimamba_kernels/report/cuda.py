"""What nvcc made of the CUDA kernels in a checkout's own build: ptxas's words and the machine code, chip by chip.

``make native`` leaves both under ``build/cuda``: an object file of each source and beside it a log. An operation's
``cuda_impl.MATRIX`` names the kernels that must use the matrix units: HGMMA in a source with sm90 in its name, HMMA in
the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

FOLDER = Path("build") / "cuda" / str(sys.implementation.cache_tag) / "CMakeFiles" / "_native_cuda.dir" / "csrc"
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA")  # of a warpgroup, of a warp, of Blackwell's tensor memory
_LOCAL = ("LDL", "STL")
_HEADER = ("op", "source", "kernel", "chip", "registers", "stack", "spilled", "shared", "matrix instructions", "fault")


@dataclass(frozen=True)
class Kernel:
    """A kernel on a chip: bytes and registers a thread, bytes of shared memory a block that the source declares."""

    op: str
    source: str
    symbol: str
    name: str
    chip: str
    registers: int
    stack: int
    spilled: int
    shared: int
    serialized: bool  # the assembler could not let wgmma run asynchronously
    code: dict[str, int] | None = None  # instructions of interest; None: it was not disassembled

    def instructions(self, names: tuple[str, ...]) -> dict[str, int]:
        return {name: count for name, count in (self.code or {}).items() if name in names}

    def must_use(self) -> str | None:
        """The matrix instruction that the kernel must contain, if any."""
        if self.name.partition("<")[0] not in _declared(self.op):
            return None
        return "HGMMA" if "sm90" in self.source else "HMMA"


def kernels(folder: Path = FOLDER) -> list[Kernel]:
    """Every kernel of every chip that the last build compiled; RuntimeError where there was none."""
    logs = sorted(folder.glob("*/*.cu.o.txt"))
    if not logs:
        raise RuntimeError(
            f"no CUDA kernels were built in {folder}: run 'make native' in a checkout, with nvcc on PATH"
        )
    return [kernel for log in logs for kernel in of_object(log)]


def of_object(log: Path, disassembled: bool = True) -> list[Kernel]:
    """The kernels of one object file, named after its log: OBJECT.txt."""
    found = list(_said(log))
    names = _demangled([kernel.symbol for kernel in found])
    code = machine_code(log.with_suffix("")) if disassembled else None
    return [
        replace(kernel, name=name, code=None if code is None else code.get((kernel.chip, kernel.symbol), {}))
        for kernel, name in zip(found, names, strict=True)
    ]


def _said(log: Path) -> Iterator[Kernel]:
    """What ptxas -v says of each kernel; the frame comes before the registers."""
    text = log.read_text()
    serialized = set(re.findall(r"instructions are serialized .* in the function '(\w+)'", text))
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", text)
    op, source = log.parent.name, log.name.removesuffix(".o.txt")
    for symbol, chip, said in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        used = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        count, shared = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes smem", said)
        if used is None or count is None:
            raise RuntimeError(f"{log}: ptxas said nothing of registers and spills of {symbol}: {said[:500]!r}")
        spilled = max(int(used[2]), int(used[3]))
        yield Kernel(op, source, symbol, symbol, chip, int(count[1]), int(used[1]), spilled,
                     int(shared[1]) if shared else 0, symbol in serialized)  # fmt: skip


def _demangled(symbols: list[str]) -> list[str]:
    """Names without namespaces and parameters, as c++filt has them; as they are where there is none."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return symbols
    text = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", line) for line in text.splitlines()]
    return [re.sub(r">\(.*", ">", name) if "<" in name else name.partition("(")[0] for name in names]


@cache
def disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or of Triton's package, and with its nvdisasm beside it; or None."""
    folders = []
    package = importlib.util.find_spec("triton")
    if package is not None and package.origin is not None:
        folders = [str(Path(package.origin).parent / "backends" / "nvidia" / "bin")]
    for path in (None, *folders):
        tool = shutil.which("cuobjdump", path=path)
        if tool is not None and shutil.which("nvdisasm", path=str(Path(tool).parent)) is not None:
            return tool
    return None


def machine_code(binary: Path) -> dict[tuple[str, str], dict[str, int]] | None:
    """(chip, kernel) to how often each matrix and local-memory instruction stands in its code."""
    tool = disassembler()
    if tool is None:
        return None
    # cuobjdump looks for nvdisasm on PATH.
    command = ["env", f"PATH={Path(tool).parent}", tool, "-sass", str(binary.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    found: dict[tuple[str, str], dict[str, int]] = {}
    chip, counts = "", {}
    wanted = "|".join((*_MATRIX, *_LOCAL))
    for arch, function, instruction in re.findall(
        rf"^arch = (\w+)|^\s+Function : (\S+)|^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?({wanted})\b", done.stdout, re.M
    ):
        if arch:
            chip = arch
        elif function:
            counts = found.setdefault((chip, function), {})
        else:
            counts[instruction] = counts.get(instruction, 0) + 1
    return found


@cache
def _declared(op: str) -> tuple[str, ...]:
    path = f"{__package__.rpartition('.')[0]}.{op}"
    if importlib.util.find_spec(path) is None or importlib.util.find_spec(f"{path}.cuda_impl") is None:
        return ()
    return getattr(importlib.import_module(f"{path}.cuda_impl"), "MATRIX", ())


def faults(kernel: Kernel) -> list[str]:
    """Which rules a kernel breaks."""
    broken = []
    if kernel.spilled or kernel.stack:
        broken.append(f"spills {kernel.spilled} bytes a thread on a stack of {kernel.stack}")
    if kernel.serialized:
        broken.append("its wgmma instructions are serialized")
    if kernel.code is None:
        return broken
    local = kernel.instructions(_LOCAL)
    if local and not kernel.stack:
        broken.append(f"reads or writes local memory: {_counted(local)}")
    wanted = kernel.must_use()
    if wanted is not None and wanted not in kernel.code:
        broken.append(f"multiplies matrices without {wanted}")
    return broken


def text(rows: list[Kernel]) -> str:
    """One line a kernel and chip, in aligned columns."""
    lines = [_HEADER, *(_line(kernel) for kernel in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    if all(kernel.code is not None for kernel in rows):
        return table
    return f"{table}\nmatrix instructions: unknown; cuobjdump and nvdisasm come with the CUDA toolkit and with triton"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"


def _line(kernel: Kernel) -> tuple[str, ...]:
    matrix = "?" if kernel.code is None else _counted(kernel.instructions(_MATRIX))
    return (
        kernel.op, kernel.source, kernel.name, kernel.chip, str(kernel.registers), str(kernel.stack),
        str(kernel.spilled), str(kernel.shared), matrix, "; ".join(faults(kernel)),
    )  # fmt: skip
