"""Checkpoints of other projects: official OmniMamba, mamba_ssm's and transformers' Mamba-2, PEFT's adapters."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba_model import CheckpointError, MambaConfig, MambaLM, OmniMamba, OmniMambaConfig, load, save
from omnimamba_model.adapters import load_adapter, save_adapter
from omnimamba_model.foreign import is_foreign, read_foreign

PREFIX = "llm_backbone.mamba."
TIED = {
    "lm_head.weight": "backbone.embedding.weight",
    "img_head.weight": "backbone.img_embeddings.word_embeddings.weight",
}


@pytest.fixture
def official() -> OmniMamba:
    """Small, with what no shape tells as it was published."""
    torch.manual_seed(0)
    backbone = dict(d_model=32, n_layer=2, d_state=16, headdim=16)
    sizes = dict(image_vocab_size=40, image_features=5, feature_dim=12, mmu_positions=800, lora_rank=4)
    return OmniMamba(OmniMambaConfig(MambaConfig(**backbone), **sizes | {"image_features": 729})).half().eval()


def official_tensors(model: OmniMamba, heads: bool) -> dict[str, torch.Tensor]:
    tensors = model.state_dict()
    tensors |= {head: tensors[table].clone() for head, table in TIED.items()} if heads else {}
    frozen = {"vision_backbone.dino.w": torch.ones(1), "llm_backbone.vqvae.encoder.w": torch.ones(1)}
    return frozen | {name if name.startswith("projector.") else PREFIX + name: t for name, t in tensors.items()}


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("heads", [True, False])
def test_the_official_file_round_trips_bit_for_bit(official, tmp_path, heads):
    file = tmp_path / "OmniMamba-1.3b.pth"
    torch.save(official_tensors(official, heads), file)
    assert is_foreign(file) and is_foreign(tmp_path)
    for found in (read_foreign(file), OmniMamba.from_pretrained(tmp_path)):
        assert found.config == official.config and same(found, official)
    found.save_pretrained(tmp_path / "saved", max_shard_bytes=50_000)
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 1
    assert same(OmniMamba.from_pretrained(tmp_path / "saved"), official)


def test_a_head_of_another_model_is_refused(official, tmp_path):
    tensors = official_tensors(official, heads=True)
    tensors[PREFIX + "lm_head.weight"][3, 3] += 1
    torch.save({"model": tensors}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        read_foreign(tmp_path / "x.pth")


@torch.no_grad()
def test_tensors_in_one_memory_become_tensors_of_their_own(official, tmp_path):
    """A pickle can hold one matrix twice, a matrix within another, and one number as all of a matrix."""
    names = [f"backbone.layers.{i}.mixer.in_proj.weight" for i in range(2)]
    small, constant = "backbone.layers.1.mixer.out_proj.weight", "backbone.layers.0.mixer.out_proj.weight"
    stored = official_tensors(official, heads=False)
    one, within = stored[PREFIX + names[0]], stored[PREFIX + small]
    stored[PREFIX + names[1]] = one
    stored[PREFIX + small] = one.flatten()[7 : 7 + within.numel()].view_as(within)
    stored[PREFIX + constant] = torch.full((1, 1), 0.5).half().expand_as(within)
    torch.save(stored, tmp_path / "OmniMamba-1.3b.pth")
    found = OmniMamba.from_pretrained(tmp_path)
    held = dict(found.named_parameters())
    assert all(torch.equal(held[n], stored[PREFIX + n]) for n in (*names, small, constant))
    held[names[0]].zero_()
    held[constant].view(-1)[0] = 2
    assert held[names[1]].any() and held[small].any() and held[constant].view(-1)[1] == 0.5
    found.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())


def test_all_that_does_not_fit_is_listed(official, tmp_path):
    tensors = official_tensors(official, heads=False)
    del tensors[PREFIX + "backbone.layers.1.mixer.D"]
    tensors[PREFIX + "backbone.surplus"] = torch.ones(2)
    tensors[PREFIX + "backbone.norm_f.weight"] = torch.ones(3)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        read_foreign(tmp_path / "x.pth")
    for part in ("missing backbone.layers.1.mixer.D (2,)", "unknown backbone.surplus (2,)", "expected (32,)"):
        assert part.replace("(2,)", "") in str(error.value)


def test_all_that_would_tell_the_sizes_and_does_not_is_listed(official, lm, tmp_path):
    tensors = official_tensors(official, heads=False)
    for name in (PREFIX + "backbone.pos_embed", "projector.projector.0.weight"):
        del tensors[name]
    tensors[PREFIX + "backbone.layers.0.mixer.A_log"] = torch.ones(2, 2)
    tensors[PREFIX + "backbone.mmu_pos_embed"] = torch.ones(1, 0, 32)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        read_foreign(tmp_path / "x.pth")
    layer, told = "backbone.layers.0.mixer.", str(error.value)
    assert "it lacks projector.projector.0.weight, backbone.pos_embed; " in told
    assert f"{layer}A_log has shape (2, 2), expected 1 sizes" in told
    assert "backbone.mmu_pos_embed has shape (1, 0, 32), expected 3 sizes" in told
    (tmp_path / "config.json").write_text(json.dumps({"rms_norm": True, "ssm_cfg": {"layer": "Mamba2"}}))
    lacking = (layer + "A_log", layer + "conv1d.weight")
    torch.save({n: t for n, t in lm.state_dict().items() if n not in lacking}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=", ".join(lacking)):
        read_foreign(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def save_with(path, program: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as changed:
        for name, content in members.items():
            changed.writestr(name, program if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b"\x80\x02X\x01"), "whole file of torch.save"),  # a text of no length
        (lambda path: save_with(path, b"\x80\x02K\x07Q."), "whole file of torch.save"),  # a storage named 7
        (lambda path: torch.save({"a": Evil()}, path), "more than tensors"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "more than tensors"),
        (lambda path: torch.save({"a": torch.ones(3), "b": [1]}, path), "these are none: b"),
        (lambda path: torch.save([1], path), "tensors by name, got list"),
        (lambda path: path.write_bytes(b""), "whole file of torch.save"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not a zip"), "not a whole|damaged"),
        (lambda path: torch.save({"a": torch.ones(3)}, path), "it lacks"),
        (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "dense tensors with values.*: a"),
        (lambda path: torch.save({"b": torch.ones(3, device="meta")}, path), "dense tensors with values.*: b"),
    ],
)  # fmt: skip
def test_malicious_and_damaged_pickles(tmp_path, capfd, write, message):
    path = tmp_path / "OmniMamba.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_foreign(path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)  # how to run it after all
    assert "never run" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64, torch.bool])
def test_weights_of_other_dtypes_are_named(official, tmp_path, dtype):
    name = "backbone.norm_f.weight"
    tensors = official_tensors(official, heads=False)
    torch.save(tensors | {PREFIX + name: tensors[PREFIX + name].to(dtype)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"must be float16, bfloat16, float32, float64, got {name} "):
        read_foreign(tmp_path / "x.pth")


def test_a_truncated_official_file(official, tmp_path):
    path = tmp_path / "OmniMamba.pth"
    torch.save(official_tensors(official, heads=False), path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match="not a whole|damaged"):
        read_foreign(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mamba2_of_transformers(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        num_heads=4, head_dim=16, vocab_size=48, hidden_size=32, state_size=16, num_hidden_layers=2, n_groups=2,
        chunk_size=16, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    if not tied:
        with pytest.raises(CheckpointError, match="ties them"):
            read_foreign(tmp_path)
        return
    ours = MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(48, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_mamba2_of_mamba_ssm(lm, tmp_path):
    cfg = lm.config
    values = {
        "d_model": cfg.d_model, "n_layer": cfg.n_layer, "vocab_size": cfg.vocab_size, "rms_norm": True,
        "ssm_cfg": {"layer": "Mamba2", "ngroups": cfg.ngroups}, "residual_in_fp32": True, "tie_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(lm.state_dict() | {"lm_head.weight": lm.backbone.embedding.weight.data}, tmp_path / "pytorch_model.bin")
    found = MambaLM.from_pretrained(tmp_path)
    assert same(found, lm) and (found.config.ngroups, found.config.d_state) == (cfg.ngroups, cfg.d_state)
    for groups in (0, "2", None):
        ssm = {"layer": "Mamba2", "ngroups": groups}
        (tmp_path / "config.json").write_text(json.dumps(values | {"ssm_cfg": ssm}))
        with pytest.raises(CheckpointError, match="ngroups must be a whole number"):
            read_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"ssm_cfg": {"layer": "Mamba1"}}))
    with pytest.raises(CheckpointError, match="another architecture"):
        read_foreign(tmp_path)


def test_the_wrong_class_is_named(lm, tmp_path):
    save(lm, tmp_path)
    with pytest.raises(CheckpointError, match="holds a MambaLM, not a OmniMamba"):
        OmniMamba.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="OWNER/NAME"):
        OmniMamba.from_pretrained(tmp_path / "nowhere")


# ---- adapters ----


def test_adapters_travel_through_peft_files(model, tmp_path):
    save_adapter(model, "t2i", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == model.config.lora_alpha
    other = OmniMamba(model.config)
    load_adapter(other, "t2i", tmp_path)
    for mine, theirs in zip(model.backbone.layers, other.backbone.layers, strict=True):
        for a, b in zip(mine.mixer.in_proj.adapter(1), theirs.mixer.in_proj.adapter(1), strict=True):
            assert torch.equal(a, b)
        assert not theirs.mixer.in_proj.adapter(0)[1].any()  # the other task's stay


def test_a_smaller_rank_and_another_scale_compute_the_same(model, tmp_path):
    save_adapter(model, "mmu", tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    tensors = {n: t[:2] if "lora_A" in n else t[:, :2] for n, t in load_file(weights).items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, weights)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"r": 2, "lora_alpha": 3.0}))
    load_adapter(model, "mmu", tmp_path)
    project = model.backbone.layers[1].mixer.in_proj
    x = torch.randn(5, project.weight.shape[1])
    name = "base_model.model.backbone.layers.1.mixer.in_proj.lora_{}.weight"
    expected = x @ project.weight.T + 1.5 * x @ tensors[name.format("A")].T @ tensors[name.format("B")].T
    torch.testing.assert_close(project(x, 0), expected)


def test_unfit_adapters_change_nothing(model, tmp_path):
    save_adapter(model, "mmu", tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    broken = dict(tensors)
    first = next(iter(broken))
    broken["head.lora_A.weight"] = broken.pop(first)
    for write, message in [
        (lambda: save_file(broken, weights), "unknown head.lora_A.weight"),
        (lambda: weights.write_bytes(b"x"), "not a whole"),
        (lambda: config.write_text(json.dumps(values | {"use_dora": True})), "use_dora = True"),
        (lambda: config.write_text(json.dumps(values | {"r": 999})), "r must lie in"),
        (lambda: config.write_text(json.dumps(values | {"alpha_pattern": {"in_proj": 3}})), "alpha_pattern = "),
        (lambda: config.write_text(json.dumps(values | {"lora_alpha": float("nan")})), "lora_alpha must be finite"),
        (lambda: config.write_text("[]"), "object with r"),
        (lambda: config.unlink(), "no PEFT adapter"),
    ]:
        write()
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, "mmu", tmp_path)
    config.write_text(json.dumps(values))
    weights.unlink()
    weights.mkdir()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors cannot be read"):
        load_adapter(model, "mmu", tmp_path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="task must be one of"):
        save_adapter(model, "vqa", tmp_path)


def test_sharded_folders(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=20_000)
    first = {p.name for p in tmp_path.glob("model-*")}
    assert same(load(tmp_path), model) and not (tmp_path / "model.safetensors").exists()
    save(model, tmp_path, max_shard_bytes=30_000)  # over the old ones
    assert same(load(tmp_path), model) and not first & {p.name for p in tmp_path.glob("model-*")}
    save(model, tmp_path)
    assert same(load(tmp_path), model) and not list(tmp_path.glob("model-*"))
    save(model, tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    outside = tmp_path.parent / f"{tmp_path.name}-outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)  # whole and readable: only its place is wrong
    for name, message in [
        (f"../{outside.name}", "beside it"),
        (str(outside), "beside it"),
        ("config.json", "beside it"),
        (3, "object with a weight_map"),
        ("gone.safetensors", "does not exist"),
    ]:
        index.write_text(json.dumps({"weight_map": values["weight_map"] | {"a": name}}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    save(model, tmp_path)  # a damaged index can be replaced
    assert same(load(tmp_path), model)
