"""omnimamba convert, from the command line: every way in and out, and nothing written where something is wrong."""

import json

import pytest
import torch

from omnimamba_model import T2I, MambaLM, OmniMamba, OmniMambaConfig, load, save
from omnimamba_model.adapters import save_adapter
from omnimamba_model.cli import main
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.pipeline import load_pixels
from omnimamba_model.text_tokenizer import WordTokenizer
from omnimamba_model.vq16 import VQ16


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_a_language_model_grows_into_an_omnimamba(lm, tmp_path, capsys):
    save(lm, tmp_path / "lm")
    assert convert(tmp_path / "lm", tmp_path / "out", "--as-omnimamba", "--dtype", "bfloat16") == 0
    grown = load(tmp_path / "out")
    said = capsys.readouterr().out
    assert isinstance(grown, OmniMamba) and "parameters; to draw and answer it needs" in said
    assert "--tokenizer and --image-tokenizer" in said
    rows = lm.config.vocab_size
    assert grown.config.backbone.vocab_size == 50288
    assert torch.equal(grown.backbone.embedding.weight[:rows], lm.backbone.embedding.weight.bfloat16())
    for name, tensor in lm.backbone.layers.state_dict().items():
        wanted = tensor.bfloat16() if tensor.ndim == 2 else tensor
        assert torch.equal(grown.backbone.layers.state_dict()[name], wanted), name


def test_an_adapter_goes_out_and_comes_back(model, tmp_path):
    save(model, tmp_path / "model", tokenizer='{"type": "words", "words": []}')
    assert convert(tmp_path / "model", tmp_path / "peft", "--task", "t2i") == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == model.config.lora_rank
    other = OmniMamba(model.config)
    save(other, tmp_path / "other")
    assert convert(tmp_path / "peft", tmp_path / "joined", "--base", tmp_path / "other", "--task", "mmu") == 0
    joined = load(tmp_path / "joined").backbone.layers[1].mixer.in_proj.adapter(0)
    for a, b in zip(joined, model.backbone.layers[1].mixer.in_proj.adapter(1), strict=True):
        assert torch.equal(a, b)


def test_what_draws_and_answers_still_does_once_converted(model, tmp_path):
    """The image tokenizer beside a checkpoint goes with it, and with the base of an adapter."""
    config = model.config
    pixels = PatchTokenizer(config.image_vocab_size, 2, (6, 6))
    save(model, tmp_path / "a", WordTokenizer(f"w{i}" for i in range(config.backbone.vocab_size - 8)).to_json())
    pixels.save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16") == 0
    assert convert(tmp_path / "a", tmp_path / "peft", "--task", "t2i") == 0
    assert convert(tmp_path / "peft", tmp_path / "c", "--base", tmp_path / "a", "--task", "t2i") == 0
    for folder in "bc":
        kept = load_pixels(tmp_path / folder)
        assert torch.equal(kept.codebook, pixels.codebook) and kept.size == pixels.size


def test_our_own_checkpoint_is_cast_and_keeps_its_tokenizer(model, tmp_path):
    save(model, tmp_path / "a", tokenizer='{"type": "words", "words": ["x"]}')
    assert convert(tmp_path / "a", tmp_path / "b", "--dtype", "float16") == 0
    assert load(tmp_path / "b").backbone.embedding.weight.dtype == torch.float16
    assert (tmp_path / "b" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "out"], "OWNER/NAME"),
        (["model", "out", "--base", "model"], "--base needs --task"),
        (["model", "out", "--task", "t2i", "--as-omnimamba"], "choose one"),
        (["model", "out", "--as-omnimamba"], "grows from a plain Mamba-2"),
        (["lm", "out", "--task", "mmu"], "belong on an OmniMamba"),
        (["model", "out", "--base", "model", "--task", "mmu"], "no PEFT adapter"),
        (["model", "out", "--image-tokenizer", "nowhere.pt"], "nowhere.pt does not exist"),
        (["model", "out", "--tokenizer", "model"], "tokenizer.json does not exist"),
        (["model", "out", "--task", "t2i", "--dtype", "float16"], "no other option goes with it"),
        (["lm", "out", "--image-tokenizer", "vq.pt"], "no use for an image tokenizer"),
        (["lm", "out", "--encoders", "a", "b"], "no use for an image tokenizer or encoders"),
        (["model", "out", "--encoders", "a", "b"], "encoders go with the published image tokenizer"),
        (["model", "out", "--task", "t2i", "--encoders", "a", "b"], "no other option goes with it"),
        (["lm", "out.gguf", "--encoders", "a", "b"], "only --dtype goes with it"),
        (["model", "out", "--image-tokenizer", "vq.pt"], "image_vocab_size is 24, but vq16.safetensors has 16384"),
        (["junk", "out"], "junk: tokenizer.json is not JSON"),
        (["folder", "out"], "model.safetensors cannot be read"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(model, lm, tmp_path, monkeypatch, capsys, arguments, message):
    save(model, tmp_path / "model")
    save(lm, tmp_path / "lm")
    save(model, tmp_path / "junk", tokenizer="{")
    save(model, tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    (tmp_path / "folder" / "model.safetensors").mkdir()
    if "vq.pt" in arguments:
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in VQ16().state_dict().items()}
        torch.save({name: torch.zeros(1, dtype=torch.half).expand(s) for name, s in shapes.items()}, tmp_path / "vq.pt")
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_computes_in_peft_what_it_computes_here(transformers_lm, tmp_path):
    """PEFT itself, around transformers' Mamba-2 in the same weights."""
    peft = pytest.importorskip("peft")
    plain = MambaLM.from_pretrained(tmp_path / "lm")
    model = OmniMamba(OmniMambaConfig.preset("tiny", backbone=plain.config))
    model.backbone.load_state_dict(plain.backbone.state_dict(), strict=False)
    for layer in model.backbone.layers:
        torch.nn.init.normal_(layer.mixer.in_proj.adapter(T2I)[1], std=0.3)
    save_adapter(model.eval(), "t2i", tmp_path / "peft")
    adapted = peft.PeftModel.from_pretrained(transformers_lm, str(tmp_path / "peft")).eval()
    ids = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.text_head(model.backbone(model.backbone.embedding(ids), T2I))
        torch.testing.assert_close(ours, adapted(ids).logits, rtol=1e-3, atol=1e-4)
        assert (ours - plain(ids)).abs().max() > 0.01  # the adapter is loud enough to be heard
