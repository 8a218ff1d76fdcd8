import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from formats import png, understanding
from PIL import Image

from omnimamba_model.omnimamba import IGNORE
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.text_tokenizer import SPECIAL, BpeTokenizer
from omnimamba_model.training.features import FeatureCache, RecentFeatures, look_at
from omnimamba_model.training.lessons import TEXT_ALONE, Drawing, Reading, Understanding
from omnimamba_model.training.parallel import Ranks
from omnimamba_model.training.records import PICTURE, open_records


@pytest.fixture
def draws(data, config, words):
    records, _ = open_records([data / "t2i.jsonl"])
    return lambda batch=4, **options: Drawing(records, batch, config, words, **options)


@pytest.fixture
def looks(data, config, words, pixels):
    records, _ = open_records([data / "mmu.json"])
    given = dict(images=data, text_length=24)
    return lambda batch=2, **options: Understanding(records, batch, config, words, pixels, **given | options)


def test_an_epoch_meets_every_record_once(draws):
    lesson = draws(batch=1)
    epochs = [[tuple(lesson(e * 11 + i)[1]["image"][0].tolist()) for i in range(11)] for e in range(2)]
    assert len(set(epochs[0])) == 11 and set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_place_alone(draws):
    one, again, other = draws(seed=1), draws(seed=1), draws(seed=2)
    later = again(5)
    for place in (0, 5, 2):
        a, b = one(place)[1], draws(seed=1)(place)[1]
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(later[1]["image"], one(5)[1]["image"])
    assert not torch.equal(other(5)[1]["image"], one(5)[1]["image"])


@pytest.mark.parametrize("make", ["draws", "looks"])
def test_processes_share_a_batch(request, make):
    make = request.getfixturevalue(make)
    whole = make(batch=4)(3)[1]
    parts = [make(batch=4, ranks=Ranks(rank, 2))(3)[1] for rank in range(2)]
    for name, tensor in whole.items():
        if name in ("image", "caption", "features"):
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    with pytest.raises(ValueError, match="batch of 3 cannot be dealt out evenly to 2"):
        make(batch=3, ranks=Ranks(0, 2))


def test_captions_are_padded_on_the_left_and_sometimes_dropped(draws, words):
    rows = torch.cat([draws(caption_dropout=0.5)(place)[1]["caption"] for place in range(40)])
    empty = (rows == SPECIAL.pad).all(1)
    assert 0.3 < empty.float().mean() < 0.7
    said = {words.decode([i for i in row if i != SPECIAL.pad]) for row in rows[~empty].tolist()}
    assert said == {"a cat", "the red house", "a small dog"}
    assert (rows[~empty][:, -1] != SPECIAL.pad).all()


def test_answers_are_learned_and_questions_are_not(looks, words):
    _, batch = looks(batch=7)(0)
    for ids, labels in zip(batch["text"].tolist(), batch["labels"].tolist(), strict=True):
        turns = 1 + (ids.count(SPECIAL.eos) > 1)
        asked, said = words.encode("in what is this out"), [*words.encode("it shows a cat"), SPECIAL.eos]
        whole = (asked + said) * turns + [SPECIAL.eot]
        assert ids == whole + [SPECIAL.pad] * (len(ids) - len(whole))
        marks = ([IGNORE] * len(asked) + said) * turns
        assert labels == marks + [IGNORE] * (len(ids) - len(marks))


def test_captions_of_stage_one_and_long_texts(looks, words):
    _, batch = looks(form="caption")(0)
    assert batch["text"][0].tolist() == batch["labels"][0].tolist() == [*words.encode("it shows a cat"), SPECIAL.eos]
    _, cut = looks(form="caption", text_length=3)(0)
    assert cut["text"].tolist() == [words.encode("it shows a")] * 2
    _, batch = looks(batch=7, text_length=14)(0)  # the second turn does not fit
    assert batch["text"].shape[1] == 11 and (batch["labels"] != IGNORE).sum() == 7 * 5
    with pytest.raises(ValueError, match="none of 7 records can be used"):
        looks(text_length=5)(0)


def test_bad_records_are_passed_over_and_counted(data, config, words, pixels):
    (data / "mixed.jsonl").write_text(
        "\n".join(
            json.dumps(record)
            for record in [
                {"captions": ["a cat"], "tokens": [1, 2, 3, 4, 5, 6]},
                {"captions": ["a cat"], "tokens": [1, 2, 3, 4, 5, 99]},
                {"captions": ["an unknown word"], "tokens": [1] * 6},
                {"captions": [], "tokens": [1] * 6},
                {"captions": ["a cat"], "tokens": "no"},
            ]
        )
    )
    lesson = Drawing(open_records([data / "mixed.jsonl"])[0], 5, config, words)
    assert lesson(0)[1]["image"].tolist() == [[1, 2, 3, 4, 5, 6]] * 5
    assert sum(lesson.passed_over.values()) >= 4 and len(lesson.passed_over) == 3
    (data / "2.png").write_bytes((data / "2.png").read_bytes()[:40])
    (data / "3.png").unlink()
    (data / "5.png").unlink()
    (data / "5.png").symlink_to("/dev/zero")
    (data / "4.png").write_bytes(b"no picture")
    looking = Understanding(open_records([data / "mmu.json"])[0], 7, config, words, pixels, images=data, text_length=24)
    assert looking(0)[1]["features"].isfinite().all()
    assert sum(looking.passed_over.values()) >= 3 and "image 4.png is no picture" in looking.passed_over
    assert any(reason.startswith("image 2.png ") for reason in looking.passed_over)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "0.png/1.png", "", "\ud800"])
def test_a_name_that_no_file_can_have_is_passed_over(name, data, config, words, pixels):
    records = [{**understanding(0), "image": name}, understanding(1)]
    lesson = Understanding(records, 2, config, words, pixels, images=data, text_length=24)
    assert len(lesson(0)[1]["text"]) == 2
    assert sum(lesson.passed_over.values()) == 1 and "cannot be read" in next(iter(lesson.passed_over))


def test_records_of_text_alone_are_counted_apart(config, words, pixels):
    """Whatever else may be wrong with them; an image that is no name is damage."""
    records = [understanding(i) | {PICTURE: png(i)} for i in range(2)]
    (records[0].pop("image"), records[1].pop("image"))  # a shard's sample brings its picture along
    for image in ({}, {"image": None}, {"image": 7}):
        records.append({"conversations": understanding(0)["conversations"] * 9, **image})
    lesson = Understanding(records, 5, config, words, pixels, text_length=24)
    assert len(lesson(0)[1]["text"]) == 5
    assert set(lesson.passed_over) == {TEXT_ALONE, "image must name a file"} and lesson.passed_over[TEXT_ALONE] >= 2


@pytest.mark.parametrize("form", ["caption", "instruct"])
def test_a_last_question_without_an_answer_is_left_out(config, words, pixels, form):
    record = understanding(0) | {PICTURE: png(0)}
    more = record | {"conversations": [*record["conversations"], {"from": "human", "value": "the red house"}]}
    whole, odd = (
        Understanding([one], 1, config, words, pixels, form=form, text_length=24)(0)[1] for one in (record, more)
    )
    assert all(torch.equal(whole[name], odd[name]) for name in whole)
    assert words.encode("it shows a cat") == [i for i in odd["labels"][0].tolist() if i not in (IGNORE, SPECIAL.eos)]


def test_a_dialogue_puts_its_turns_as_training_does(config, pixels):
    """A question as the pipeline asks it, the answer, the end of text: turn by turn what is learned, but its end."""
    words = BpeTokenizer.trained(["In: what is this\nOut: it shows a cat\nIn: where\nOut: on a red roof"], 300)
    said = [("what is this", "it shows a cat"), ("where", "on a red roof"), ("what", "a cat")]
    lesson = Understanding([], 1, dataclasses.replace(config, mmu_positions=400), words, pixels, text_length=300)
    turns = [(who, text) for pair in said for who, text in zip(("human", "gpt"), pair, strict=True)]
    asking = SimpleNamespace(words=words, device="cpu")
    asked = [Pipeline.question(asking, question, "instruct", i).tolist() for i, (question, _) in enumerate(said)]
    told = [i for ids, (_, answer) in zip(asked, said, strict=True) for i in [*ids, *words.encode(answer), SPECIAL.eos]]
    assert lesson._instruct(turns)[0] == [*told, SPECIAL.eot] and asked[0] != asked[2][: len(asked[0])]


def test_pictures_are_looked_at_once(data, looks, pixels, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache", "patches", torch.float32)
    plain = looks(batch=7)(0)[1]["features"]
    assert torch.equal(looks(batch=7, cache=cache)(0)[1]["features"], plain)
    monkeypatch.setattr(type(pixels), "look", lambda *_: pytest.fail("looked again"))
    assert torch.equal(looks(batch=7, cache=cache)(0)[1]["features"], plain)
    monkeypatch.undo()
    path = cache.path((data / "0.png").read_bytes())
    path.write_bytes(b"damaged")
    assert torch.equal(looks(batch=7, cache=cache)(0)[1]["features"], plain)
    other = FeatureCache(tmp_path / "cache", "another encoder").path((data / "0.png").read_bytes())
    assert path != other and path.read_bytes() != b"damaged"


def test_pictures_looked_at_lately_stay_in_memory(data, looks, pixels, monkeypatch):
    lesson = looks(batch=7)
    seen = lesson(0)[1]["features"]
    monkeypatch.setattr(type(pixels), "look", lambda *_: pytest.fail("looked again"))
    assert torch.equal(lesson(0)[1]["features"], seen)
    recent, looked = RecentFeatures(most=8), []
    for picture in (b"a", b"b", b"a", b"c", b"a", b"b"):  # 4 bytes each: two stay, b leaves for c
        recent.get(picture, lambda picture=picture: looked.append(picture) or torch.zeros(1))
    assert looked == [b"a", b"b", b"c", b"b"]


def test_plain_text_is_learned_from_end_to_end(config, words):
    records = [{"text": "a cat"}, {"text": "the red house"}, {"text": 3}]
    lesson = Reading(records, 2, config, words, length=5)
    task, batch = lesson(0)
    assert task == "text" and lesson.passed_over.keys() <= {"text must be a text"}
    eos = SPECIAL.eos
    said = [words.encode(text) for text in ("a cat", "the red house")]
    found = []
    for ids, labels in zip(batch["ids"].tolist(), batch["labels"].tolist(), strict=True):
        told = [i for i in labels if i != IGNORE]
        assert ids[: len(told)] == [eos, *told[:-1]] and labels[len(told) :] == [IGNORE] * (len(labels) - len(told))
        assert told[-1] == eos and set(ids[len(told) :]) <= {SPECIAL.pad, eos}
        found.append(told[:-1])
    assert sorted(found) in (sorted(said), said[:1] * 2, said[1:] * 2)
    for place in range(1, 4):
        lesson(place)
    assert set(lesson.passed_over) == {"text must be a text"}
    (cut,) = Reading(records[1:2], 1, config, words, length=2)(0)[1]["labels"].tolist()
    assert cut == words.encode("the red")
    with pytest.raises(ValueError, match="length must be 1 or more"):
        Reading(records, 1, config, words, length=0)


def test_what_is_seen_elsewhere_is_brought_to_the_cpu():
    """Nothing can be copied from the meta device, so that an attempt tells itself."""
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        look_at(Image.new("L", (6, 4)), lambda images: torch.empty(len(images), 2, 3, device="meta"))
