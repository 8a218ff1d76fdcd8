"""The demo's data, sentences and measures, each on its own."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from omnimamba_model.config import OmniMambaConfig
from omnimamba_model.demo.data import as_pictures, vary, write_exam, write_lessons
from omnimamba_model.demo.digits import Scans, split
from omnimamba_model.demo.judge import Judge, copied_fraction, nearest_ratio
from omnimamba_model.demo.score import answer_accuracy
from omnimamba_model.demo.settings import Settings
from omnimamba_model.demo.words import CAPTIONS, QUESTIONS, caption, captions, sentences, tokenizer
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.training.settings import read


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scans() -> Scans:
    return split()[0]


@pytest.fixture(scope="module")
def pixels(scans) -> PatchTokenizer:
    return PatchTokenizer(32, 2, (8, 8)).fit(scans.images, seeded())


def few(scans: Scans, count: int) -> Scans:
    return Scans(scans.images[:count], scans.labels[:count])


def rows(scans: Scans) -> list[tuple]:
    return [tuple(row) for row in scans.images.flatten(1).tolist()]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_split_is_whole_disjoint_and_stratified():
    training, held_out = split()
    fit, validation = split(validate=True)
    assert (len(training), len(held_out), len(fit), len(validation)) == (1347, 450, 1010, 337)
    assert len(set(rows(training)) | set(rows(held_out))) == 1797
    assert sorted(rows(fit) + rows(validation)) == sorted(rows(training))
    whole = torch.bincount(torch.cat([training.labels, held_out.labels])) / 1797
    for part in (training, held_out, fit, validation):
        torch.testing.assert_close(torch.bincount(part.labels) / len(part), whole, rtol=0, atol=0.004)
    assert training.images.min() == 0 and training.images.max() == 1
    assert torch.equal(split()[1].images, held_out.images)


def test_variations_are_small_and_differ(scans):
    image = scans.images[:1]
    varied = vary(image.expand(300, -1, -1), seeded())
    far = (varied - image).square().mean((1, 2)).sqrt()
    assert 0.02 < far.min() and far.max() < 0.35 and len({tuple(v) for v in varied.flatten(1).tolist()}) == 300
    middle = torch.zeros(400, 8, 8)
    middle[:, 3:5, 3:5] = 1
    moved = vary(middle, seeded())
    places = torch.arange(8.0)
    down = (moved.sum(2) * places).sum(1) / moved.sum((1, 2)) - 3.5
    right = (moved.sum(1) * places).sum(1) / moved.sum((1, 2)) - 3.5
    for offset in (down, right):
        assert -0.6 < offset.min() < -0.3 and 0.3 < offset.max() < 0.6 and abs(offset.mean()) < 0.05


def test_captions_read_well_and_every_word_is_one_token():
    words = tokenizer()
    assert caption("{a digit}", 1) == "a one"
    assert caption("a picture of {a digit}", 8) == "a picture of an eight"
    assert caption("draw the digit {digit}", 7) == "draw the digit seven"
    assert len({said for digit in range(10) for said in captions(digit)}) == 10 * len(CAPTIONS)
    for said in sentences():
        assert len(words.encode(said)) == len(said.split()) and words.decode(words.encode(said)) == said
    assert words.decode(words.encode("something else entirely")) == "something else entirely"


def test_answers_are_true():
    right = {question: [answer(digit) for digit in (3, 4, 9)] for question, answer in QUESTIONS.items()}
    assert right["is this digit even or odd?"] == ["odd", "even", "odd"]
    assert right["is this digit more than four?"] == ["no", "no", "yes"]
    assert right["which number comes after this digit?"] == ["four", "five", "ten"]


def test_lessons_pair_scans_with_their_own_words(scans, pixels, tmp_path):
    some, copies = few(scans, 20), 3
    write_lessons(tmp_path / "data", some, pixels, copies, noise=0.0, seed=0)
    known = dict(zip(map(tuple, pixels.encode(some.images).tolist()), some.labels.tolist(), strict=True))
    drawn = lines(tmp_path / "data" / "t2i.jsonl")
    assert len(drawn) == 20 * copies
    assert all(record["captions"] == captions(known[tuple(record["tokens"])]) for record in drawn)
    asked = json.loads((tmp_path / "data" / "mmu.json").read_text())
    assert len(asked) == 20 * copies and len({record["image"] for record in asked}) == 20 * copies
    by_scan: dict[int, set] = {}
    for i, record in enumerate(asked):
        (human, question), (gpt, answer) = ((turn["from"], turn["value"]) for turn in record["conversations"])
        question = question.removeprefix("<image>\n")
        assert (human, gpt) == ("human", "gpt") and answer == QUESTIONS[question](some.labels[i % 20].item())
        by_scan.setdefault(i % 20, set()).add(question)
        with Image.open(tmp_path / "data" / "images" / record["image"]) as picture:
            assert picture.size == (8, 8)
    assert all(len(questions) == copies for questions in by_scan.values())
    assert {record["text"] for record in lines(tmp_path / "data" / "text.jsonl")} == set(sentences())


def test_the_exam_asks_everything_about_scans_as_they_are(scans, pixels, tmp_path):
    some = few(scans, 5)
    write_exam(tmp_path / "exam", some, pixels)
    asked = json.loads((tmp_path / "exam" / "mmu.json").read_text())
    assert len(asked) == 5 * len(QUESTIONS)
    pictures = []
    for i in range(5):
        with Image.open(tmp_path / "exam" / "images" / asked[i * len(QUESTIONS)]["image"]) as picture:
            pictures.append(picture.copy())
    torch.testing.assert_close(pixels.look(pictures), pixels.features(some.images), rtol=0, atol=0.005)
    tokens = torch.tensor([record["tokens"] for record in lines(tmp_path / "exam" / "t2i.jsonl")])
    assert torch.equal(tokens, pixels.encode(some.images))


def test_noise_gives_a_scan_other_tokens_but_not_another_look(scans, pixels, tmp_path):
    one = few(scans, 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_lessons(tmp_path / name, one, pixels, 40, noise=0.05, seed=seed)
    tokens = torch.tensor([record["tokens"] for record in lines(tmp_path / "a" / "t2i.jsonl")])
    assert len({tuple(row) for row in tokens.tolist()}) > 4
    assert (pixels.decode(tokens) - one.images).square().mean().sqrt() < 0.15
    read_all = [(tmp_path / name / "t2i.jsonl").read_text() for name in "abc"]
    assert read_all[0] == read_all[1] != read_all[2]


def test_pictures_keep_grey_levels():
    images = torch.linspace(-0.5, 1.5, 64).view(1, 8, 8)
    (picture,) = as_pictures(images)
    levels = torch.tensor(list(picture.tobytes())).view(1, 8, 8) / 255
    torch.testing.assert_close(levels, images.clamp(0, 1), rtol=0, atol=0.002)


def test_settings_make_the_trainers(pixels, tmp_path):
    settings = Settings(codes=32)
    OmniMambaConfig.from_dict(settings.model(tokenizer(), pixels).to_dict())
    staged, control = (Settings(staged=s).runs(tmp_path, seed=3) for s in (True, False))
    assert list(staged) == ["stage0", "stage1-mmu", "stage1-t2i", "stage2"] and list(control) == ["one-stage"]
    runs = {}
    for name, values in {**staged, **control}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        runs[name] = read(tmp_path / f"{name}.yaml")
        assert runs[name].seed == 3 and Path(runs[name].out) == tmp_path / name
        assert runs[name].prefetch == 0, "a thread beside two processes on two cores takes steps from them"
    assert [runs[name].stage for name in staged] == ["base", "mmu", "t2i", "joint"]
    assert runs["stage0"].t2i.caption_dropout == 1 and 0 < runs["stage2"].t2i.caption_dropout < 0.5
    assert sum(runs[name].steps for name in staged) == runs["one-stage"].steps


def test_the_judge_knows_real_scans_and_not_noise(scans):
    judge, held_out = Judge(scans), split()[1]
    assert judge.accuracy(held_out.images, held_out.labels) > 0.98
    assert judge.accuracy(held_out.images, held_out.labels.roll(1)) < 0.3
    noise = torch.rand(200, 8, 8, generator=seeded())
    assert judge.accuracy(noise, torch.arange(200) % 10) < 0.3


def test_copies_are_counted():
    training = torch.randint(64, (30, 16), generator=seeded())
    fresh = torch.randint(64, (5, 16), generator=seeded(1))
    near = training[:2].clone()
    near[:, -1] = (near[:, -1] + 1) % 64
    assert copied_fraction(torch.cat([fresh, near]), training) == 0
    assert copied_fraction(torch.cat([fresh, near, training[4:7]]), training) == pytest.approx(0.3)


def test_nearness_is_one_for_new_scans_and_less_for_echoes(scans):
    held_out = split()[1].images
    assert nearest_ratio(held_out, held_out, scans.images) == 1
    assert nearest_ratio(scans.images[:50], held_out, scans.images) < 1e-6
    assert nearest_ratio(torch.rand(50, 8, 8, generator=seeded()), held_out, scans.images) > 1.5


def test_an_answer_is_right_or_wrong_as_a_whole():
    digits = torch.tensor([7, 2])
    said = {
        "describe this image.": ["a handwritten seven", "handwritten two"],
        "which digit is this?": ["seven", "two"],
        "is this digit even or odd?": ["even", "even even"],
    }
    assert list(answer_accuracy(said, digits).values()) == [0.5, 1, 0]
