"""llama.cpp on the GGUF that ``save_gguf`` writes, through the functions of llama-cpp-python: ids in, logits out.

Optional: RuntimeError with the reason where llama-cpp-python is not installed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from omnimamba_model.gguf import LONGEST


def module():
    """llama_cpp; RuntimeError with the reason where it is missing."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as missing:
        raise RuntimeError(f"cannot run: llama-cpp-python is not installed ({str(missing).splitlines()[0]})") from None
    return llama_cpp


def label(kind: str) -> str:
    """llama.cpp with the version of its Python package, where that can be said, and the type of the weights."""
    try:
        return f"llama-cpp-python {module().__version__}, {kind}"
    except RuntimeError:
        return f"llama-cpp-python, {kind}"


class LlamaCpp:
    """One sequence of one model, on as many threads as torch; at most ``longest`` tokens are taken at a time."""

    def __init__(self, path: Path, longest: int) -> None:
        self.api = api = module()
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        storage = api.llama_model_default_params()
        storage.use_extra_bufts = False  # version 0.3.36 crashes on the weights that it reorders for AMX
        self.model = api.llama_model_load_from_file(str(path).encode(), storage)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not read {path}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = LONGEST, longest
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(self.model, options)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        """Forget what was taken in."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def take(self, ids: list[int]) -> Tensor:
        """Take ids in after what came before; the logits (1, vocabulary) after the last."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama.cpp could not take in {len(ids)} tokens")
        found = self.api.llama_get_logits_ith(self.context, -1)
        return torch.frombuffer((ctypes.c_float * self.vocab).from_address(ctypes.addressof(found.contents)),
                                dtype=torch.float32).clone()[None]  # fmt: skip

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
