"""Whole checkpoints wherever they lie: commands by a hub's name, the official file as it is published, old folders."""

import fnmatch
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from omnimamba_model import CheckpointError, OmniMamba, Sampling, load, save
from omnimamba_model.cli import main
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.published import PublishedPixels
from omnimamba_model.text_tokenizer import WordTokenizer
from omnimamba_model.training.run import _parts
from omnimamba_model.training.settings import read
from omnimamba_model.vq16 import VQ16, VQConfig
from omnimamba_model.weights import read_tokenizer


def test_every_command_takes_a_hub_name(folder, hub, tmp_path, capsys):
    (hub / "owner" / "whole").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "image_tokenizer.safetensors"):
        shutil.copy(folder / file, hub / "owner" / "whole")
    line = {"question_id": 3, "image": "a.png", "text": "word1 word2", "label": "yes"}
    (tmp_path / "pope.json").write_text(json.dumps(line))
    ask, pope = (
        ["ask", "--image", folder / "a.png", "--question", "word5", "--tokens", "4"],
        ["evaluate", "pope", tmp_path / "pope.json", "--ending", ""],
    )
    for name in (folder, "owner/whole"):
        out = tmp_path / ("hub" if name == "owner/whole" else "here")
        out.mkdir(exist_ok=True)
        for command in (
            ["generate", "--prompt", "word3", "--out", out / "drawn.png"],
            ask,
            [*pope, "--images", folder, "--out", out / "scores"],
        ):
            assert main([*map(str, command), "--checkpoint", str(name)]) == 0
    assert (tmp_path / "hub" / "drawn.png").read_bytes() == (tmp_path / "here" / "drawn.png").read_bytes()
    said = capsys.readouterr().out.splitlines()
    assert len(said) > 3 and said[: len(said) // 2] == said[len(said) // 2 :]
    # scores that were begun with one checkpoint are not gone on with by another
    again = [*pope, "--images", folder, "--out", tmp_path / "hub" / "scores", "--checkpoint"]
    assert main([*map(str, again), "owner/whole"]) == 0 and main([*map(str, again), str(folder)]) == 2


def small_vq(codes: int = 40) -> PublishedPixels:
    """As many codes as the official fixture's model has; 256 tokens of a picture of 256 x 256."""
    return PublishedPixels(VQ16(VQConfig(codebook_size=codes, codebook_dim=4, channels=8, groups=4, z_channels=8)))


def neox(folder) -> None:
    """A stand-in for GPT-NeoX's tokenizer.json as it is published: as many ids, the end of text at 0."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 50277)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_official_file_draws_with_its_tokenizers_beside_it(official, hub, monkeypatch):
    """LlamaGen's file and GPT-NeoX's tokenizer as they are published; from a folder, the file itself and the hub."""
    _, release = official
    pixels = small_vq()
    with pytest.raises(CheckpointError, match="has no tokenizer.json; omnimamba convert puts one"):
        Pipeline.load(release)
    neox(release)
    with pytest.raises(CheckpointError, match="image_tokenizer.safetensors does not exist"):
        Pipeline.load(release)
    torch.save({"model": pixels.vq.state_dict()}, release / "vq_ds16_t2i.pt")
    shutil.copytree(release, hub / "owner" / "release")
    monkeypatch.setattr("omnimamba_model.published.VQConfig", lambda: pixels.vq.config)
    drawn = []
    for place in (release / "OmniMamba-1.3b.pth", "owner/release"):
        pipeline = Pipeline.load(place)
        (image,) = pipeline.draw(["w7"], Sampling(seed=0))
        drawn.append(image.tobytes())
        assert image.size == (256, 256) and pipeline.words.encode("w7") == [7]
        assert pipeline.words.is_special(50282) and pipeline.model.backbone.caption_embed.folded is not None
    assert drawn[0] == drawn[1]


def starts(path, **values):
    """Words and pixels that a run with these settings starts from."""
    given = {"out": "run", "stage": "base", "steps": 1, "learning_rate": 0.1, "text": {"files": ["a.jsonl"]}, **values}
    path.write_text(yaml.safe_dump(given))
    return _parts(read(path))


def official_vq(pixels, folder, monkeypatch) -> None:
    """LlamaGen's file in a folder, of another size."""
    torch.save({"model": pixels.vq.state_dict()}, folder / "vq_ds16_t2i.pt")
    monkeypatch.setattr(
        "omnimamba_model.published.VQConfig", lambda **values: VQConfig(**values) if values else pixels.vq.config
    )


def test_the_official_release_is_trained_and_converted_wherever_it_lies(official, hub, tmp_path, monkeypatch):
    """In a folder, as a file with its tokenizers beside it, and on the hub."""
    _, release = official
    neox(release)
    official_vq(pixels := small_vq(), release, monkeypatch)
    shutil.copytree(release, hub / "owner" / "release")
    for i, place in enumerate((release, release / "OmniMamba-1.3b.pth", "owner/release")):
        out, expected = tmp_path / f"out {i}", pixels.vq.state_dict()["quantize.embedding.weight"]
        assert main(["convert", str(place), str(out)]) == 0
        pipeline = Pipeline.load(out, fold=False)
        _, words, seen = starts(tmp_path / "run.yaml", model=str(place))
        _, *fresh = starts(tmp_path / "run.yaml", fresh=pipeline.model.config.to_dict(), tokenizers=str(place))
        for text, pictures in ((pipeline.words, pipeline.pixels), (words, seen), fresh):
            assert text.vocab_size == 50287 and text.is_special(50282)
            assert torch.equal(pictures.vq.state_dict()["quantize.embedding.weight"], expected)


def test_of_tokenizers_on_the_hub_no_weights_come_down(official, hub, tmp_path, monkeypatch):
    """GPT-NeoX's own gets the published additions all the same; one that has them stays as it is. Encoders that lie in
    the repository, which vision.json names, do."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model, release = official
    asked, fetch = [], huggingface_hub.snapshot_download

    def snapshot_download(name, *, allow_patterns, **options):
        asked.append([file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)])
        return fetch(name, allow_patterns=allow_patterns, **options)

    files = ["dino/config.json", "dino/model.safetensors", "model.safetensors", "model-00001-of-00002.safetensors"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    neox(release)
    official_vq(pixels := small_vq(), release, monkeypatch)
    shutil.copytree(release, hub / "owner" / "release")
    assert main(["convert", str(release), str(hub / "owner" / "whole")]) == 0
    for name, held in (
        ("owner/release", {"tokenizer.json", "vq_ds16_t2i.pt"}),
        ("owner/whole", {"config.json", "tokenizer.json", *PublishedPixels.files}),
    ):
        _, words, seen = starts(tmp_path / "run.yaml", fresh=model.config.to_dict(), tokenizers=name)
        assert {path.name for path in (tmp_path / "cache" / name).iterdir()} == held
        assert words.vocab_size == 50287 and words.is_special(50282)
        assert seen.sizes() == pixels.sizes()
    assert asked == [files[:2]] * 2


def test_an_image_tokenizer_beside_a_plain_mamba2(lm, tmp_path, monkeypatch):
    """It waits there for the OmniMamba that grows; the plain model is converted without it."""
    plain = tmp_path / "plain"
    save(lm, plain)
    neox(plain)
    official_vq(small_vq(16384), plain, monkeypatch)
    assert main(["convert", str(plain), str(tmp_path / "out")]) == 0
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"config.json", "model.safetensors", "tokenizer.json"}
    model, words, pixels = starts(tmp_path / "run.yaml", model=str(plain))
    assert isinstance(model, OmniMamba) and words.is_special(50282) and pixels.sizes()["image_vocab_size"] == 16384


def test_the_official_release_is_saved_with_its_whole_tokenizer(official, tmp_path):
    """From its folder and from the file itself, GPT-NeoX's plain tokenizer.json beside it."""
    _, release = official
    neox(release)
    for i, place in enumerate((release, release / "OmniMamba-1.3b.pth")):
        saved = tmp_path / f"saved {i}"
        OmniMamba.from_pretrained(place).save_pretrained(saved)
        small_vq().save(saved)
        words = Pipeline.load(saved, fold=False).words
        assert words.vocab_size == 50287 and all(words.is_special(token) for token in range(50277, 50287))
    (release / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="gives no tokenizer"):
        OmniMamba.from_pretrained(release)


@pytest.mark.parametrize("text", ["{", WordTokenizer(["few"]).to_json(), None], ids=["damaged", "of words", "another"])
@pytest.mark.parametrize("pixels", ["image_tokenizer.safetensors", "vq_ds16_t2i.pt"])
def test_what_lies_beside_a_file_and_is_not_its_own_is_left_out_by_name(official, tmp_path, capsys, text, pixels):
    """A file may lie among anybody's: it is converted and loaded without them. A folder is taken as a whole."""
    tokenizers = pytest.importorskip("tokenizers")
    model, release = official
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    (release / "tokenizer.json").write_text(library.to_str() if text is None else text)
    if pixels == PatchTokenizer.file:
        PatchTokenizer(16, 2, (4, 6)).save(release)
    else:
        (release / pixels).write_bytes(b"half of it")
    file, out = release / "OmniMamba-1.3b.pth", tmp_path / "out"
    assert main(["convert", str(file), str(out)]) == 0
    said = capsys.readouterr().out
    assert "to draw and answer it needs --tokenizer and --image-tokenizer; left out" in said
    assert f"; left out tokenizer.json, {pixels}, found beside it, which did not fit" in said
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    loaded = OmniMamba.from_pretrained(file)
    assert loaded.tokenizer is None and torch.equal(loaded.backbone.pos_embed, model.backbone.pos_embed)
    assert main(["convert", str(release), str(tmp_path / "whole")]) == 2 and not (tmp_path / "whole").exists()
    with pytest.raises(CheckpointError):
        OmniMamba.from_pretrained(release)


def test_a_text_tokenizer_that_fits_another_vocabulary_is_left_out_beside_a_file(official, tmp_path, capsys):
    model, release = official
    neox(release)
    wider = OmniMamba(replace(model.config, backbone=replace(model.config.backbone, vocab_size=50304)))
    names = {n: n if n.startswith("projector.") else f"llm_backbone.mamba.{n}" for n in wider.state_dict()}
    torch.save({names[n]: t for n, t in wider.state_dict().items()}, release / "OmniMamba-1.3b.pth")
    assert main(["convert", str(release / "OmniMamba-1.3b.pth"), str(tmp_path / "out")]) == 0
    assert "; left out tokenizer.json, found beside it" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_tokenizers_that_fit_stay_in_a_converted_folder(folder, tmp_path, capsys):
    """Those that were put there, and those of an earlier conversion, when the source has none of its own."""
    bare, out = tmp_path / "bare", tmp_path / "out"
    save(load(folder), bare)
    out.mkdir()
    for name in ("tokenizer.json", "image_tokenizer.safetensors"):
        shutil.copy(folder / name, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["convert", str(bare), str(out)]) == 0
    said = capsys.readouterr().out
    assert "removed" not in said and "needs" not in said
    assert before.items() <= {path.name: path.read_bytes() for path in out.iterdir()}.items()
    assert len(Pipeline.load(out).draw(["word3"], Sampling(seed=0))) == 1


def test_what_does_not_fit_a_converted_folder_is_removed_by_name(official, lm, tmp_path, capsys):
    _, release = official
    out, plain = tmp_path / "out", tmp_path / "plain"
    out.mkdir()

    def convert(source):
        assert main(["convert", str(source), str(out)]) == 0
        held = {path.name for path in out.iterdir()} - {"config.json", "model.safetensors"}
        return held, capsys.readouterr().out

    small_vq().save(out)
    (out / "tokenizer.json").write_text("{")  # nothing can be said of it
    held, said = convert(release)
    assert held == {"vq16.safetensors", "vision.json", "tokenizer.json"} and "removed" not in said
    small_vq(41).save(out)
    (out / "tokenizer.json").write_text(WordTokenizer(["few"]).to_json())
    held, said = convert(release)
    assert not held and "; removed tokenizer.json, vq16.safetensors, vision.json, which did not fit; to draw" in said
    save(lm, plain)
    words = [f"w{i}" for i in range(lm.config.vocab_size - 8)]
    for more in (0, 1):
        (out / "tokenizer.json").write_text(WordTokenizer([*words, *["more"] * more]).to_json())
        held, said = convert(plain)
        assert held == (set() if more else {"tokenizer.json"}) and ("removed tokenizer.json" in said) == bool(more)


@pytest.mark.parametrize("codes, needed", [(40, False), (41, True)])
def test_llamagens_file_in_a_converted_folder_is_of_use_where_it_fits(
    official, tmp_path, monkeypatch, capsys, codes, needed
):
    _, release = official
    out = tmp_path / "out"
    out.mkdir()
    official_vq(small_vq(codes), out, monkeypatch)
    assert main(["convert", str(release), str(out)]) == 0
    said = capsys.readouterr().out
    assert ("it needs --tokenizer and --image-tokenizer" in said) == needed and "it needs --tokenizer" in said
    assert (out / "vq_ds16_t2i.pt").exists() and "removed" not in said


def test_a_converted_folder_keeps_nothing_of_another_model(folder, official, tmp_path):
    _, release = official
    out = tmp_path / "out"

    def convert(source):
        assert main(["convert", str(source), str(out)]) == 0
        return sorted(path.name for path in out.iterdir() if path.name not in ("config.json", "model.safetensors"))

    assert convert(folder) == ["image_tokenizer.safetensors", "tokenizer.json"]
    (out / "mine.txt").write_text("stays")
    assert convert(release) == ["mine.txt"]  # which has neither tokenizer
    small_vq().save(out)
    assert convert(folder) == ["image_tokenizer.safetensors", "mine.txt", "tokenizer.json"]
    before = read_tokenizer(out)
    assert len(convert(out)) == 3 and read_tokenizer(out) == before  # in place, all of its own
    assert len(Pipeline.load(out).draw(["word3"], Sampling(seed=0))) == 1
