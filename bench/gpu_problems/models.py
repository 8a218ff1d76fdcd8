"""Whole models on one device: decoding at batch 1, sixteen images at once, a layer against attention.

On a GPU the 1.3B shape in bfloat16 at the lengths of the paper's Figure 1, on a CPU a tiny one. Peers: a Transformer of
as many parameters, with a static key-value cache and, as in the paper, with none; mamba_ssm's model on our weights;
torch's attention by flash and by cuDNN. Each contender builds its own model, so that its memory is its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnimamba_kernels import use_backend
from omnimamba_model import BASE, MambaConfig, MambaLM, OmniMamba, OmniMambaConfig, cast_matrices, draw

from .. import counts, inputs
from ..baselines.attention import Attention
from ..baselines.transformer import Transformer
from ..counts import Decoder
from ..measure import relative_error, worst_error
from ..published import AT_ONCE, gpu_images_case
from .common import Call, Parts, Problem, backends, dtype_of, sizes

DECODE, IMAGES, LAYER, TRAINING = "decode", "images", "layer forward", "layer forward + backward"
CONTEXTS, LENGTHS = (4096, 16384, 131072), (512, 4096, 32768, 131072, 2**20)
LONGEST_ATTENTION = {False: 2**20, True: 131072}
"""Of a layer's forward and of its training: beyond it seconds a call."""
LONGEST_UNCACHED = 16384
OURS, INT8, CACHED, UNCACHED = "ours", "ours, int8 weights", "Transformer, KV cache", "Transformer, no cache"
TINY = MambaConfig(d_model=64, n_layer=2, vocab_size=128, d_state=16, headdim=32)
SMALL = MambaConfig(d_model=64, n_layer=2, d_state=16, headdim=32)
PROMPT, SLICE = 24, 128
"""Tokens that a Transformer's step is checked on; positions of a layer's output that are checked."""


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


def language(device: torch.device, int8: bool = False) -> MambaLM:
    torch.manual_seed(0)
    with device:
        model = MambaLM(MambaConfig() if device.type == "cuda" else TINY)
    return cast_matrices(model, torch.int8 if int8 else dtype_of(device)).eval()


def transformer(device: torch.device) -> Transformer:
    torch.manual_seed(0)
    large = device.type == "cuda"
    with device:
        model = Transformer(2048, 24, 8192) if large else Transformer(64, 2, 128, 128)
    return model.to(dtype_of(device)).eval()


def _token(device: torch.device) -> Tensor:
    return torch.full((1,), 7, device=device)


@torch.inference_mode()
def step_of_ours(device: torch.device, model: MambaLM, context: int) -> Call:
    """One step from a state of zeros at ``context``: what a state holds does not change the time."""
    state = model.backbone.new_state(1)
    state.position = context
    step, token = model.backbone.bind_step(state), _token(device)
    return torch.inference_mode()(lambda: model.head(step(model.backbone.embedding(token))))


@torch.inference_mode()
def exact_step(device: torch.device, context: int, int8: bool = False) -> Tensor:
    """The same as a sequence of one token, on the reference."""
    model = language(device, int8)
    state = model.backbone.new_state(1)
    state.position = context
    with use_backend("reference"):
        return model.head(model.backbone.prefill(model.backbone.embedding(_token(device)[None]), state))


def mamba_ssm(device: torch.device) -> nn.Module:
    """mamba_ssm's model on our weights."""
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
    """Its step from states of zeros."""
    from mamba_ssm.utils.generation import InferenceParams

    held = InferenceParams(max_seqlen=context + 1024, max_batch_size=1, seqlen_offset=context)
    token = _token(device)[None]
    step = lambda: model(token, inference_params=held, num_last_tokens=1).logits[:, 0]  # noqa: E731
    return torch.inference_mode()(step)


def _ours(device: torch.device, context: int, int8: bool = False) -> Call:
    return step_of_ours(device, language(device, int8), context)


def _cached(device: torch.device, context: int) -> Call:
    model = transformer(device)
    return cached_step(device, model, model.new_cache(1, context + 1), context)


def _uncached(device: torch.device, context: int) -> Call:
    return uncached_step(device, transformer(device), context)


def cached_step(device: torch.device, model: Transformer, cache: Tensor, context: int) -> Call:
    token = _token(device)
    return lambda: model.step(token, cache, context)


def uncached_step(device: torch.device, model: Transformer, context: int) -> Call:
    ids = _token(device).expand(1, context + 1)
    return lambda: model.last(ids)


def needs(device: torch.device, context: float) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of a token: ours every matrix once and the state there and back, a Transformer's its matrices
    and its cache, or without one the whole sequence again."""
    size = torch.empty((), dtype=dtype_of(device)).element_size()
    large = device.type == "cuda"
    ours, theirs = (MambaConfig(), Decoder(2048, 24, 8192)) if large else (TINY, Decoder(64, 2, 128, 128))
    total = lambda parts: (sum(p.bytes for p in parts), sum(p.flops for p in parts))  # noqa: E731
    return {
        OURS: total(counts.mamba_step(ours, 1, size)),
        INT8: total(counts.mamba_step(ours, 1, 1)),
        CACHED: total(counts.decoder_step(theirs, 1, context, size)),
        UNCACHED: total(counts.decoder_pass(theirs, 1, int(context) + 1, size)),
    }


@torch.inference_mode()
def transformer_error(device: torch.device) -> float:
    """A short prompt token by token with a cache, against all of it at once in fp32."""
    model = transformer(device)
    ids = torch.arange(PROMPT, device=device)[None]
    cache = model.new_cache(1, PROMPT)
    steps = [model.step(ids[:, i], cache, i) for i in range(PROMPT)]
    return relative_error(steps[-1], copy.deepcopy(model).float().last(ids))


def _decode(device: torch.device, context: int) -> Problem:
    needed = needs(device, context)
    own = backends(device)[0]
    contenders = {own: functools.partial(_ours, device, context)}
    first = context == sizes(device, CONTEXTS, (64,))[0]
    if first:  # ours takes as long at any
        contenders[INT8] = functools.partial(_ours, device, context, int8=True)
    if device.type == "cuda":
        contenders["mamba_ssm"] = lambda: step_of_theirs(device, mamba_ssm(device), context)
    contenders[CACHED] = functools.partial(_cached, device, context)
    if context <= LONGEST_UNCACHED:
        contenders[UNCACHED] = functools.partial(_uncached, device, context)
    theirs = lambda found: transformer_error(device)  # noqa: E731
    narrow = lambda found: relative_error(found, exact_step(device, context, int8=True))  # noqa: E731
    return Problem(
        DECODE, case(device, context_case(context)), *needed.pop(OURS), contenders,
        lambda found: relative_error(found, exact_step(device, context)), 2 * inputs.BOUND[dtype_of(device)],
        {INT8: narrow, CACHED: theirs, UNCACHED: theirs}, needed, graph=True, energy=first, tokens=1,
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
    flops = 2.0 * length * width * (config.in_proj_dim + config.d_inner) + inputs.scan_flops(1, length, config.nheads)
    return Problem(
        TRAINING if training else LAYER, f"1 x {length}, width {width}", 0.0, flops * (3 if training else 1),
        contenders, error(mixer, lambda layer: lambda u: layer(u, BASE)), 2 * inputs.BOUND[dtype], errors, needed,
        tokens=length,
    )  # fmt: skip
