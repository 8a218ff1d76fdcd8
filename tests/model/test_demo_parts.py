"""The demo's data, sentences and measures, each on its own."""

import pytest
import torch

pytest.importorskip("sklearn")

from omnimamba_model.demo.digits import Scans, shift, split
from omnimamba_model.demo.judge import Judge, copied_fraction, nearest_ratio
from omnimamba_model.demo.lessons import TEXT_SLOTS, Lessons, answer_table, caption_table, longest_answer
from omnimamba_model.demo.score import answer_accuracy
from omnimamba_model.demo.words import CAPTIONS, NAMES, QUESTIONS, caption, tokenizer
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.omnimamba import IGNORE
from omnimamba_model.text_tokenizer import SPECIAL


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scans() -> Scans:
    return split()[0]


@pytest.fixture(scope="module")
def lessons(scans) -> Lessons:
    pixels = PatchTokenizer(32, 2, (8, 8)).fit(scans.images, seeded())
    return Lessons(scans, tokenizer(), pixels, generator=seeded(), batch=64, noise=0.0)


def rows(scans: Scans) -> list[tuple]:
    return [tuple(row) for row in scans.images.flatten(1).tolist()]


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


def test_shifts_move_by_a_pixel_at_most():
    image = torch.arange(1.0, 65).view(1, 8, 8)
    moved = shift(image.expand(500, -1, -1), seeded())
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
    wanted = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
    found = {place for one in moved for place, whole in wanted.items() if torch.equal(one, whole)}
    assert found == set(wanted)
    assert all(any(torch.equal(one, whole) for whole in wanted.values()) for one in moved)


def test_captions_read_well_and_fit():
    words = tokenizer()
    assert caption("{a digit}", 1) == "a one"
    assert caption("a picture of {a digit}", 8) == "a picture of an eight"
    assert caption("draw the digit {digit}", 7) == "draw the digit seven"
    table = caption_table(words)
    assert table.shape == (len(CAPTIONS), 10, TEXT_SLOTS)
    assert words.decode(table[3, 7].tolist()) == "a handwritten seven"
    assert table[3, 7, :2].tolist() == [SPECIAL.pad] * 2
    assert len({tuple(ids) for ids in table.flatten(0, 1).tolist()}) == 10 * len(CAPTIONS)


def test_answers_alone_carry_loss():
    words = tokenizer()
    text, labels = answer_table(words)
    for i, (question, answer) in enumerate(QUESTIONS.items()):
        for digit in range(10):
            asked = words.encode(question)
            assert text[i, digit, : len(asked)].tolist() == asked
            learned = labels[i, digit][labels[i, digit] != IGNORE].tolist()
            assert learned == [*words.encode(answer(digit)), SPECIAL.eos]
            assert text[i, digit][labels[i, digit] != IGNORE].tolist() == learned
    assert longest_answer(words) == 4


def test_answers_are_true():
    right = {question: [answer(digit) for digit in (3, 4, 9)] for question, answer in QUESTIONS.items()}
    assert right["is this digit even or odd?"] == ["odd", "even", "odd"]
    assert right["is this digit more than four?"] == ["no", "no", "yes"]
    assert right["which number comes after this digit?"] == ["four", "five", "ten"]


def test_batches_pair_scans_with_their_own_words(lessons, scans):
    words = tokenizer()
    task, batch = lessons.draw()
    assert task == "t2i"
    known = {
        tuple(t): d for t, d in zip(lessons.pixels.encode(scans.images).tolist(), scans.labels.tolist(), strict=True)
    }
    for ids, drawn in zip(batch["caption"].tolist(), batch["image"].tolist(), strict=True):
        assert NAMES[known[tuple(drawn)]] in words.decode(ids).split()

    task, batch = lessons.look()
    assert task == "mmu" and batch["features"].shape == (64, 16, 16)
    assert ((batch["labels"] == batch["text"]) | (batch["labels"] == IGNORE)).all()
    assert (batch["labels"] != IGNORE).any(1).all()


def test_stage_0_sees_no_caption_and_no_adapter(lessons):
    task, batch = lessons.imagine()
    assert task == "t2i" and batch["adapter"] is False and (batch["caption"] == SPECIAL.pad).all()
    task, batch = lessons.read()
    assert task == "text"
    told = batch["labels"] != IGNORE
    assert torch.equal(batch["ids"][:, 1:][told[:, :-1]], batch["labels"][:, :-1][told[:, :-1]])
    assert ((batch["labels"] == SPECIAL.eos).sum(1) == 1).all()


def test_noise_gives_a_scan_other_tokens_but_not_another_look(lessons, scans):
    few = Scans(scans.images[:1], scans.labels[:1])
    noisy = Lessons(few, tokenizer(), lessons.pixels, generator=seeded(), batch=64, noise=0.05)
    tokens = noisy.draw()[1]["image"]
    plain = lessons.pixels.encode(few.images)
    assert len({tuple(row) for row in tokens.tolist()}) > 4
    assert (lessons.pixels.decode(tokens) - lessons.pixels.decode(plain)).square().mean().sqrt() < 0.1


def test_batches_follow_the_generator(scans):
    pixels = PatchTokenizer(8, 2, (8, 8)).fit(scans.images[:200], seeded())

    def first(seed: int) -> torch.Tensor:
        return Lessons(scans, tokenizer(), pixels, generator=seeded(seed), batch=8, noise=0.05).draw()[1]["image"]

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


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
