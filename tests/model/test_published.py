"""The published model's tokenizer and eyes, small and without a download."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from omnimamba_model import CheckpointError, OmniMamba, OmniMambaConfig, Sampling, SpecialTokens, save
from omnimamba_model.cli import main
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.published import PublishedPixels, read_official_vq
from omnimamba_model.text_tokenizer import ADDED, BpeTokenizer, read_text_tokenizer
from omnimamba_model.vision import VisionEncoder
from omnimamba_model.vq16 import VQ16, VQConfig

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def encoders(tmp_path) -> tuple[str, str]:
    """A DINOv2 of width 16 and a SigLIP of width 8, both 3 x 3 patches, as folders."""
    torch.manual_seed(0)
    small = dict(num_attention_heads=2, num_hidden_layers=3, patch_size=14)
    dino = transformers.Dinov2WithRegistersConfig(hidden_size=16, image_size=56, num_register_tokens=4, **small)
    siglip = transformers.SiglipVisionConfig(hidden_size=8, intermediate_size=16, image_size=42, **small)
    folders = tmp_path / "dino", tmp_path / "siglip"
    transformers.Dinov2WithRegistersModel(dino).save_pretrained(folders[0])
    transformers.SiglipVisionModel(siglip).save_pretrained(folders[1])
    return tuple(map(str, folders))


def test_features_are_the_second_to_last_blocks(encoders):
    vision = VisionEncoder.from_pretrained(*encoders)
    image = picture(0)
    found = vision.look([image, picture(1)])
    assert found.shape == (2, 9, 24) and (vision.patches, vision.feature_dim) == (9, 24)
    pixels = torch.from_numpy(np.array(image.resize((42, 42), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    caught = []
    for layers, inputs, model in (
        (vision.dino.encoder.layer, (pixels - mean[:, None, None]) / std[:, None, None], vision.dino),
        (vision.siglip.encoder.layers, pixels * 2 - 1, vision.siglip),
    ):
        hook = layers[1].register_forward_hook(
            lambda *a: caught.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1])
        )
        with torch.no_grad():
            model(inputs[None])
        hook.remove()
    dino, siglip = caught
    torch.testing.assert_close(found[0], torch.cat([dino[0, 5:], siglip[0]], -1), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in vision.parameters())


def test_wrong_pictures_are_refused(encoders):
    with pytest.raises(ValueError, match=r"\(b, 3, 42, 42\)"):
        VisionEncoder.from_pretrained(*encoders)(torch.zeros(1, 3, 41, 42))


# ---- text ----


def neox(folder, tokens: int = 50277) -> str:
    """A stand-in for GPT-NeoX's tokenizer: as many ids, the end of text at 0."""
    vocab = {"<|endoftext|>": 0, "draw": 1, "me": 2} | {f"w{i}": i for i in range(3, tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_additions_get_their_published_ids(tmp_path):
    words = BpeTokenizer.published(neox(tmp_path))
    assert words.vocab_size == 50287
    assert all(words.is_special(i) for i in vars(SpecialTokens()).values()) and not words.is_special(1)
    assert words.encode("draw me<|t2i|>") == [1, 2, 50282]
    assert words.decode([50283, 1, 2, 0]) == "draw me"
    assert [words.encode(token) for token in ADDED] == [[50277 + i] for i in range(10)]
    again = read_text_tokenizer(words.to_json())
    assert again.encode("draw me <|lvg|>") == [1, 2, 50286] and again.vocab_size == 50287


def test_the_published_tokenizer_of_the_hub(tmp_path, monkeypatch):
    """What is no local path is asked of the hub, by the published name where none is given."""
    file, asked = neox(tmp_path) + "/tokenizer.json", []

    class Hub:
        from_file = tokenizers.Tokenizer.from_file

        @classmethod
        def from_pretrained(cls, name):
            asked.append(name)
            return cls.from_file(file)

    monkeypatch.setattr(tokenizers, "Tokenizer", Hub)
    for words in (BpeTokenizer.published(), BpeTokenizer.published("owner/neox")):
        assert words.encode("draw me<|t2i|>") == [1, 2, 50282]
    assert asked == ["EleutherAI/gpt-neox-20b", "owner/neox"]


def test_another_tokenizer_is_not_the_published_one(tmp_path):
    with pytest.raises(ValueError, match="must have 50277 tokens"):
        BpeTokenizer.published(neox(tmp_path, tokens=100))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        (tmp_path / "empty").mkdir()
        BpeTokenizer.published(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="gives no tokenizer"):
        BpeTokenizer.published(tmp_path)


def test_a_trained_tokenizer_survives_json_and_any_text():
    words = BpeTokenizer.trained(["which digit is this?", "a handwritten seven"] * 5, vocab_size=300)
    assert words.vocab_size <= 300 and all(words.is_special(i) for i in range(8))
    for text in ("a handwritten seven", "Größe, 画?"):
        ids = words.encode(text)
        assert min(ids) >= 8 and words.decode([3, *ids, 0]) == text
        assert read_text_tokenizer(words.to_json()).encode(text) == ids
    with pytest.raises(ValueError, match="must be Unicode"):
        words.encode("half a character: \ud83d")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        BpeTokenizer.from_json('{"version": "1.0"}')


# ---- pictures, and the whole ----

SMALL = VQConfig(codebook_size=20, codebook_dim=4, channels=8, multipliers=(1, 2), z_channels=8, groups=4)


@pytest.fixture
def folder(tmp_path, encoders):
    torch.manual_seed(0)
    out = tmp_path / "checkpoint"
    words = BpeTokenizer.trained(["draw a cat", "what is this?"] * 5, vocab_size=290)
    config = OmniMambaConfig.preset(
        "tiny", image_vocab_size=20, image_tokens=16, image_features=9, feature_dim=24,
        backbone=OmniMambaConfig.preset("tiny").backbone.preset("tiny", vocab_size=words.vocab_size + 3),
    )  # fmt: skip
    save(OmniMamba(config), out, words.to_json())
    PublishedPixels(VQ16(SMALL), 8, encoders).save(out)
    return out


def test_a_published_checkpoint_draws_and_answers(folder):
    pipeline = Pipeline.load(folder)
    (drawn,) = pipeline.draw(["draw a cat"], Sampling(seed=0))
    assert drawn.size == (8, 8) and drawn.mode == "RGB"
    assert len(pipeline.ask([picture(0), picture(1, (9, 50))], ["what is this?", "a cat?"])) == 2


def test_pixels_survive_their_file(folder):
    pixels = PublishedPixels.load(folder)
    tokens = torch.arange(16)[None]
    again = PublishedPixels.load(folder)
    assert np.array_equal(np.array(pixels.pictures(tokens)[0]), np.array(again.pictures(tokens)[0]))
    assert pixels.vq.config == SMALL


def test_damaged_parts_are_named(folder):
    (folder / "vision.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged: 'dino'"):
        Pipeline.load(folder)
    (folder / "vision.json").unlink()
    with pytest.raises(CheckpointError, match="vision.json does not exist"):
        Pipeline.load(folder)
    (folder / "vq16.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        Pipeline.load(folder)


def test_encoders_that_are_loaded_move_too(folder, encoders):
    pixels = PublishedPixels.load(folder)
    pixels.encoders = tuple(encoders)
    pixels.vision  # noqa: B018  loaded now
    pixels.to("meta")
    assert {p.device.type for part in (pixels.vq, pixels.vision) for p in part.parameters()} == {"meta"}


def test_loading_and_looking_draw_nothing(folder, monkeypatch):
    """Both happen beside or within a step, whose dropout draws from torch's generator."""
    begin, drawn = VisionEncoder.from_pretrained, []
    drawing = staticmethod(lambda *given: drawn.append(torch.rand(3)) or begin(*given))
    monkeypatch.setattr(VisionEncoder, "from_pretrained", drawing)
    pixels, before = PublishedPixels.load(folder), torch.get_rng_state()
    assert not pixels.ready
    for _ in range(2):
        pixels.prepare()
    assert pixels.ready and len(drawn) == 1 and len(pixels.look([picture(0)])) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_a_converted_folder_knows_its_encoders(folder, encoders, tmp_path, monkeypatch):
    """Named by relative paths, one of them inside the folder, which then moves; asked from elsewhere."""
    PublishedPixels(VQ16(SMALL), 8).save(folder)
    said = Pipeline.load(folder, encoders=encoders).ask([picture(0)], ["what is this?"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "dino").rename(tmp_path / "out" / "dino")
    assert main(["convert", str(folder), "out", "--encoders", "out/dino", "siglip"]) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert main(["convert", "moved", "again"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("moved", "again"):
        assert Pipeline.load(tmp_path / name).ask([picture(0)], ["what is this?"]) == said
    names = json.loads((tmp_path / "moved" / "vision.json").read_text())
    assert names == {"dino": "dino", "siglip": str(tmp_path / "siglip")}


@pytest.mark.parametrize(
    ("encoders_named", "message"),
    [
        (("siglip", "dino"), "siglip must hold a dinov2_with_registers, got 'siglip_vision_model'"),
        (("dino", "dino"), "dino must hold a siglip, got 'dinov2_with_registers'"),
        (("wide", "siglip"), "feature_dim is 24, but the encoders give 40"),
        (("coarse", "siglip"), "must cut 42 pixels into as many patches"),
        (("nowhere/at/all", "siglip"), "nowhere/at/all"),
        (("checkpoint", "siglip"), "got 'omnimamba'"),
    ],
)
def test_encoders_that_do_not_fit_are_named(folder, tmp_path, monkeypatch, capsys, encoders_named, message):
    monkeypatch.chdir(tmp_path)
    for name, changes in (("wide", {"hidden_size": 32}), ("coarse", {"patch_size": 21})):
        transformers.Dinov2WithRegistersConfig.from_pretrained("dino", **changes).save_pretrained(name)
    assert main(["convert", str(folder), "out", "--encoders", *encoders_named]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_official_image_tokenizers_file(tmp_path):
    """At full size, in half precision to be quick."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VQ16().state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.half) for name, shape in shapes.items()}
    tensors["quantize.codebook_used"] = torch.zeros(65536)
    torch.save({"model": tensors}, tmp_path / "vq_ds16_t2i.pt")
    assert sum(p.numel() for p in read_official_vq(tmp_path / "vq_ds16_t2i.pt").parameters()) == 71_883_403
    del tensors["decoder.conv_in.bias"]
    torch.save({"model": tensors}, tmp_path / "vq_ds16_t2i.pt")
    with pytest.raises(CheckpointError, match=r"missing decoder.conv_in.bias \(512,\)"):
        read_official_vq(tmp_path / "vq_ds16_t2i.pt")
