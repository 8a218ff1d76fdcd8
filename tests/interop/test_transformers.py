"""transformers' Mamba-2 computes the same on these kernels: prompts, cached decoding, training."""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.models.mamba2 import modeling_mamba2  # noqa: E402

from omnimamba_kernels.interop.transformers import _KERNELS, plug, plugged  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=32,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=2,
        num_hidden_layers=2,
        vocab_size=50,
        chunk_size=8,
    )
    return transformers.Mamba2ForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(1))


def counting(monkeypatch):
    """Counts the calls of each kernel that the plug binds."""
    calls = dict.fromkeys(_KERNELS, 0)
    for name, kernel in list(_KERNELS.items()):

        def counted(*args, _name=name, _kernel=kernel, **kwargs):
            calls[_name] += 1
            return _kernel(*args, **kwargs)

        counted.__signature__ = inspect.signature(kernel)
        monkeypatch.setitem(_KERNELS, name, counted)
    return calls


def test_a_prompt_gives_the_same_logits(model, ids, monkeypatch):
    calls = counting(monkeypatch)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with plugged(modeling_mamba2):
            got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert calls["mamba2_chunk_scan"] == calls["causal_conv1d_fn"] == 2


def test_cached_decoding_gives_the_same_tokens(model, ids, monkeypatch):
    calls = counting(monkeypatch)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    with plugged(modeling_mamba2):
        got = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)
    assert calls["mamba2_selective_state_update"] and calls["causal_conv1d_update"]


def test_training_gives_the_same_gradients(model, ids, monkeypatch):
    calls = counting(monkeypatch)
    model.train()
    found = []
    for run in (False, True):
        model.zero_grad()
        unplug = plug(modeling_mamba2) if run else lambda: None
        model(ids, labels=ids, use_cache=False).loss.backward()
        unplug()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-3, atol=1e-5, msg=name)
    assert calls["mamba2_split_conv1d_scan_combined"] == 2


def test_unplugging_puts_everything_back():
    before = {name: getattr(modeling_mamba2, name) for name in _KERNELS}
    unplug = plug()
    assert all(getattr(modeling_mamba2, name) is not function for name, function in before.items())
    unplug()
    assert all(getattr(modeling_mamba2, name) is function for name, function in before.items())


def test_a_module_of_another_kind_is_refused_untouched():
    with pytest.raises(ValueError, match="torch.nn.functional has no causal_conv1d_fn"):
        plug(modeling_mamba2, torch.nn.functional)
    assert not hasattr(modeling_mamba2.causal_conv1d_fn, "__wrapped__") or (
        modeling_mamba2.causal_conv1d_fn.__wrapped__ is not _KERNELS["causal_conv1d_fn"]
    )
