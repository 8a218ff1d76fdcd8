"""mamba_ssm's Mamba-2 layer on these kernels: against the maths, transformers' layer, and itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernels.mixer_oracle import mixer

from omnimamba_kernels import lora_linear, use_backend
from omnimamba_kernels.interop import mamba2
from omnimamba_kernels.interop.mamba2 import Mamba2, RMSNorm

SIZES = dict(d_model=12, d_state=8, d_conv=4, expand=2, headdim=4, chunk_size=8)
VARIANTS = {
    "plain": {},
    "groups": dict(ngroups=3),
    "norm before gate": dict(norm_before_gate=True, ngroups=2),
    "no norm": dict(rmsnorm=False),
    "D of every channel": dict(D_has_hdim=True),
    "an MLP beside": dict(d_ssm=16, ngroups=2),
    "biases": dict(bias=True, conv_bias=False),
    "limited steps": dict(dt_limit=(0.02, 0.05)),
    "limited steps, no norm, MLP": dict(dt_limit=(0.02, 0.05), rmsnorm=False, d_ssm=16),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
CLOSE = dict(rtol=1e-4, atol=1e-5)


def layer(seed=0, **variant):
    torch.manual_seed(seed)
    made = Mamba2(**{**SIZES, "layer_idx": 0, **variant})
    with torch.no_grad():
        made.D.uniform_(0.5, 2.0)
        if made.rmsnorm:
            made.norm.weight.uniform_(0.5, 2.0)
    return made


def tokens(b=2, l=19, seed=1):
    return torch.randn(b, l, SIZES["d_model"], generator=torch.Generator().manual_seed(seed))


def by_definition(layer, u):
    """The layer in fp64, position by position."""
    layer = layer.double()
    projected = layer.in_proj(u.double())
    conv = projected.new_zeros(len(u), layer.conv_dim, layer.d_conv - 1)
    state = projected.new_zeros(len(u), layer.nheads, layer.headdim, layer.d_state)
    D = layer.D.view(layer.nheads, -1) if layer.D_has_hdim else layer.D
    y, _, _ = mixer(
        projected, conv, state, layer.conv1d.weight[:, 0], layer.conv1d.bias, layer.dt_bias, -layer.A_log.exp(), D,
        layer.norm.weight if layer.rmsnorm else None, g=layer.ngroups, eps=1e-5,
        norm_before_gate=layer.norm_before_gate, dt_limit=layer.dt_limit,
    )  # fmt: skip
    return layer.out_proj(y)


@each_variant
def test_the_layer_is_its_definition(variant):
    got = layer(**variant)(tokens())
    with use_backend("reference"):
        want = by_definition(layer(**variant), tokens())
    torch.testing.assert_close(got.double(), want, **CLOSE)


@each_variant
@pytest.mark.parametrize("prompt", [1, 2, 11])
def test_a_prompt_and_then_steps_are_the_whole(variant, prompt):
    """States of a prompt shorter than the convolution too."""
    made, u = layer(**variant), tokens(l=14)
    cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with torch.no_grad():
        want = made(u)
        parts = [made(u[:, :prompt], inference_params=cache)]
        for t in range(prompt, 14):
            cache.seqlen_offset = t
            parts.append(made(u[:, t : t + 1], inference_params=cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, **CLOSE)


def test_steps_from_an_allocated_cache_are_the_whole():
    made, u = layer(), tokens(l=9)
    conv, ssm = made.allocate_inference_cache(2, 100)
    assert conv.shape == (2, made.conv_dim, 4) and ssm.shape == (2, 6, 4, 8)
    assert not conv.any() and not ssm.any()
    with torch.no_grad():
        got = torch.cat([made.step(u[:, t : t + 1], conv, ssm)[0] for t in range(9)], 1)
        torch.testing.assert_close(got, made(u), **CLOSE)


@pytest.mark.parametrize("limits", [{}, dict(dt_limit=(0.02, 0.05))], ids=["unlimited", "limited"])
def test_packed_sequences_are_each_alone(limits):
    made, u = layer(**limits), tokens(b=1, l=17)
    bounds = [0, 2, 9, 17]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 2 + [1] * 7 + [2] * 8], dtype=torch.int32)
    cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with torch.no_grad():
        alone = [made(u[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        want = torch.cat(alone, 1)
        torch.testing.assert_close(made(u, seq_idx=seq_idx), want, **CLOSE)
        torch.testing.assert_close(made(u, cu_seqlens=cu_seqlens), want, **CLOSE)
        torch.testing.assert_close(made(u, cu_seqlens=cu_seqlens, inference_params=cache), want, **CLOSE)
        cache.seqlen_offset = 8
        after = made(tokens(b=3, l=1, seed=2), inference_params=cache)
        for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            longer = torch.cat([u[:, a:b], tokens(b=3, l=1, seed=2)[i : i + 1]], 1)
            torch.testing.assert_close(after[i : i + 1], made(longer)[:, -1:], **CLOSE)


def test_rows_of_batch_and_length_together():
    made, u = layer(), tokens()
    torch.testing.assert_close(made(u.flatten(0, 1), seqlen=19), made(u).flatten(0, 1), rtol=0, atol=0)


@each_variant
def test_every_parameter_learns(variant):
    made = layer(**variant)
    made(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_a_prompt_keeps_no_graph_in_its_states():
    made = layer()
    cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    made(tokens(), inference_params=cache)
    assert not any(state.requires_grad for state in cache.key_value_memory_dict[0])


def test_the_numbers_of_a_fresh_layer_lie_where_they_are_said_to():
    made = Mamba2(256, headdim=8, A_init_range=(2, 5), dt_min=0.01, dt_max=0.2, conv_init=0.1)
    dt, decay = torch.nn.functional.softplus(made.dt_bias), made.A_log.exp()
    assert 0.0099 < dt.min() < 0.02 and 0.1 < dt.max() < 0.201
    assert 2 <= decay.min() < 2.5 and 4.5 < decay.max() <= 5.001
    assert 0.09 < made.conv1d.weight.abs().max() <= 0.1
    assert made.dt_bias._no_weight_decay and made.A_log._no_weight_decay and made.D._no_weight_decay


def test_transformers_layer_has_the_same_parameters_and_result():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = modeling.Mamba2Config(
        hidden_size=12, num_heads=6, head_dim=4, state_size=8, n_groups=1, chunk_size=8, use_bias=False,
    )  # fmt: skip
    theirs, ours = modeling.Mamba2Mixer(config, layer_idx=0).eval(), layer()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_layers_stay_near_the_wide_one(dtype):
    made, u = layer(), tokens(l=6)
    narrow = layer().to(dtype)
    narrow.load_state_dict(made.to(dtype).state_dict())
    wide = made.float()
    conv, ssm = narrow.allocate_inference_cache(2, 6, dtype=torch.float32)
    with torch.no_grad():
        want = wide(u)
        stepped = torch.cat([narrow.step(u[:, t : t + 1].to(dtype), conv, ssm)[0] for t in range(6)], 1)
        for got in (narrow(u.to(dtype)), stepped):
            assert got.dtype is dtype
            assert (got.float() - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


def test_a_step_on_a_cpu_reads_narrow_weights_once(monkeypatch):
    """By lora_linear; whole sequences are the matrix library's."""
    rows = []

    def counted(x, *rest, **given):
        rows.append(len(x))
        return lora_linear(x, *rest, **given)

    monkeypatch.setattr(mamba2, "lora_linear", counted)
    made = layer().bfloat16()
    made.step(tokens(l=1).bfloat16(), *made.allocate_inference_cache(2, 1))
    assert rows == [2, 2]
    made(tokens().bfloat16())
    assert rows == [2, 2]


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_the_norm_is_its_definition(norm_before_gate, gated):
    norm = RMSNorm(24, eps=1e-3, group_size=8, norm_before_gate=norm_before_gate, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, z = torch.randn(2, 5, 24).double(), torch.randn(2, 5, 24).double()
    gate = z * torch.sigmoid(z) if gated else torch.ones_like(z)
    u = (x if norm_before_gate else x * gate).view(2, 5, 3, 8)
    u = (u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(x, z if gated else None), u * gate if norm_before_gate else u)
    norm.reset_parameters()
    assert (norm.weight == 1).all()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (dict(headdim=5), "headdim"),
        (dict(ngroups=4), "ngroups"),
        (dict(d_ssm=28), "d_ssm"),
        (dict(process_group=object()), "process_group"),
    ],
)
def test_sizes_that_do_not_fit_are_named(given, names):
    with pytest.raises(ValueError, match=names):
        layer(**given)


def test_a_step_of_two_tokens_is_refused_and_states_need_a_place():
    made = layer()
    with pytest.raises(ValueError, match="one token"):
        made.step(tokens(l=2), *made.allocate_inference_cache(2, 2))
    with pytest.raises(ValueError, match="layer_idx"):
        layer(layer_idx=None)(tokens(), inference_params=SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}))
