import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from omnimamba_model import cli
from omnimamba_model.dialogue import _mark
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.pictures import decode, plain, read_image
from omnimamba_model.training.features import decoded
from omnimamba_model.training.records import BadRecord

LEVELS = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reread(data: bytes) -> Image.Image:
    return decode(io.BytesIO(data), "it")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_otherwise(kind, orientation):
    """Pillow's own turn is the witness."""
    data = file(Image.fromarray(LEVELS).convert("RGB"), kind, exif=turned(orientation))
    with Image.open(io.BytesIO(data)) as stored:
        wanted = ImageOps.exif_transpose(stored)
    found = reread(data)
    assert found.tobytes() == wanted.tobytes() and found.size == wanted.size
    assert plain(found).tobytes() == found.tobytes() and plain(found).size == found.size  # and is turned once


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_not_white(kind):
    data = file(Image.fromarray(LEVELS.astype(np.uint16) * 257), kind)
    assert np.array_equal(np.asarray(reread(data)), LEVELS)


def test_levels_of_no_known_range_are_refused():
    for levels in (LEVELS / np.float32(255), LEVELS.astype(np.int32) - 1, LEVELS.astype(np.int32) * 1000):
        with pytest.raises(ValueError, match="levels must be whole numbers of 8 bits, or of 16"):
            plain(Image.fromarray(levels))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(mode):
    drawn = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawn.paste((9, 9, 9, 255), (1, 1, 3, 3))
    options = {"P": dict(transparency=0), "L": dict(transparency=0), "RGB": dict(transparency=(0, 0, 0))}.get(mode, {})
    if mode == "P":
        drawn = Image.fromarray(np.asarray(drawn.convert("L")) // 9, "P")
        drawn.putpalette([0, 0, 0, 9, 9, 9])
    else:
        drawn = drawn.convert(mode)
    found = np.asarray(reread(file(drawn, **options)).convert("L"))
    assert (found[1:3, 1:3] == 9).all() and found.sum() == 4 * 9 + 12 * 255


def test_what_is_plain_stays_as_it_is():
    for mode in ("1", "L", "RGB", "CMYK", "P", "YCbCr"):
        image = Image.fromarray(LEVELS).convert(mode)
        assert plain(image) is image


def test_every_way_to_the_model_sees_the_same(tmp_path):
    """Files from the command line, records in training, and pictures that Python opened itself."""
    pixels = PatchTokenizer(16, 2, (6, 4))
    pixels.codebook.copy_(torch.rand(16, 4, generator=torch.Generator().manual_seed(0)))
    grey = Image.fromarray(LEVELS.astype(np.uint16) * 257).transpose(Image.Transpose.ROTATE_90)  # upright: 4 wide
    grey.save(tmp_path / "a.png", exif=turned(6))
    upright = (
        Image.fromarray(np.asarray(LEVELS)).transpose(Image.Transpose.ROTATE_90).transpose(Image.Transpose.ROTATE_270)
    )
    data = (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
    ways = [opened, read_image(tmp_path / "a.png"), decoded(data, "a")]
    for image in ways:
        assert torch.equal(pixels.look([image]), pixels.look([upright]))
        assert torch.equal(pixels.tokens_of([image]), pixels.tokens_of([upright]))
        assert _mark(image) == _mark(upright)


def test_damaged_files_are_told_by_name(tmp_path, capsys):
    """However a decoder fails: Pillow's raise what they happen to."""
    whole = {kind: file(Image.fromarray(LEVELS).convert("RGB"), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF")}
    whole["JPEG2000"] = file(Image.fromarray(LEVELS), "JPEG2000")
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in whole.values():
            for _ in range(200):
                broken = bytearray(data[: int(rng.integers(1, len(data) + 1))])
                for at in rng.integers(0, len(broken), 3):
                    broken[at] = int(rng.integers(256))
                try:
                    decoded(bytes(broken), "7.png")
                except BadRecord as error:
                    assert str(error).startswith("image 7.png ")
    path = tmp_path / "cut.png"
    path.write_bytes(whole["PNG"][:60])
    assert cli.main(["ask", "--checkpoint", "c", "--question", "?", "--image", str(path)]) == 2
    assert f"{path} cannot be read as an image: " in capsys.readouterr().err


def test_a_decoder_that_fails_in_its_own_way(monkeypatch):
    def overflow(*_):
        raise OverflowError("Python int too large to convert to C ssize_t")

    monkeypatch.setattr(Image, "open", overflow)
    with pytest.raises(BadRecord, match="image 7.png cannot be read as an image: Python int too large"):
        decoded(b"", "7.png")
