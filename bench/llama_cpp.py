"""llama.cpp on the GGUF that ``save_gguf`` writes, in a process of its own: ids in, logits out.

Optional: the reason where llama-cpp-python is not installed. A child process runs the engine, so that a crash or a
hang of it is a refusal that names signal or seconds, and its OpenMP threads never meet torch's.

    python -m bench.llama_cpp FILE LONGEST THREADS REORDER   the child: a line of JSON in, a line or bytes out
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .machine import ROOT

TIMEOUT = 120.0
"""Seconds that one request may take."""


def label(kind: str) -> str:
    """llama.cpp with the version of its Python package, where it is installed, and the type of the weights."""
    try:
        return f"llama-cpp-python {metadata.version('llama-cpp-python')}, {kind}"
    except metadata.PackageNotFoundError:
        return f"llama-cpp-python, {kind}"


def need() -> None:
    """RuntimeError with the reason where the package is missing."""
    if find_spec("llama_cpp") is None:
        raise RuntimeError("cannot run: llama-cpp-python is not installed")


class LlamaCpp:
    """One sequence of one model, on as many threads as torch; at most ``longest`` tokens are taken at a time.

    ``reorder``: weights may be laid out anew for the processor's own instructions, as llama.cpp does by itself. Of the
    types that are timed, version 0.3.36 lays out Q8_0 alone, for AMX. There it dies of SIGILL where a GCC compiled it
    whose ``_tile_loadconfig`` hands over 8 of a configuration's 64 bytes (12.2 does): bench/llama_cpp_amx.h.
    RuntimeError that says "cannot run" and why: no package, a crash, ``timeout`` seconds without an answer.
    """

    def __init__(
        self, path: Path, longest: int, timeout: float = TIMEOUT, command: tuple[str, ...] = ("-m", "bench.llama_cpp"),
        reorder: bool = False,
    ) -> None:  # fmt: skip
        self.timeout, self.reorder, self._child = timeout, reorder, None
        if command[0] == "-m":
            need()
        self._child = subprocess.Popen(
            [sys.executable, *command, str(path), str(longest), str(torch.get_num_threads()), str(int(reorder))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        self.vocab = int(json.loads(self._line())["vocab"])

    def reset(self) -> None:
        """Forget what was taken in."""
        self._ask(do="reset")

    def take(self, ids: list[int], together: bool = True) -> None:
        """Take ids in after what came before, all at once or each by itself."""
        self._ask(do="take", ids=ids, together=together)

    def logits(self) -> Tensor:
        """(1, vocabulary), after the last."""
        self._ask(do="logits")
        return torch.frombuffer(bytearray(self._read(4 * self.vocab)), dtype=torch.float32).clone()[None]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()
            self._child = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, **request: object) -> None:
        if self._child is None:
            raise RuntimeError("cannot run: llama.cpp has stopped before")
        with contextlib.suppress(BrokenPipeError):  # it died: the answer, or its absence, tells
            self._child.stdin.write((json.dumps(request) + "\n").encode())
        answer = json.loads(self._line())
        if "error" in answer:
            self._fail(answer["error"])

    def _line(self) -> bytes:
        found = b""
        while not found.endswith(b"\n"):
            found += self._some(1)
        return found

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += self._some(size - len(found))
        return found

    def _some(self, most: int) -> bytes:
        out, end = self._child.stdout, time.monotonic() + self.timeout
        if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
            self._fail(f"no answer within {self.timeout:g} s")
        found = os.read(out.fileno(), most)
        if not found:
            status = self._child.wait()
            self._fail(f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}")
        return found

    def _fail(self, what: str) -> None:
        self.close()
        raise RuntimeError(f"cannot run: llama.cpp: {what}")


class _Engine:
    """The child's side, through the functions of llama-cpp-python."""

    def __init__(self, path: str, longest: int, threads: int, reorder: bool) -> None:
        import llama_cpp as api

        from omnimamba_model.gguf import LONGEST

        self.api = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        storage = api.llama_model_default_params()
        storage.use_extra_bufts = reorder
        self.model = api.llama_model_load_from_file(path.encode(), storage)
        if not self.model:
            raise RuntimeError(f"could not read {path}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = LONGEST, longest
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def take(self, ids: list[int], together: bool) -> None:
        for some in [ids] if together else [[token] for token in ids]:
            tokens = (self.api.llama_token * len(some))(*some)
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(some))):
                raise RuntimeError(f"could not take in {len(some)} tokens")

    def logits(self) -> bytes:
        found = self.api.llama_get_logits_ith(self.context, -1)
        return bytes((ctypes.c_float * self.vocab).from_address(ctypes.addressof(found.contents)))


def serve(engine: object) -> None:
    """Answers requests until there are no more: {} for what is done, then the logits' bytes; {"error": why}."""
    out = sys.stdout.buffer

    def answer(line: dict[str, object], more: bytes = b"") -> None:
        out.write((json.dumps(line) + "\n").encode() + more)
        out.flush()

    answer({"vocab": engine.vocab})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            done = getattr(engine, request.pop("do"))(**request)
        except RuntimeError as error:
            answer({"error": str(error)})
        else:
            answer({}, done or b"")


if __name__ == "__main__":
    file, longest, threads, reorder = sys.argv[1:]
    serve(_Engine(file, int(longest), int(threads), bool(int(reorder))))
