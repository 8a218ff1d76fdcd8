"""Whole models on one device: decoding at batch 1, sixteen images at once, a layer against attention.

On a GPU the 1.3B shape in bfloat16 at the lengths of the paper's Figure 1, on a CPU a tiny one. Peers: a Transformer of
as many parameters, with a static key-value cache and, as in the paper, with none; mamba_ssm's and transformers' models
on our weights; torch's attention by flash and by cuDNN. Each contender builds its own model, so that its memory is its
own. What a timed step returns is what is checked, where it was timed: ours after a prompt, a Transformer's with its
whole cache or sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnimamba_kernels import dequantize_int8, use_backend
from omnimamba_model import BASE, MambaConfig, MambaLM, OmniMamba, OmniMambaConfig, cast_matrices, draw

from .. import counts, inputs, peers
from ..baselines.attention import Attention
from ..baselines.transformer import Transformer
from ..counts import Decoder
from ..generators import filled
from ..measure import relative_error, worst_error
from ..published import AT_ONCE, gpu_images_case
from .common import Call, Parts, Problem, backends, dtype_of, sizes

DECODE, IMAGES, LAYER, TRAINING = "decode", "images", "layer forward", "layer forward + backward"
CONTEXTS, LENGTHS = (4096, 16384, 131072), (512, 4096, 32768, 131072, 2**20)
LONGEST_ATTENTION = {False: 2**20, True: 131072}
"""Of a layer's forward and of its training: beyond it seconds a call."""
LONGEST_UNCACHED = 16384
LAST, LONGEST_END = 16, 131072
"""Positions at the end of attention's forward that are checked too, up to the length whose keys in fp64 fit."""
MAMBA_SSM = "mamba_ssm"
OURS, INT8, CACHED, UNCACHED = "ours", "ours, int8 weights", "Transformer, KV cache", "Transformer, no cache"
TINY = MambaConfig(d_model=64, n_layer=2, vocab_size=128, d_state=16, headdim=32)
SMALL = MambaConfig(d_model=64, n_layer=2, d_state=16, headdim=32)
PROMPT, SLICE = 256, 128
"""Tokens that a Mamba-2's timed step comes after; positions of a layer's output that are checked."""


def problems(device: torch.device) -> Parts:
    parts = [partial(_decode, device, context) for context in sizes(device, CONTEXTS, (64,))]
    parts.append(partial(_images, device))
    layers = [(length, training) for length in sizes(device, LENGTHS, (256,)) for training in (False, True)]
    return Parts(parts + [partial(_layer, device, *each) for each in layers])


def context_case(context: int) -> str:
    return f"{context} tokens of context"


def case(device: torch.device, rest: str) -> str:
    return f"{size(device)}, {rest}"


def size(device: torch.device) -> str:
    return "1.3B" if device.type == "cuda" else "tiny"


def language_config(device: torch.device) -> MambaConfig:
    return MambaConfig() if device.type == "cuda" else TINY


def language(device: torch.device, int8: bool = False) -> MambaLM:
    torch.manual_seed(0)
    with device:
        model = MambaLM(language_config(device))
    return cast_matrices(model, torch.int8 if int8 else dtype_of(device)).eval()


def decoder(device: torch.device) -> Decoder:
    """The Transformer's sizes: as many parameters as ours."""
    return Decoder(2048, 24, 8192) if device.type == "cuda" else Decoder(64, 2, 128, 128)


def transformer(device: torch.device) -> Transformer:
    torch.manual_seed(0)
    with device:
        return Transformer(*dataclasses.astuple(decoder(device))).to(dtype_of(device)).eval()


def _token(device: torch.device) -> Tensor:
    return torch.full((1,), 7, device=device)


def prompt(device: torch.device, count: int) -> Tensor:
    """Tokens (1, count), drawn anew for each count."""
    return torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(count)).to(device)


@torch.inference_mode()
def step_of_ours(device: torch.device, model: MambaLM, context: int) -> Call:
    """One step after PROMPT tokens, as if they were ``context``: what a state holds does not change the time."""
    state, token = model.backbone.new_state(1), _token(device)
    model.backbone.prefill(model.backbone.embedding(prompt(device, PROMPT)), state)
    state.position = context
    step = model.backbone.bind_step(state)
    return torch.inference_mode()(lambda: model.head(step(model.backbone.embedding(token))))


def exact_step(device: torch.device, int8: bool = False, rounded: bool = False) -> Tensor:
    """The logits of the same step by the definition: the whole sequence on the reference, once for all contexts."""
    return _exact_step(device, PROMPT, int8, rounded)


@functools.cache
def _exact_step(device: torch.device, count: int, *kind: bool) -> Tensor:
    return exact_logits(device, torch.cat([prompt(device, count), _token(device)[None]], dim=1), *kind)


def rounded_error(device: torch.device, found: Tensor) -> float:
    """Logits of the same step in a model that is cast as a whole, vectors and convolutions too."""
    return relative_error(found, exact_step(device, rounded=True))


@torch.inference_mode()
def exact_logits(device: torch.device, ids: Tensor, int8: bool = False, rounded: bool = False) -> Tensor:
    """After ids (1, l), in fp32 on the reference, with the numbers that the weights stand for.

    ``rounded``: vectors and convolutions too are of the weights' type, as in a model that is cast as a whole.
    """
    model = language(device)
    if rounded:
        model = model.to(dtype_of(device))
    model = model.float()
    for narrow, whole in zip(language(device, int8=True).modules() if int8 else (), model.modules(), strict=int8):
        if getattr(narrow, "weight_scale", None) is not None:
            whole.weight.data = dequantize_int8(narrow.weight, narrow.weight_scale).float()
    with use_backend("reference"):
        return model(ids)[:, -1]


def mamba_ssm(device: torch.device) -> nn.Module:
    """mamba_ssm's model on our weights, all of them in one dtype: its vectors and convolutions are rounded."""
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    ours = language(device)
    sizes = MambaConfig()
    config = Config(
        d_model=sizes.d_model, n_layer=sizes.n_layer, vocab_size=sizes.vocab_size, ssm_cfg={"layer": "Mamba2"},
        pad_vocab_size_multiple=1, tie_embeddings=True,
    )  # fmt: skip
    model = MambaLMHeadModel(config, device=device, dtype=dtype_of(device)).eval()
    weights = ours.state_dict()
    model.load_state_dict(weights | {"lm_head.weight": weights["backbone.embedding.weight"]})
    return model


def step_of_theirs(device: torch.device, model: nn.Module, context: int) -> Call:
    """Its step after PROMPT tokens, as if they were ``context``."""
    from mamba_ssm.utils.generation import InferenceParams

    held = InferenceParams(max_seqlen=context + 1024, max_batch_size=1)
    with torch.inference_mode():
        model(prompt(device, PROMPT), inference_params=held, num_last_tokens=1)
    held.seqlen_offset, token = context, _token(device)[None]
    step = lambda: model(token, inference_params=held, num_last_tokens=1).logits[:, 0]  # noqa: E731
    return torch.inference_mode()(step)


def mamba2(device: torch.device) -> nn.Module:
    """transformers' model on our weights, cast as a whole; RuntimeError with the reason where it is not installed."""
    peers.fallback("mamba2_chunk_scan")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    ours = language(device)
    sizes = ours.config
    config = Mamba2Config(
        num_heads=sizes.nheads, head_dim=sizes.headdim, vocab_size=sizes.vocab_size, hidden_size=sizes.d_model,
        state_size=sizes.d_state, num_hidden_layers=sizes.n_layer, n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    weights = {name.replace("embedding.", "embeddings."): tensor for name, tensor in ours.state_dict().items()}
    table = {"lm_head.weight": weights["backbone.embeddings.weight"]}
    model.load_state_dict(weights | table, assign=True)
    model.tie_weights()
    return model.to(dtype_of(device)).eval()


@torch.inference_mode()
def step_of_transformers(device: torch.device, model: nn.Module) -> Call:
    """Its step after PROMPT tokens."""
    cache, token = model(prompt(device, PROMPT), use_cache=True, logits_to_keep=1).cache_params, _token(device)[None]
    step = lambda: model(token, cache_params=cache, use_cache=True).logits[:, -1]  # noqa: E731
    return torch.inference_mode()(step)


def _ours(device: torch.device, context: int, int8: bool = False) -> Call:
    return step_of_ours(device, language(device, int8), context)


def _cached(device: torch.device, context: int) -> Call:
    model = transformer(device)
    return cached_step(device, model, filled(model.new_cache(1, context + 1)), context)


def _uncached(device: torch.device, context: int) -> Call:
    return uncached_step(device, transformer(device), context)


def cached_step(device: torch.device, model: Transformer, cache: Tensor, context: int) -> Call:
    token = _token(device)
    return lambda: model.step(token, cache, context)


def uncached_step(device: torch.device, model: Transformer, context: int) -> Call:
    ids = prompt(device, context + 1)
    return lambda: model.last(ids)


def _total(parts: list[counts.Part]) -> tuple[float, float]:
    return sum(p.bytes for p in parts), sum(p.flops for p in parts)


def needs(device: torch.device, context: float) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of a token: ours every matrix once and the state there and back, a Transformer's its matrices
    and its cache, or without one the whole sequence again."""
    ours, size = language_config(device), dtype_of(device).itemsize
    return {
        OURS: _total(counts.mamba_step(ours, 1, size)),
        INT8: _total(counts.mamba_step(ours, 1, 1)),
        CACHED: _total(counts.decoder_step(decoder(device), 1, context, size)),
        UNCACHED: pass_needs(device, int(context) + 1)[UNCACHED],
    }


def pass_needs(device: torch.device, length: int) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of a whole sequence taken in at once."""
    rest = 1, length, dtype_of(device).itemsize
    theirs = _total(counts.decoder_pass(decoder(device), *rest))
    return {OURS: _total(counts.mamba_pass(language_config(device), *rest)), UNCACHED: theirs}


def cached_error(device: torch.device, total: int, context: int, found: Tensor) -> float:
    """Logits of a step with a cache of ``total`` positions, against the definition on the same numbers."""
    model = transformer(device)
    cache = filled(model.new_cache(1, total))
    return relative_error(found, model.plain_step(_token(device), cache, context))


def uncached_error(device: torch.device, context: int, found: Tensor) -> float:
    return relative_error(found, transformer(device).plain_last(prompt(device, context + 1)))


def _decode(device: torch.device, context: int) -> Problem:
    needed = needs(device, context)
    own = backends(device)[0]
    contenders = {own: functools.partial(_ours, device, context)}
    first = context == sizes(device, CONTEXTS, (64,))[0]
    if first:  # ours takes as long at any
        contenders[INT8] = functools.partial(_ours, device, context, int8=True)
        contenders[peers.label()] = lambda: step_of_transformers(device, mamba2(device))
    if device.type == "cuda":
        contenders[MAMBA_SSM] = lambda: step_of_theirs(device, mamba_ssm(device), context)
    contenders[CACHED] = functools.partial(_cached, device, context)
    if context <= LONGEST_UNCACHED:
        contenders[UNCACHED] = functools.partial(_uncached, device, context)
    errors = {
        INT8: lambda found: relative_error(found, exact_step(device, int8=True)),
        peers.label(): functools.partial(rounded_error, device),
        MAMBA_SSM: functools.partial(rounded_error, device),
        CACHED: functools.partial(cached_error, device, context + 1, context),
        UNCACHED: functools.partial(uncached_error, device, context),
    }
    return Problem(
        DECODE, case(device, context_case(context)), *needed.pop(OURS), contenders,
        lambda found: relative_error(found, exact_step(device)), 2 * inputs.BOUND[dtype_of(device)],
        errors, needed, graph=True, energy=first, tokens=1,
        ours=(own, INT8),
    )  # fmt: skip


def omnimamba_config(device: torch.device) -> OmniMambaConfig:
    return OmniMambaConfig() if device.type == "cuda" else OmniMambaConfig(SMALL, image_tokens=9)


def omnimamba(device: torch.device) -> OmniMamba:
    torch.manual_seed(0)
    with device:
        model = OmniMamba(omnimamba_config(device))
    return cast_matrices(model, dtype_of(device)).eval()


def _captions(device: torch.device, model: OmniMamba) -> Tensor:
    shape, most = (AT_ONCE, model.config.text_slots), model.config.backbone.vocab_size
    return torch.randint(1, min(most, 50000), shape, generator=torch.Generator().manual_seed(0)).to(device)


def _drawing(device: torch.device) -> Call:
    model = omnimamba(device)
    captions = _captions(device, model)
    return lambda: draw(model, captions)


@torch.inference_mode()
def first_tokens_error(device: torch.device, drawn: Tensor) -> float:
    """Infinite unless all was drawn; else the first token's logits against the reference."""
    model = omnimamba(device)
    captions = _captions(device, model)
    if drawn.shape != (AT_ONCE, model.config.image_tokens):
        return float("inf")

    def logits() -> Tensor:
        state = model.backbone.new_state(AT_ONCE)
        return model.image_head(model.backbone.prefill(model.t2i_opening(captions), state, 1))

    found = logits()
    with use_backend("reference"):
        return relative_error(found, logits())


def _images(device: torch.device) -> Problem:
    config = omnimamba_config(device)
    with torch.device("meta"):
        layers = OmniMamba(config).backbone.layers.named_parameters()
        matrices = sum(p.numel() for name, p in layers if p.ndim == 2 and "_lora_" not in name)
    steps, each = config.image_tokens, torch.empty((), dtype=dtype_of(device)).element_size()
    return Problem(
        IMAGES, gpu_images_case(size(device), steps), each * steps * matrices,
        2.0 * AT_ONCE * steps * matrices, {backends(device)[0]: functools.partial(_drawing, device)},
        functools.partial(first_tokens_error, device), 2 * inputs.BOUND[dtype_of(device)], tokens=AT_ONCE * steps,
    )  # fmt: skip


@torch.no_grad()
def both_ends(attention: Attention, u: Tensor, front: Callable[[Tensor], float], found: Tensor) -> float:
    """The larger error, of the first positions and of the last, which see the whole of u."""
    true = copy.deepcopy(attention).double().plain(u.double(), LAST)
    return max(front(found), relative_error(found[:, -LAST:], true))


def _layer(device: torch.device, length: int, training: bool) -> Problem:
    """One layer of each kind; of training, gradients of the input and of all weights under an output gradient that is
    zero after the first positions, which they alone determine. Those of matrices are checked."""
    config = MambaConfig(n_layer=1) if device.type == "cuda" else MambaConfig(64, 1, 8, d_state=16, headdim=32)
    dtype, width = dtype_of(device), config.d_model
    torch.manual_seed(0)
    with device:
        mixer = cast_matrices(MambaLM(config), dtype).backbone.layers[0].mixer
        attention = Attention(width).to(dtype)
        u = torch.randn(1, length, width, dtype=dtype)
        upstream = torch.zeros(1, length, width, dtype=dtype)
        upstream[:, :SLICE].normal_()

    def ours(u: Tensor) -> Tensor:
        return mixer(u, BASE)

    def checked(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, *others = found if training else (found,)
        return first[:, :SLICE], *(gradient for gradient in others if gradient.ndim > 1)

    def exact(module: nn.Module, layer: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        start = u[:, :SLICE].double().requires_grad_()
        with use_backend("reference"):
            y = layer(start)
        if not training:
            return (y.detach(),)
        return checked(torch.autograd.grad(y, [start, *module.parameters()], upstream[:, :SLICE].double()))

    def error(module: nn.Module, call: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Callable[..., float]:
        wide = copy.deepcopy(module).double()
        truth = functools.cache(lambda: exact(wide, call(wide)))
        return lambda found: worst_error(checked(found), truth())

    def run(module: nn.Module, layer: Callable[[Tensor], Tensor]) -> Call:
        if not training:
            return torch.no_grad()(lambda: layer(u))
        wanted = [u.clone().requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(layer(wanted[0]), wanted, upstream.to(dtype))

    contenders = {backends(device)[0]: lambda: run(mixer, ours)}
    errors, needed = {}, {}
    theirs = counts.attention_layer(width, 1, length, u.element_size())
    if length > LONGEST_ATTENTION[training]:
        attention = None
    for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        if attention is None:
            break
        who = f"attention, {name}"
        needed[who] = (0.0, sum(part.flops for part in theirs) * (3 if training else 1))
        contenders[who] = lambda kind=kind: run(attention, sdpa_kernel(kind)(attention.forward))
        errors[who] = error(attention, lambda layer: layer.plain)
        if not training and length <= LONGEST_END:
            errors[who] = functools.partial(both_ends, attention, u, errors[who])
    flops = 2.0 * length * width * (config.in_proj_dim + config.d_inner) + inputs.scan_flops(1, length, config.nheads)
    return Problem(
        TRAINING if training else LAYER, f"1 x {length}, width {width}", 0.0, flops * (3 if training else 1),
        contenders, error(mixer, lambda layer: lambda u: layer(u, BASE)), 2 * inputs.BOUND[dtype], errors, needed,
        tokens=length,
    )  # fmt: skip
