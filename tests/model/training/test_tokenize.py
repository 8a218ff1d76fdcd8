import json

import numpy as np
import pytest
import torch
from formats import png
from PIL import Image

from omnimamba_model.cli import main
from omnimamba_model.published import PublishedPixels
from omnimamba_model.training.lessons import Drawing
from omnimamba_model.training.records import open_records
from omnimamba_model.training.tokenize import square
from omnimamba_model.vq16 import VQ16, VQConfig


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, said in (("a", "a cat\n\na small dog\n"), ("sub/b", "the red house"), ("c", ""), ("d", "a cat")):
        (folder / f"{name}.png").write_bytes(png(len(said)))
        (folder / f"{name}.txt").write_text(said)
    (folder / "d.png").write_bytes(b"no picture")
    return folder


def test_pictures_become_what_drawing_learns_from(pictures, data, config, words, pixels, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["tokenize", str(pictures), "--tokenizer", str(data), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 pictures" in said.out and "2 passed over" in said.out and "c.png: it has no caption" in said.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a.png", "sub/b.png"]
    assert lines[0]["captions"] == ["a cat", "a small dog"]
    expected = pixels.tokens_of([square(Image.open(pictures / "a.png"))])[0]
    assert lines[0]["tokens"] == expected.tolist()
    Drawing(open_records([out])[0], 2, config, words)(0)


def test_an_image_tokenizer_of_the_hub(pictures, data, hub, pixels, tmp_path):
    """By its name, as every other command takes it, and by its file."""
    (hub / "owner" / "pixels").mkdir(parents=True)
    pixels.save(hub / "owner" / "pixels")
    (hub / "owner" / "pixels" / "model.safetensors").write_bytes(b"large")
    found = []
    for i, place in enumerate((data, "owner/pixels", data / pixels.file)):
        out = tmp_path / f"{i}.jsonl"
        assert main(["tokenize", str(pictures), "--tokenizer", str(place), "--out", str(out)]) == 0
        found.append(out.read_text())
    assert found[0] == found[1] == found[2]
    assert [path.name for path in (tmp_path / "cache" / "owner" / "pixels").iterdir()] == [pixels.file]


@pytest.mark.parametrize("name", ["image_tokenizer.safetensors", "vq16.safetensors", "vq_ds16_t2i.pt", "mine.bin"])
def test_a_file_is_the_one_that_is_named_whatever_lies_beside_it(pictures, data, pixels, tmp_path, monkeypatch, name):
    torch.manual_seed(0)
    sizes = dict(codebook_dim=4, channels=8, groups=4, z_channels=8)
    ours, theirs = (PublishedPixels(VQ16(VQConfig(codes, **sizes))) for codes in (20, 30))
    monkeypatch.setattr("omnimamba_model.published.VQConfig", lambda *_, **__: theirs.vq.config)
    for file in ("vq_ds16_t2i.pt", "mine.bin"):
        torch.save({"model": theirs.vq.state_dict()}, data / file)
    if name == "vq16.safetensors":
        monkeypatch.undo()
    ours.save(data)
    wanted = {pixels.file: pixels, ours.file: ours}.get(name, theirs)
    out = tmp_path / "out.jsonl"
    assert main(["tokenize", str(pictures), "--tokenizer", str(data / name), "--out", str(out)]) == 0
    found = json.loads(out.read_text().splitlines()[0])["tokens"]
    assert found == wanted.tokens_of([square(Image.open(pictures / "a.png"))])[0].tolist()


def test_a_caption_that_cannot_be_read_is_passed_over(pictures, data, tmp_path, capsys):
    (pictures / "a.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    (pictures / "c.txt").unlink()
    (pictures / "c.txt").mkdir()
    out = tmp_path / "out.jsonl"
    assert main(["tokenize", str(pictures), "--tokenizer", str(data), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "1 pictures" in said.out and "3 passed over" in said.out and "a.txt is not UTF-8 text" in said.err
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == ["sub/b.png"]


def test_captions_of_coco(pictures, data, tmp_path, capsys):
    notes = [{"image_id": 7, "caption": " a cat "}, {"image_id": 7, "caption": "a small dog"}]
    values = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "gone.png"}], "annotations": notes}
    (tmp_path / "captions.json").write_text(json.dumps(values))
    common = ["tokenize", str(pictures), "--tokenizer", str(data), "--captions", str(tmp_path / "captions.json")]
    assert main([*common, "--out", str(tmp_path / "out.jsonl")]) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert line["captions"] == ["a cat", "a small dog"]
    (tmp_path / "captions.json").write_text('{"images": []}')
    assert main([*common, "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "no captions file of COCO" in capsys.readouterr().err


def test_nothing_is_written_where_nothing_is_found(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert main(["tokenize", str(tmp_path / folder), "--tokenizer", str(data), "--out", str(tmp_path / "o")]) == 2
    assert "has a caption" in (said := capsys.readouterr().err) and "is not a folder" in said
    assert not (tmp_path / "o").exists()


def test_the_published_tokenizer_sees_colour_row_by_row():
    torch.manual_seed(0)
    pixels = PublishedPixels(VQ16(VQConfig(20, 4, 8, (1, 2), 8, 4)), 8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    tokens = pixels.tokens_of([image, image.rotate(90)])
    wide = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        assert torch.equal(tokens[:1].view(1, 4, 4), pixels.vq.encode(wide))
    assert len(pixels.pictures(tokens)) == 2


def test_squares_are_about_the_middle():
    wide = Image.fromarray(np.arange(50, dtype=np.uint8).reshape(5, 10))
    assert np.array(square(wide))[0].tolist() == [2, 3, 4, 5, 6]


def test_a_captions_file_whose_names_are_none(pictures, data, tmp_path, capsys):
    notes = {"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    (tmp_path / "coco.json").write_text(json.dumps(notes))
    arguments = [
        "--captions",
        str(tmp_path / "coco.json"),
        "--tokenizer",
        str(data),
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    assert main(["tokenize", str(pictures), *arguments]) == 2
    assert "coco.json is no captions file of COCO: TypeError('file_name must be a text" in capsys.readouterr().err
