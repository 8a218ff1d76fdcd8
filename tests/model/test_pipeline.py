import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from omnimamba_model import CheckpointError, OmniMamba, OmniMambaConfig, Sampling, SpecialTokens, answer, draw, save
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.pictures import read_image
from omnimamba_model.pipeline import Pipeline, contact_sheet, write_png
from omnimamba_model.sampling import GREEDY
from omnimamba_model.text_tokenizer import WordTokenizer


class Pixels:
    """Nine grey pixels a drawing; an image is looked at as six rows of twelve."""

    def pictures(self, tokens):
        levels = (tokens.view(-1, 3, 3).double() * 255 / 24).round().to(torch.uint8)
        return [Image.fromarray(grey) for grey in levels.numpy()]

    def look(self, images):
        return torch.from_numpy(np.stack([np.array(i, dtype=np.float32) for i in images])) / 255


@pytest.fixture
def pipeline(model):
    words = [f"word{i}" for i in range(model.config.backbone.vocab_size - 8)]
    return Pipeline(model, WordTokenizer(words), Pixels(), answer_tokens=6)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 12), dtype=np.uint8))


def test_drawings_are_the_models_tokens_as_pixels(pipeline, model):
    sampling = Sampling(seed=1)
    drawings = pipeline.draw(["word3 word4", "word9"], sampling)
    tokens = draw(model, model.pad_captions([pipeline.words.encode(t) for t in ("word3 word4", "word9")]), sampling)
    expected = (tokens.view(2, 3, 3).double() * 255 / 24).round().to(torch.uint8).numpy()
    assert all(np.array_equal(np.array(d), e) for d, e in zip(drawings, expected, strict=True))


def test_answers_do_not_depend_on_the_batch(pipeline, model):
    images = [picture(seed) for seed in range(3)]
    questions = ["word1 word2", "word5", "word2 word7"]
    together = pipeline.ask(images, questions)
    assert together == [pipeline.ask([i], [q])[0] for i, q in zip(images, questions, strict=True)]
    features = torch.from_numpy(np.array(images[1], dtype=np.float32))[None] / 255
    ids = answer(model, features, torch.tensor([pipeline.words.encode("word5")]), 6)[0].tolist()
    assert together[1] == pipeline.words.decode(ids[: ids.index(0)] if 0 in ids else ids)


def test_an_answer_ends_at_its_end_token(pipeline, monkeypatch):
    ids = torch.tensor([10, 11, 0, 0, 12])
    monkeypatch.setattr("omnimamba_model.pipeline.generate", lambda *_: [ids])
    assert pipeline.ask([picture(0)], ["word1"]) == [pipeline.words.decode([10, 11])]


def test_an_answer_is_as_long_as_asked_for(pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr("omnimamba_model.pipeline.answer_rows", lambda *given: seen.append(given[-1]) or [])
    monkeypatch.setattr("omnimamba_model.pipeline.generate", lambda *_: [])
    pipeline.ask([picture(0)], ["word1"])
    pipeline.ask([picture(0)], ["word1"], steps=40)
    assert seen == [6, 40]


def test_an_enlarged_drawing_is_seen_as_it_was():
    pixels, small = PatchTokenizer(4, 2, (6, 12)), picture(3)
    assert torch.equal(pixels.look([contact_sheet([small]).convert("RGB")]), pixels.look([small]))


def test_as_many_questions_as_images(pipeline):
    with pytest.raises(ValueError, match="questions must be as many as images, 1, got 2"):
        pipeline.ask([picture(0)], ["word1", "word2"])


MATCHED = dict(image_vocab_size=16, image_tokens=6, image_features=6, feature_dim=16)


def checkpoint(folder, words: int = 56, codes: int = 16, size: tuple[int, int] = (4, 6), **changes):
    """A folder whose three parts agree, but for what the arguments change."""
    config = OmniMambaConfig.preset("tiny", **{**MATCHED, **changes})
    save(OmniMamba(config), folder, WordTokenizer(f"word{i}" for i in range(words)).to_json())
    PatchTokenizer(codes, 2, size).save(folder)
    return folder


def test_parts_that_agree_are_loaded(tmp_path):
    pipeline = Pipeline.load(checkpoint(tmp_path))
    assert pipeline.draw(["word1"], Sampling(seed=0))[0].size == (6, 4)
    assert len(pipeline.ask([picture(0)], ["word2"])) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(words=57), "backbone.vocab_size is 64, but tokenizer.json has 65"),
        (dict(words=40), "backbone.vocab_size is 64, but tokenizer.json has 48"),
        (dict(codes=15), "image_vocab_size is 16, but image_tokenizer.safetensors has 15"),
        (dict(codes=17), "image_vocab_size is 16, but image_tokenizer.safetensors has 17"),
        (dict(size=(4, 8)), "image_tokens is 6, but image_tokenizer.safetensors has 8; image_features is 6"),
        (dict(feature_dim=12), "feature_dim is 12, but image_tokenizer.safetensors has 16"),
        (dict(tokens=SpecialTokens(0, 1, 2, 3, 4, 5, 6, 20)), "tokens.mmu is 20, but tokenizer.json has text there"),
    ],
)
def test_parts_that_disagree_are_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match="config.json does not fit its tokenizers: .*") as error:
        Pipeline.load(checkpoint(tmp_path, **changes))
    assert message in str(error.value)


def test_contact_sheet_places_every_image():
    images = [Image.new("L", (4, 4), 20 * i) for i in range(12)]
    sheet = contact_sheet(images, columns=5, least=8)
    assert sheet.size == (5 * 16 - 8, 3 * 16 - 8)
    assert [sheet.getpixel((i % 5 * 16 + 7, i // 5 * 16 + 7)) for i in range(12)] == [20 * i for i in range(12)]
    assert sheet.getpixel((8, 0)) == 255 and sheet.getpixel((2 * 16, 2 * 16)) == 255


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    write_png(picture(1), target)
    before = target.read_bytes()

    def fail(self, path, format):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        write_png(picture(2), target)
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == before


def test_one_text_is_no_list_of_texts(folder):
    """A text is a sequence of its letters, each of which many tokenizers know."""
    pipeline, image = Pipeline.load(folder), read_image(folder / "a.png")
    for wrong in ("word1", ["word1", 5], [None]):
        with pytest.raises(TypeError, match="prompts must be a list of texts, got"):
            pipeline.draw(wrong, GREEDY)
        with pytest.raises(TypeError, match="questions must be a list of texts, got"):
            pipeline.ask([image] * len(wrong), wrong)


def test_a_prompt_that_is_cut_is_told(folder):
    """It draws what its beginning does."""
    pipeline = Pipeline.load(folder)
    fits = " ".join(f"word{i}" for i in range(pipeline.model.config.text_slots))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plain,) = pipeline.draw([fits], GREEDY)
    with pytest.warns(UserWarning, match="a prompt has 6 tokens, of which the first 5 are drawn: 'word0 .* word9'"):
        (drawn,) = pipeline.draw([fits + " word9"], GREEDY)
    assert drawn.tobytes() == plain.tobytes()
