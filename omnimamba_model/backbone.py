"""The Mamba-2 stack, and the plain language model made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimamba_kernels import CannotCapture, add_rmsnorm, capture, quantize_int8, rmsnorm_fn

from .config import BASE, MambaConfig
from .graphs import Step, StepGraphs
from .hub import Pretrained
from .layers import Linear, MambaMixer, Packing, RMSNorm, RoutedLinear, Table, Task, wide
from .state import MambaState


def activation_dtype(matrix: Tensor) -> torch.dtype:
    """What a matrix multiplies: its own dtype on a GPU, bf16 where that is int8; at least fp32 on a CPU, where 16 bits
    only save traffic."""
    if matrix.device.type == "cpu":
        return wide(matrix.dtype)
    return torch.bfloat16 if matrix.dtype is torch.int8 else matrix.dtype


class MambaLayer(nn.Module):
    """``r + dropout(mixer(norm(r)))`` on a residual r in fp32."""

    def __init__(self, config: MambaConfig, in_proj: RoutedLinear) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config, in_proj)
        self.dropout = config.dropout

    def forward(self, residual: Tensor, task: Task) -> Tensor:
        update = self.mixer(self._normed(residual), task)
        return residual + F.dropout(update, self.dropout, self.training)

    def prefill(self, residual: Tensor, task: Task, conv: Tensor, ssm: Tensor, fresh: bool) -> Tensor:
        return residual + self.mixer.prefill(self._normed(residual), task, conv, ssm, fresh)

    def _normed(self, residual: Tensor) -> Tensor:
        return self.norm(residual).to(activation_dtype(self.mixer.in_proj.weight))


class MambaBackbone(nn.Module):
    """A token table, the layers and the last norm; every layer's in_proj carries one adapter a task."""

    def __init__(
        self,
        config: MambaConfig,
        tasks: tuple[str, ...] = (),
        *,
        lora_rank: int = 8,
        lora_scale: float = 4.0,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Table(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            MambaLayer(
                config,
                RoutedLinear(
                    config.d_model, config.in_proj_dim, tasks,
                    rank=lora_rank, scale=lora_scale, dropout=lora_dropout,
                ),
            )
            for _ in range(config.n_layer)
        )  # fmt: skip
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.graphs = StepGraphs()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return activation_dtype(self.layers[0].mixer.in_proj.weight)

    def new_state(self, batch: int) -> MambaState:
        return MambaState.empty(self.config, batch, dtype=self.dtype, device=self.norm_f.weight.device)

    def forward(self, embeddings: Tensor, task: Task = BASE) -> Tensor:
        """embeddings (b, l, d_model) to the normed hidden states (b, l, d_model)."""
        residual = embeddings.to(wide(embeddings.dtype))
        for layer in self.layers:
            residual = layer(residual, task)
        return self.norm_f(residual).to(self.dtype)

    def prefill(self, embeddings: Tensor, state: MambaState, task: Task = BASE) -> Tensor:
        """Take (b, l, d_model) in by scan, advancing ``state``; the last position's hidden state (b, d_model)."""
        residual, fresh = embeddings.to(wide(embeddings.dtype)), state.position == 0
        for i, layer in enumerate(self.layers):
            residual = layer.prefill(residual, task, state.conv[i], state.ssm[i], fresh)
        state.position += embeddings.shape[1]
        return self.norm_f(residual[:, -1]).to(self.dtype)

    def prefill_packed(self, prompts: list[Tensor], task: Task = BASE) -> tuple[MambaState, Tensor]:
        """Prompts (l_i, d_model) of any lengths of at least 1, packed so that no padding is computed or enters a state.

        ``task`` is one id, or one a prompt. The states (``position`` is the longest's) and last hidden states.
        """
        device = prompts[0].device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        numbers = torch.arange(len(prompts), device=device).repeat_interleave(lengths)[None]
        ends = Packing(offsets, numbers.int())
        if isinstance(task, Tensor):
            task = task[numbers]
        packed = torch.cat(prompts)[None]
        residual = packed.to(wide(packed.dtype))
        state = self.new_state(len(prompts))
        for i, layer in enumerate(self.layers):
            update, conv, ssm = layer.mixer.prefill_packed(layer._normed(residual), task, ends)
            residual = residual + update
            state.conv[i], state.ssm[i] = conv, ssm
        state.position = int(lengths.max())
        return state, self.norm_f(residual[0, offsets[1:] - 1]).to(self.dtype)

    def bind_step(self, state: MambaState, task: Task = BASE, room: int | None = None) -> Step:
        """A function that takes one token in: (b, d_model) to its hidden state (b, d_model).

        Weights and states are looked up here, once: bind again after replacing one of them. On a CPU a step
        is one call of the native kernels. On a GPU it is a CUDA graph, in whose memory the state lives until
        ``release`` gives the graph back for the next; one for ``room`` rows serves fewer, None is as many as there
        are. It keeps no gradients; call it in inference mode.
        """
        if state.ssm.device.type in self.graphs.devices:
            return self.graphs.bind(self, state, task, room)
        return Step(self.record_step(state, task), state, wide(self.dtype))

    def record_step(self, state: MambaState, task: Task = BASE) -> Callable[[Tensor], Tensor]:
        """A step as one sequence of kernels, which changes the tensors that ``state`` has now."""
        dtype, eps = self.dtype, self.config.norm_eps
        mixers = [layer.mixer.bind_step(task, state.conv[i], state.ssm[i]) for i, layer in enumerate(self.layers)]
        norms = [*(layer.norm.weight for layer in self.layers), self.norm_f.weight]

        def advance(residual: Tensor) -> Tensor:
            normed = rmsnorm_fn(residual, norms[0], None, eps=eps)
            for mix, norm in zip(mixers, norms[1:], strict=True):
                normed = add_rmsnorm(residual, mix(normed.to(dtype)), norm, eps)
            return normed.to(dtype)

        example = state.ssm.new_empty(state.ssm.shape[1], self.config.d_model, dtype=wide(dtype))
        try:
            return capture(advance, example, changes=(state.conv, state.ssm))
        except CannotCapture:
            return advance  # another back end, fp64: kernel by kernel


class MambaLM(Pretrained, nn.Module):
    """A plain Mamba-2 language model: the backbone, and a head tied to its token table."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b, l) to logits (b, l, vocab_size) for the token after each."""
        return self.head(self.backbone(self.backbone.embedding(ids)))

    def head(self, hidden: Tensor) -> Tensor:
        return self.backbone.embedding.head(hidden)


@torch.no_grad()
def cast_matrices(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast tables, matrices and adapters to ``dtype`` in place; vectors and convolutions stay as they are.

    The vectors (dt_bias, A_log, D, norms, biases) weigh nothing and set the recurrence's precision. ``torch.int8``
    quantizes tables and matrices (``quantize_int8``) for decode; the adapters, which it would cost most, stay.
    """
    if dtype is torch.int8:
        return _quantized(model)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _quantized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (Linear, RoutedLinear, Table)) and module.weight_scale is None:
            if module.weight.is_meta:
                raise RuntimeError("int8 weights are made of numbers, of which meta has none: load the model first")
            weight, module.weight_scale = quantize_int8(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model
