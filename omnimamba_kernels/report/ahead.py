"""Notes the launches of the operations and compiles each distinct one for a chip, in parallel and once for all time.

What a compilation told is kept under ``build/triton-report`` by a hash of everything that goes into it: the sources of
the kernel and of what it calls, Triton's version, the chip, the argument kinds, the constants and the options.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..triton_launch import TARGETS, Launch, interpreting
from .calls import Call
from .resources import Resources, read

FOLDER = Path("build") / "triton-report"
_FORMAT = 3


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one chip, and the first call that starts it; fit to be sent to another process."""

    op: str
    call: str
    large: bool
    arch: str
    module: str
    kernel: str
    kinds: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.kernel)

    def key(self) -> str:
        """What the result depends on."""
        given = (_FORMAT, _versions(), self.arch, self.function().cache_key, self.kinds, self.constants, self.options)
        return hashlib.sha256(repr(given).encode()).hexdigest()

    def budget(self) -> tuple[int, str]:
        """How many bytes a thread may spill and why: what the kernel's file says in ``SPILLS``, else none.

        The first of its (kernel, chip, constants that it is compiled with, bytes, reason) that fits. A reason that
        begins with a version of Triton is of that version alone.
        """
        return self._exception("SPILLS")

    def narrower(self) -> tuple[int, str]:
        """How many products may stay below wgmma on sm_90 and why: ``NARROWER`` of the kernel's file, else none."""
        return self._exception("NARROWER")

    def _exception(self, table: str) -> tuple[int, str]:
        constants = set(self.constants)
        for kernel, arch, when, allowed, reason in getattr(importlib.import_module(self.module), table, ()):
            fits = (kernel, arch) == (self.kernel, self.arch) and constants.issuperset(when.items())
            if fits and of_this_triton(reason):
                return allowed, reason
        return 0, ""


def of_this_triton(reason: str) -> bool:
    """Whether a reason is not that of another version: "Triton 3.8: ..."."""
    words = reason.split()
    return words[0] != "Triton" or _versions().startswith(words[1].removesuffix(":") + ".")


def jobs(calls: Iterable[Call], archs: Iterable[str]) -> list[Job]:
    """The distinct compilations that the calls need."""
    if interpreting():
        raise RuntimeError("Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them")
    calls = list(calls)
    found: dict[tuple, Job] = {}
    for arch in archs:
        for call in calls:
            for launch in call.launches(TARGETS[arch]):
                job = _job(call, arch, launch)
                found.setdefault((arch, job.module, job.kernel, job.kinds, job.constants, job.options), job)
    return list(found.values())


def _job(call: Call, arch: str, launch: Launch) -> Job:
    kernel = launch.kernel
    return Job(call.op, call.name, call.large, arch, kernel.__module__, kernel.__name__, launch.kinds,
               launch.constants, launch.options)  # fmt: skip


def compile_all(
    jobs: list[Job], processes: int | None = None, folder: Path = FOLDER
) -> Iterator[tuple[Job, Resources | str]]:
    """Each job, in their order, with what its compilation told: the resources, or why it does not compile.

    With ``processes=1`` all are compiled in this one.
    """
    keys = [job.key() for job in jobs]
    kept = [_load(folder, key) for key in keys]
    missing = [job for job, found in zip(jobs, kept, strict=True) if found is None]
    processes = max(1, min(len(missing), processes or len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(processes, context) if processes > 1 else contextlib.nullcontext() as pool:
        compiled = pool.map(_attempt, missing) if pool else map(_attempt, missing)
        for job, key, found in zip(jobs, keys, kept, strict=True):
            if found is None:
                found = next(compiled)
                if isinstance(found, Resources):
                    _keep(folder, key, found)
            yield job, found


def _attempt(job: Job) -> Resources | str:
    """The resources, or the words of the error at the root of those that the compiler piles up."""
    try:
        return compile_one(job)
    except Exception as error:
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        return f"{type(error).__name__}: {error}"


def compile_one(job: Job) -> Resources:
    """Compiles a kernel from its source, whatever Triton's own cache holds: the assembler's words are needed."""
    import triton

    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            compiled = triton.compile(_source(job), target=_chip(job), options=dict(job.options))
    return read(compiled, log.getvalue(), TARGETS[job.arch])


def first_form(job: Job) -> str:
    """The kernel as the compiler's passes get it, its functions inlined, in the compiler's words."""
    from triton._C.libtriton import ir, passes
    from triton.compiler.compiler import make_backend

    chip = _chip(job)
    backend = make_backend(chip)
    options, context = backend.parse_options(dict(job.options)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = _source(job).make_ir(chip, options, codegen, modules, context)
    manager = ir.pass_manager(context)
    for add in ("add_inliner", "add_canonicalizer", "add_cse", "add_symbol_dce"):
        getattr(passes.common, add)(manager)
    manager.run(module, "first_form")
    return module.str_nodebug()


def _source(job: Job) -> Any:
    from triton.compiler import ASTSource

    function, kinds, constants = job.function(), dict(job.kinds), dict(job.constants)
    signature = {name: kinds[name].split()[0] if name in kinds else "constexpr" for name in function.arg_names}
    index = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = {index[name]: [["tt.divisibility", 16]] for name, kind in kinds.items() if kind.endswith(" 16")}
    return ASTSource(function, signature, {index[name]: value for name, value in constants.items()}, aligned)


def _chip(job: Job) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(job.arch[3:]), 32) if job.arch.startswith("sm_") else GPUTarget("hip", job.arch, 64)


@cache
def _versions() -> str:
    import triton

    return triton.__version__


def _load(folder: Path, key: str) -> Resources | None:
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    found = Resources(**json.loads(path.read_text()))
    return replace(found, narrower=tuple(found.narrower))


def _keep(folder: Path, key: str, found: Resources) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(found), file)
    os.replace(temporary, folder / f"{key}.json")
