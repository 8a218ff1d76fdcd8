"""Claim: the 130M Mamba-2 prefills and decodes faster than transformers' and llama.cpp's on the same weights.

768 wide, 24 layers, vocabulary 50288, random weights, batch 1. transformers runs its fallback in fp32,
llama.cpp a GGUF of the weights in the type that ours have (Q8_0 for int8). Prefill is
compared in fp32; decode in fp32 and with bf16 and int8 weights under fp32 activations, whose floor is the weights'
bytes over the DRAM read rate. What int8 costs in accuracy: bench.accuracy.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omnimamba_model import MambaConfig, MambaLM, cast_matrices
from omnimamba_model.gguf import q8_0, save_gguf

from . import inputs, llama_cpp, peers
from .generators import TOKENS, ids, weight_bytes
from .inputs import scan_flops
from .llama_cpp import LlamaCpp
from .measure import Contender, Work, relative_error

PREFILL, DECODE = "130M prefill", "130M decode"
LENGTH = 2048
PROMPT = {True: 32, False: 300}
"""Tokens before the decode steps that are checked, in a quick run and a whole one: more than a chunk of any scan."""
BOUND = 1e-3
"""Through 24 layers in fp32."""
GGUF = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}
LLAMA_BOUND = {"float32": BOUND, "bfloat16": 0.05, "q8_0": 0.1}
"""Against fp32 on the weights that the GGUF holds: it rounds activations as its weights."""


@functools.cache
def theirs() -> torch.nn.Module:
    """transformers' model; RuntimeError with the reason where it is not installed."""
    peers.fallback("mamba2_chunk_scan")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = MambaConfig.preset("130m")
    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=sizes.nheads, head_dim=sizes.headdim, vocab_size=sizes.vocab_size, hidden_size=sizes.d_model,
        state_size=sizes.d_state, num_hidden_layers=sizes.n_layer, n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    return tame(Mamba2ForCausalLM(config).eval())


@torch.no_grad()
def tame(model: torch.nn.Module) -> torch.nn.Module:
    """Layers that add a twentieth: as drawn, 24 of them blow a rounding of weights to 8 bits up to half of the logits,
    and no check of narrow weights would mean anything."""
    for layer in model.backbone.layers:
        layer.mixer.out_proj.weight.mul_(0.05)
    return model


@functools.cache
def ours(dtype: torch.dtype) -> MambaLM:
    """Our model on the same weights, or on random ones where transformers is not installed."""
    torch.manual_seed(0)
    model = tame(MambaLM(MambaConfig.preset("130m")).eval())
    if not isinstance(peers.mamba2(), str):
        weights = {k.replace("embeddings.", "embedding."): v for k, v in theirs().state_dict().items()}
        weights.pop("lm_head.weight", None)
        model.load_state_dict(weights)
    return cast_matrices(model, dtype)


@torch.inference_mode()
def our_prefill(dtype: torch.dtype, prompt: torch.Tensor):
    """The logits after the prompt (1, vocabulary), and the state to go on from."""
    model = ours(dtype)
    state = model.backbone.new_state(1)
    return model.head(model.backbone.prefill(model.backbone.embedding(prompt), state)), state


@torch.inference_mode()
def their_prefill(prompt: torch.Tensor):
    answer = theirs()(prompt, use_cache=True, logits_to_keep=1)
    return answer.logits[:, -1], answer.cache_params


@torch.inference_mode()
def our_step(dtype: torch.dtype, state) -> Callable[[torch.Tensor], torch.Tensor]:
    """One token (1,) in, its logits out; weights and states are looked up here, once a generation."""
    model = ours(dtype)
    step = model.backbone.bind_step(state)
    return lambda token: model.head(step(model.backbone.embedding(token)))


@torch.inference_mode()
def our_decode(step: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
    for token in ids(count)[0]:
        logits = step(token[None])
    return logits


@torch.inference_mode()
def their_decode(cache, count: int) -> torch.Tensor:
    for token in ids(count)[0]:
        answer = theirs()(token.view(1, 1), cache_params=cache, use_cache=True)
    return answer.logits[:, -1]


@torch.inference_mode()
def whole(prompt: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The logits after the whole prompt on the reference, in fp32 with weights rounded to ``dtype``."""
    model = ours(dtype)
    if dtype != torch.float32:
        model = copy.deepcopy(model).float()
    with inputs.by_definition(model):
        return model(prompt)[:, -1]


@functools.cache
def llama(kind: str, longest: int, reorder: bool = False) -> LlamaCpp:
    """llama.cpp on our weights in ``kind``, one of GGUF's; RuntimeError with the reason where it does not run."""
    llama_cpp.need()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "130m.gguf"
        save_gguf(ours(torch.float32), path, kind)
        return LlamaCpp(path, longest, reorder=reorder)  # it maps the file, which lives until it is unmapped


def llama_prefill(prompt: torch.Tensor) -> None:
    engine = llama("float32", LENGTH)
    engine.reset()
    engine.take(prompt[0].tolist())


def llama_decode(engine: LlamaCpp, count: int) -> None:
    engine.take(ids(count)[0].tolist(), together=False)


@functools.cache
@torch.inference_mode()
def rounded(kind: str, prompt: int) -> torch.Tensor:
    """The logits that the reference has in fp32 on the weights as a GGUF of ``kind`` holds them."""
    model = copy.deepcopy(ours(torch.float32))
    for weight in (p for p in model.parameters() if p.ndim == 2):
        if kind == "q8_0":
            blocks = q8_0(weight)
            scale, values = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].view(torch.int8)
            weight.copy_((scale.float() * values).view(weight.shape))
        else:
            weight.copy_(weight.to(getattr(torch, kind)))
    with inputs.by_definition(model):
        return model(steps_after(prompt))[:, -1]


def llama_contender(kind: str, prompt: int, reorder: bool = False) -> Contender:
    """Its decode step; ``reorder``: as llama.cpp lays weights out by itself, in a process whose crash is its own."""
    engine = functools.partial(llama, kind, prompt, reorder)

    def check() -> float:
        engine().reset()
        engine().take(ids(prompt)[0].tolist())
        llama_decode(engine(), TOKENS)
        return relative_error(engine().logits(), rounded(kind, prompt))

    name = llama_cpp.label(GGUF[kind] + ", reordered" * reorder)
    return Contender(name, lambda: llama_decode(engine(), TOKENS), check, LLAMA_BOUND[kind])


def steps_after(prompt: int) -> torch.Tensor:
    return torch.cat([ids(prompt), ids(TOKENS)], dim=1)


def test_prefill(bench, benchmark):
    prompt = ids(256 if bench.quick else LENGTH)
    size = MambaConfig.preset("130m")
    matrices = sum(p.numel() for p in ours(torch.float32).backbone.layers.parameters() if p.ndim == 2)
    flops = 2.0 * prompt.shape[1] * matrices + size.n_layer * scan_flops(1, prompt.shape[1], size.nheads)
    exact = functools.cache(lambda: whole(prompt))
    known = 0.0 if bench.quick else 6.0  # seconds, about: their checks have warmed them up

    def llama_checked() -> float:
        llama_prefill(prompt)
        return relative_error(llama("float32", LENGTH).logits(), exact())

    contenders = [
        Contender(
            "Mamba-2 130M, fp32",
            lambda: our_prefill(torch.float32, prompt),
            lambda: relative_error(our_prefill(torch.float32, prompt)[0], exact()),
            BOUND,
        ),
        Contender(
            f"{peers.label()}, fp32",
            lambda: their_prefill(prompt),
            lambda: relative_error(their_prefill(prompt)[0], exact()),
            BOUND,
            expected=known,
        ),
        Contender(
            llama_cpp.label("F32"),
            lambda: llama_prefill(prompt),
            llama_checked,
            BOUND,
            expected=known,
        ),
    ]
    work = Work("sgemm", flops=flops)
    bench.compare(
        benchmark, PREFILL, f"{prompt.shape[1]} tokens", contenders, work, tokens=prompt.shape[1], judged=True
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.int8, pytest.param(torch.float32, marks=pytest.mark.full)],
    ids=["bf16", "int8", "fp32"],
)
def test_decode(bench, benchmark, dtype):
    prompt = PROMPT[bench.quick]

    def begun() -> Callable[[torch.Tensor], torch.Tensor]:
        return our_step(dtype, our_prefill(dtype, ids(prompt))[1])

    def ours_checked() -> float:
        return relative_error(our_decode(begun(), TOKENS), whole(steps_after(prompt), dtype))

    def theirs_checked() -> float:
        return relative_error(their_decode(their_prefill(ids(prompt))[1], TOKENS), whole(steps_after(prompt)))

    kind = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float32: "fp32"}[dtype]
    step = begun()
    name = f"Mamba-2 130M, {kind} weights"
    contenders = [Contender(name, lambda: our_decode(step, TOKENS), ours_checked, BOUND)]
    theirs_run = functools.cache(lambda: their_prefill(ids(prompt))[1])
    floors = [Work("read", bytes=TOKENS * weight_bytes(ours(kept))) for kept in (dtype, torch.float32)]
    contenders.append(
        Contender(
            f"{peers.label()}, fp32",
            lambda: their_decode(theirs_run(), TOKENS),
            theirs_checked,
            BOUND,
            work=floors[1],
        )
    )
    gguf = {"bf16": "bfloat16", "int8": "q8_0", "fp32": "float32"}[kind]
    contenders.append(llama_contender(gguf, prompt))
    if kind == "int8":
        contenders.append(llama_contender(gguf, prompt, reorder=True))
    judged = kind != "fp32"
    bench.compare(benchmark, DECODE, f"{kind} weights", contenders, floors[0], tokens=TOKENS, judged=judged)
