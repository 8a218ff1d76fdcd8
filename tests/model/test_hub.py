"""Models by name: the hub, the official release's folder, PEFT's own folders, and the tokenizer that goes along."""

import json
import shutil
import sys

import pytest
import torch

from omnimamba_model import MMU, T2I, CheckpointError, MambaLM, OmniMamba, OmniMambaConfig, load, save
from omnimamba_model.adapters import load_adapter
from omnimamba_model.cli import main
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.text_tokenizer import ADDED, WordTokenizer
from omnimamba_model.weights import read_tokenizer


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- the tokenizer ----


def test_a_loaded_models_tokenizer_is_saved_with_it(folder, tmp_path):
    text = read_tokenizer(folder)
    model = OmniMamba.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again") == text == model.tokenizer
    PatchTokenizer.load(folder).save(tmp_path / "again")
    assert Pipeline.load(tmp_path / "again").words.words == WordTokenizer.from_json(text).words
    other = WordTokenizer(["another"]).to_json()
    model.save_pretrained(tmp_path / "other", tokenizer=other)
    assert read_tokenizer(tmp_path / "other") == other
    OmniMamba(model.config).save_pretrained(tmp_path / "none")
    assert read_tokenizer(tmp_path / "none") is None


def test_the_tokenizer_beside_another_projects_weights_goes_with_them(lm, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = mamba_ssm(lm, tmp_path / "theirs")
    vocab = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 50277)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    text = read_tokenizer(source)
    MambaLM.from_pretrained(source).save_pretrained(tmp_path / "ours")
    assert convert(source, tmp_path / "converted") == 0
    assert read_tokenizer(tmp_path / "ours") == read_tokenizer(tmp_path / "converted") == text
    for place in (source, tmp_path / "ours"):  # the published additions come with the published formats
        assert convert(place, tmp_path / "grown", "--as-omnimamba") == 0
        found = tokenizers.Tokenizer.from_str(read_tokenizer(tmp_path / "grown"))
        assert [found.token_to_id(token) for token in ADDED] == list(range(50277, 50287))


def test_an_omnimamba_does_not_grow_with_another_tokenizer(lm, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    save(lm, tmp_path / "lm", tokenizer=WordTokenizer([f"w{i}" for i in range(9)]).to_json())
    assert convert(tmp_path / "lm", tmp_path / "out", "--as-omnimamba") == 2
    assert "tokenizer" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_llamagens_file_alone_in_a_folder_and_on_the_hub(folder, hub, tmp_path, monkeypatch):
    seen = []

    def read(path):
        seen.append(path.read_text())
        raise CheckpointError("far enough")

    monkeypatch.setattr("omnimamba_model.pipeline.read_official_vq", read)
    for i, place in enumerate((tmp_path / "vq", hub / "owner" / "vq")):
        place.mkdir(parents=True)
        (place / "vq_ds16_t2i.pt").write_text(f"file {i}")
    for name in (tmp_path / "vq" / "vq_ds16_t2i.pt", tmp_path / "vq", "owner/vq"):
        assert convert(folder, tmp_path / "out", "--image-tokenizer", name) == 2
    assert seen == ["file 0", "file 0", "file 1"]


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError("404 Client Error.\n\nRepository Not Found for url: https://hub/x"), "404 Client Error."),
        (RuntimeError("[Errno -2] Name or service not known"), "[Errno -2] Name or service not known"),
        (ValueError(), "ValueError()"),
    ],
)
def test_a_relative_folder_that_is_not_there_is_not_taken_for_the_hubs(tmp_path, monkeypatch, capsys, error, reason):
    """Mistyped, or yet to be trained: whatever the hub says of it, both are told in a line."""
    library = pytest.importorskip("huggingface_hub")

    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    told = f"runs/model is no folder or file here, and the hub does not give it: {reason}; "
    with pytest.raises(FileNotFoundError) as raised:
        OmniMamba.from_pretrained("runs/model")
    assert str(raised.value).startswith(told) and "\n" not in str(raised.value)
    assert main(["generate", "--checkpoint", "runs/model", "--prompt", "a cat", "--out", "cat.png"]) == 2
    assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="runs/model is no folder or file here; to download it: pip install"):
        OmniMamba.from_pretrained("runs/model")


# ---- a folder with the official file ----


def mamba_ssm(lm: MambaLM, folder, **ssm):
    folder.mkdir(parents=True)
    cfg = lm.config
    sizes = {"d_model": cfg.d_model, "n_layer": cfg.n_layer, "vocab_size": cfg.vocab_size, "rms_norm": True}
    ssm = {"layer": "Mamba2", "ngroups": cfg.ngroups, **ssm}
    (folder / "config.json").write_text(json.dumps(sizes | {"ssm_cfg": ssm}))
    torch.save(lm.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_a_config_beside_the_official_file(official, tmp_path):
    """Whoever's it is, the sizes are the tensors'; this package's own may say more."""
    model, release = official
    PatchTokenizer(40, 2, (4, 6)).save(release)  # its own .safetensors hold no model
    theirs = {"d_model": 32, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2", "chunk_size": 128}}
    ours = OmniMambaConfig(**{**vars(model.config), "image_tokens": 200, "text_slots": 124})
    for values in ({}, {"model_type": "OmniMamba"}, theirs, {"model_type": "omnimamba", **ours.to_dict()}):
        (release / "config.json").write_text(json.dumps(values))
        found = OmniMamba.from_pretrained(release)
        assert same(found, model)
        assert found.config.backbone.chunk_size == (128 if values is theirs else 256)
        assert found.config.image_tokens == (200 if "backbone" in values else 256)
    (release / "config.json").write_text(
        json.dumps(theirs | {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}})
    )
    with pytest.raises(CheckpointError, match="ssm_cfg.norm_before_gate = True"):
        OmniMamba.from_pretrained(release)


def test_the_official_release_of_the_hub_is_converted(official, hub, tmp_path):
    model, release = official
    (release / "config.json").write_text("{}")
    shutil.copytree(release, hub / "owner" / "release")
    assert same(OmniMamba.from_pretrained("owner/release"), model)
    with pytest.raises(FileNotFoundError, match="owner/release at v1, local_files_only=True"):
        OmniMamba.from_pretrained("owner/release", revision="v1", local_files_only=True)
    assert convert("owner/release", tmp_path / "out") == 0 and same(load(tmp_path / "out"), model)


def test_a_folder_of_several_official_files_is_not_guessed_at(official):
    _, release = official
    shutil.copy(release / "OmniMamba-1.3b.pth", release / "OmniMamba-370m.pth")
    with pytest.raises(CheckpointError, match=r"holds 2 models; name one: .*1\.3b\.pth, .*370m\.pth"):
        OmniMamba.from_pretrained(release)


def test_weights_in_another_form_come_before_the_official_file(official, model):
    _, release = official
    save(model, release)
    assert same(OmniMamba.from_pretrained(release), model)


def test_sharded_pickles(lm, hub, tmp_path):
    """As transformers wrote them; an image tokenizer's safetensors beside them hold no model."""
    folder = mamba_ssm(lm, hub / "theirs" / "sharded")
    (folder / "pytorch_model.bin").unlink()
    PatchTokenizer(16, 2, (4, 6)).save(folder)
    names, tensors = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)], lm.state_dict()
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(MambaLM.from_pretrained("theirs/sharded"), lm) and same(MambaLM.from_pretrained(folder), lm)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "config.json"}}))
    with pytest.raises(CheckpointError, match="must name .bin files beside it, got 'config.json'"):
        MambaLM.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    torch.save(tensors, folder / names[1])
    with pytest.raises(CheckpointError, match="stores again what another shard has: .*backbone.embedding.weight"):
        MambaLM.from_pretrained(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor pytorch_model.bin"):
        MambaLM.from_pretrained(folder)


def test_a_tensor_in_two_shards_is_named(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=20_000)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="two shards store "):
        load(tmp_path)


# ---- options of other projects' configs ----


@pytest.mark.parametrize(
    "name, value, supported",
    [
        ("norm_before_gate", True, "false"),
        ("rmsnorm", False, "true"),
        ("D_has_hdim", True, "false"),
        ("dt_limit", [0.0, 0.1], "0 to infinity"),
        ("dt_limit", [0.001, float("inf")], "0 to infinity"),
        ("activation", "relu", "silu"),
        ("bias", True, "false"),
        ("conv_bias", False, "true"),
        ("layer", "Mamba1", "Mamba2"),
        ("of_tomorrow", 3, None),
    ],
)
def test_an_option_that_changes_the_maths_is_refused_by_name(lm, tmp_path, name, value, supported):
    told = "unknown" if supported is None else f"supported: {supported}"
    with pytest.raises(CheckpointError) as error:
        MambaLM.from_pretrained(mamba_ssm(lm, tmp_path / "theirs", **{name: value}))
    assert f"ssm_cfg.{name} = {value!r} ({told})" in str(error.value)


@pytest.mark.parametrize("name", ["d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups"])
def test_a_size_unlike_the_tensors_is_named(lm, tmp_path, name):
    stored = {**vars(lm.config), "d_ssm": lm.config.d_inner}[name]
    told = (
        "must be a multiple of ngroups"
        if name == "ngroups"
        else f"{name} = {stored + 1}, but the tensors have {stored}"
    )
    with pytest.raises(CheckpointError, match=told):
        MambaLM.from_pretrained(mamba_ssm(lm, tmp_path / "theirs", **{name: stored + 1}))


def test_options_that_leave_the_maths_are_read(lm, tmp_path):
    fine = {"norm_before_gate": False, "rmsnorm": True, "D_has_hdim": False, "dt_limit": [0.0, float("inf")]}
    fine |= {"d_state": lm.config.d_state, "headdim": lm.config.headdim, "d_ssm": None, "conv_bias": True}
    fine |= {"A_init_range": [1, 16], "dt_min": 0.001, "use_mem_eff_path": False, "chunk_size": 32}
    found = MambaLM.from_pretrained(mamba_ssm(lm, tmp_path / "theirs", **fine))
    assert same(found, lm) and found.config.chunk_size == 32


# ---- adapters ----


@pytest.fixture
def peft_folder(transformers_lm, tmp_path):
    """An adapter folder that PEFT wrote, the Mamba-2 that it is on, and what both give for ids together."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["in_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformers_lm, config).eval()
    adapted.save_pretrained(tmp_path / "peft")
    ids = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tmp_path / "peft", MambaLM.from_pretrained(tmp_path / "lm"), ids, adapted(ids).logits


def around(plain: MambaLM, **sizes: int) -> OmniMamba:
    model = OmniMamba(OmniMambaConfig.preset("tiny", backbone=plain.config, **sizes))
    model.backbone.load_state_dict(plain.backbone.state_dict(), strict=False)
    return model.eval()


def test_what_peft_wrote_computes_here_what_it_computes_there(peft_folder, hub, tmp_path, capsys):
    """From a folder and from the hub, adapter and base alike; from safetensors and from PEFT's older pickles."""
    adapter, plain, ids, expected = peft_folder
    save(around(plain), hub / "owner" / "base")
    shutil.copytree(adapter, hub / "owner" / "adapter")
    assert convert(adapter, tmp_path / "a", "--base", hub / "owner" / "base", "--task", "mmu") == 0
    assert convert("owner/adapter", tmp_path / "b", "--base", "owner/base", "--task", "mmu") == 0
    from safetensors.torch import load_file

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    load_adapter(old := around(plain), "mmu", adapter)
    for model in (load(tmp_path / "a"), load(tmp_path / "b"), old):
        with torch.no_grad():
            ours = model.text_head(model.backbone(model.backbone.embedding(ids), 0))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert (ours - plain(ids)).abs().max() > 0.01  # the adapter is loud enough to be heard


def test_an_adapter_wider_than_the_models_own_widens_them(peft_folder, tmp_path):
    adapter, plain, ids, expected = peft_folder
    base = around(plain, lora_rank=1, lora_alpha=3.0)
    for layer in base.backbone.layers:
        torch.nn.init.normal_(layer.mixer.in_proj.adapter(T2I)[1], std=0.3)
    save(base, tmp_path / "base")
    with pytest.raises(CheckpointError, match="r must lie in 1..1, the model's own rank, got 2"):
        load_adapter(base, "mmu", adapter)
    assert convert(adapter, tmp_path / "out", "--base", tmp_path / "base", "--task", "mmu") == 0
    model = load(tmp_path / "out")
    assert (model.config.lora_rank, model.config.lora_scale) == (2, base.config.lora_scale)
    with torch.no_grad():
        hidden = {task: [m.backbone(m.backbone.embedding(ids), task) for m in (base, model)] for task in (MMU, T2I)}
        torch.testing.assert_close(model.text_head(hidden[MMU][1]), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(*hidden[T2I])
        assert (hidden[T2I][0] - hidden[MMU][0]).abs().max() > 0.01
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))  # unlike its weights
    assert convert(adapter, tmp_path / "none", "--base", tmp_path / "base", "--task", "mmu") == 2


def test_an_adapter_alone_tells_what_to_do(peft_folder, tmp_path, capsys):
    adapter = peft_folder[0]
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*--base OMNIMAMBA --task mmu \(or t2i\)"):
        OmniMamba.from_pretrained(adapter)
    assert convert(adapter, tmp_path / "out") == 2 and convert(adapter, tmp_path / "out", "--task", "mmu") == 2
    assert capsys.readouterr().err.count(f"omnimamba convert {adapter} TARGET --base OMNIMAMBA") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_adapters_that_change_the_weights_under_them_are_refused(peft_folder, begun):
    adapter, plain, *_ = peft_folder
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": begun}))
    with pytest.raises(CheckpointError, match=f"no plain LoRA: init_lora_weights = '{begun}'"):
        load_adapter(around(plain), "mmu", adapter)
