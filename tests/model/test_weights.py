import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba_model import CheckpointError, MambaLM, OmniMamba, OmniMambaConfig, cast_matrices, load, save
from omnimamba_model.weights import read_tokenizer


@pytest.mark.parametrize("kind", ["model", "lm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_for_bit(request, tmp_path, kind, dtype):
    model = cast_matrices(request.getfixturevalue(kind), dtype)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model) and again.config == model.config and not again.training
    saved, loaded = model.state_dict(), again.state_dict()
    assert list(saved) == list(loaded)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_a_loaded_model_computes_and_trains(model, caption, image, tmp_path):
    save(model, tmp_path)
    again = load(tmp_path)
    expected, result = model.t2i(caption, image), again.t2i(caption, image)
    assert torch.equal(result.logits, expected.logits)
    result.loss.backward()
    assert again.backbone.embedding.weight.grad is not None


def test_the_file_holds_each_table_once(model, tmp_path):
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "head" in name]
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())


def test_tokenizer_travels_along(model, tmp_path):
    save(model, tmp_path / "without")
    save(model, tmp_path / "with", tokenizer='{"a": "é"}')
    assert read_tokenizer(tmp_path / "without") is None
    assert read_tokenizer(tmp_path / "with") == '{"a": "é"}'


def test_misfits_are_all_listed(model, tmp_path):
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.nonsense"] = torch.zeros(2)
    tensors["backbone.norm_f.weight"] = torch.zeros(7)
    del tensors["backbone.layers.1.mixer.D"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert "missing backbone.layers.1.mixer.D (4,)" in str(error.value)
    assert "unknown backbone.nonsense (2,)" in str(error.value)
    assert "backbone.norm_f.weight has shape (7,), expected (32,)" in str(error.value)


def test_damaged_folders_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(tmp_path)
    save(model, tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors does not exist"):
        load(tmp_path)
    weights.write_bytes(whole)
    for text, message in [
        ("{", "is not JSON"),
        ('{"model_type": "gpt"}', "model_type is one of omnimamba, mamba2"),
        ('{"model_type": ["omnimamba"]}', "model_type is one of omnimamba, mamba2, got"),
        ("[" * 100_000, "is not JSON"),
        ('{"d_model": ' + "9" * 5000 + "}", "is not JSON"),
        (json.dumps({"model_type": "omnimamba", "d_modle": 2}), "has no field d_modle"),
        (json.dumps({"model_type": "mamba2", "d_model": -2}), "d_model must be a whole number"),
    ]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_weights_of_no_floating_dtype_are_named(model, tmp_path):
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for dtype in (torch.int64, torch.float8_e4m3fn):
        name = "backbone.norm_f.weight"
        save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"must be float16, bfloat16, float32, float64, got {name} "):
            load(tmp_path)


def test_a_tokenizer_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="tokenizer.json is not UTF-8"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("part", [None, 50_000], ids=["whole", "shards"])
@pytest.mark.parametrize("fails", [1, 2, 3, "config.json"])
def test_a_failed_save_of_another_model_leaves_the_old_one(model, tmp_path, monkeypatch, part, fails):
    """Its config too, without which its weights are of no use; and no shards that nobody names."""
    sizes = {} if part is None else {"max_shard_bytes": part}
    save(model, tmp_path, "{}", **sizes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other, written = OmniMamba(OmniMambaConfig.preset("tiny", lora_rank=2)), []

    def fill(tensors, path, metadata):
        written.append(path)
        if len(written) == fails:
            path.write_bytes(b"half")
            raise OSError("disk full")
        save_file(tensors, path, metadata=metadata)

    def text(path, *given, **options):
        if str(fails) in path.name:
            raise OSError("disk full")
        return plain(path, *given, **options)

    plain = Path.write_text
    monkeypatch.setattr("omnimamba_model.weights.save_file", fill)
    monkeypatch.setattr(Path, "write_text", text)
    if part is None and fails in (2, 3):
        fails = 1
    with pytest.raises(OSError, match="disk full"):
        save(other, tmp_path, **sizes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load(tmp_path).config == model.config
    fails = None
    save(other, tmp_path, **sizes)
    assert load(tmp_path).config == other.config


def test_an_interruption_right_behind_the_index_loses_no_shard(model, tmp_path, monkeypatch):
    replace = os.replace

    def replaced(source, target):
        replace(source, target)
        if Path(target).name == "model.safetensors.index.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path, max_shard_bytes=50_000)
    found = load(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_save_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("omnimamba_model.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert isinstance(load(tmp_path), OmniMamba) and not isinstance(load(tmp_path), MambaLM)
