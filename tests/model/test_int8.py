"""int8 weights of a model: made at loading, close to the floats, one call a step, never saved."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnimamba_kernels import backends, dequantize_int8, native, use_backend
from omnimamba_model import OmniMamba, cast_matrices
from omnimamba_model.backbone import activation_dtype
from omnimamba_model.config import MMU, T2I
from omnimamba_model.embeddings import ImageEmbeddings, OmniBackbone, folded
from omnimamba_model.generation import draw, generate_text
from omnimamba_model.layers import Linear, RoutedLinear, Table
from omnimamba_model.weights import load, save


def dense(model: torch.nn.Module) -> torch.nn.Module:
    """The floats that a model's int8 weights stand for, put in their place."""
    for module in model.modules():
        if isinstance(module, (Linear, RoutedLinear, Table)):
            weight = dequantize_int8(module.weight, module.weight_scale)
            module.weight, module.weight_scale = torch.nn.Parameter(weight), None
    return model


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path)
    return tmp_path


def test_every_matrix_but_the_adapters_is_int8(folder):
    loaded = OmniMamba.from_pretrained(folder, dtype=torch.int8)
    kinds = {name: p.dtype for name, p in loaded.named_parameters() if p.ndim == 2}
    assert all((dtype is torch.int8) == ("_lora_" not in name) for name, dtype in kinds.items())
    assert loaded.backbone.dtype is torch.float32


def test_it_computes_what_its_weights_stand_for(folder, caption, image, features, text):
    got, want = load(folder, dtype=torch.int8), dense(load(folder, dtype=torch.int8))
    with torch.no_grad():
        for task, batch in (("t2i", (caption, image)), ("mmu", (features, text)), ("text", (text,))):
            a, b = getattr(got, task)(*batch), getattr(want, task)(*batch)
            assert torch.allclose(a.logits, b.logits, atol=1e-4 * float(b.logits.abs().max()))
    assert torch.equal(draw(got, caption), draw(want, caption))
    assert torch.equal(generate_text(got, text, 5), generate_text(want, text, 5))


def test_it_stays_close_to_the_floats(model, folder, caption, image):
    with torch.no_grad():
        exact, got = (m.t2i(caption, image).logits for m in (model, load(folder, dtype=torch.int8)))
    error = float((got - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.02, "a weight is off by at most 1 part in 254 of the largest of its 64"


@pytest.mark.parametrize("task", [T2I, MMU, torch.tensor([T2I, MMU])], ids=["t2i", "mmu", "mixed"])
def test_a_step_is_one_call(folder, task, monkeypatch):
    if backends()["native"]:
        pytest.skip(backends()["native"])
    model = load(folder, dtype=torch.int8)
    with torch.inference_mode():
        step = model.backbone.bind_step(model.backbone.new_state(2), task)
        monkeypatch.setattr(native, "call", None)  # kernels called one by one would not be found
        assert torch.isfinite(step(torch.randn(2, model.config.backbone.d_model))).all()


def test_autocast_leaves_int8_alone(folder, caption, image):
    model = load(folder, dtype=torch.int8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model.t2i(caption, image).logits
    with torch.no_grad():
        want = model.t2i(caption, image).logits
    assert torch.allclose(got.float(), want, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_what_int8_multiplies(device, dtype):
    """On meta as on a GPU, whose matrix units take 16 bits."""
    assert activation_dtype(torch.empty(2, 3, dtype=torch.int8, device=device)) is dtype


def test_int8_is_not_saved_and_needs_numbers(model, tmp_path):
    with pytest.raises(RuntimeError, match="meta"):
        cast_matrices(OmniMamba(model.config).to("meta"), torch.int8)
    with pytest.raises(ValueError, match="int8"):
        save(cast_matrices(model, torch.int8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_reference_takes_it_too(folder, caption):
    model = load(folder, dtype=torch.int8)
    with use_backend("reference"):
        plain = draw(model, caption)
    assert torch.equal(plain, draw(model, caption))


def test_an_adapter_merges_into_int8(folder, caption, image):
    model = load(folder, dtype=torch.int8)
    with torch.no_grad():
        apart = model.t2i(caption, image).logits
        model.merge(T2I)
        merged = model.t2i(caption, image).logits
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype is torch.int8
    assert 0 < float((merged - apart).norm() / apart.norm()) < 0.02


def test_folded_tables_look_up_what_the_int8_ones_make(folder, caption, image, monkeypatch):
    """Rounded to bf16, which costs less than int8 did."""
    model, exact = load(folder, dtype=torch.int8), load(folder)
    backbone = model.backbone
    tables = (
        (backbone.img_embeddings.word_embeddings, backbone.img_embeddings.project_in),
        (backbone.embedding, backbone.caption_embed.cap_proj),
    )
    with torch.no_grad():
        made = [then(table(torch.arange(table.num_embeddings))).bfloat16() for table, then in tables]
        truth, apart = exact.t2i(caption, image).logits, model.t2i(caption, image).logits
        with monkeypatch.context() as patch:  # the same rounding, each time
            patch.setattr(ImageEmbeddings, "forward", lambda self, ids: made[0][ids])
            patch.setattr(
                OmniBackbone, "embed_caption", lambda self, ids: made[1][ids] + self.pos_embed[:, : ids.shape[1]]
            )
            rounded = model.t2i(caption, image).logits
        model.fold()
        found = model.t2i(caption, image).logits
    for table, expected in zip((backbone.img_embeddings.folded, backbone.caption_embed.folded), made, strict=True):
        assert table.dtype is torch.bfloat16
        torch.testing.assert_close(table, expected, rtol=2**-7, atol=1e-6)  # one step of bf16 at most, where it ties
    assert torch.allclose(found, rounded, atol=1e-4 * float(rounded.abs().max()))
    assert (found - apart).norm() < (apart - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_folding_holds_a_table_once(dtype):
    """At its peak the table that is made and a few parts of it, never the table twice."""
    table, kept = cast_matrices(Table(4096, 64), dtype), Kept()
    with kept:
        found = folded(table, torch.nn.Identity(), rows=64)
    assert found.nbytes == 4096 * 64 * (4 if dtype is torch.float32 else 2) <= kept.peak < 1.25 * found.nbytes


class Kept(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still there, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.now += tensor.nbytes
                weakref.finalize(tensor.untyped_storage(), self.gone, tensor.nbytes)
        self.peak = max(self.peak, self.now)
        return made

    def gone(self, size):
        self.now -= size
