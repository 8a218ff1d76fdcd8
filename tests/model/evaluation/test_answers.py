"""Long runs: stopped, gone on with, and met with damaged pictures."""

import dataclasses
import json

import pytest
import torch

from omnimamba_model import load, save
from omnimamba_model.evaluation import Question, judge
from omnimamba_model.evaluation.answers import answers
from omnimamba_model.pipeline import Pipeline


@pytest.fixture
def questions(images):
    folder = images(*(f"{i}.png" for i in range(5)))
    return [Question(str(i), folder / f"{i}.png", f"q{i}") for i in range(5)]


def ask(pipeline, questions, out, **options):
    return answers(pipeline, questions, out, about={"checkpoint": "c"}, batch=2, **options)


def test_a_stopped_run_asks_only_what_is_left(questions, tmp_path, by_heart):
    said, out = {f"q{i}": f"a{i}" for i in range(5)}, tmp_path / "a.jsonl"

    class Stops(by_heart):
        def ask(self, images, asked, *rest):
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return super().ask(images, asked, *rest)

    with pytest.raises(KeyboardInterrupt):
        ask(Stops(said), questions, out)
    with open(out, "a") as file:
        file.write('{"key": "2", "ans')  # what a kill may leave
    rest = by_heart(said)
    assert ask(rest, questions, out) == ["a0", "a1", "a2", "a3", "a4"]
    assert rest.asked == [["q2", "q3"], ["q4"]]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("key") for line in lines] == [None, "0", "1", "2", "3", "4"]
    again = by_heart({})
    assert ask(again, questions, out) == ["a0", "a1", "a2", "a3", "a4"] and again.asked == []


def test_answers_of_another_run_are_never_mixed_in(questions, tmp_path, by_heart):
    said, out = {f"q{i}": "a" for i in range(5)}, tmp_path / "a.jsonl"
    ask(by_heart(said), questions, out)
    kept = out.read_bytes()
    with pytest.raises(ValueError, match="holds answers of another run"):
        ask(by_heart(said), questions, out, form="user")
    assert out.read_bytes() == kept


def test_a_damaged_picture_has_no_answer_and_a_missing_one_stops_the_run(questions, tmp_path, by_heart):
    questions[1].image.write_text("no picture")
    pipeline = by_heart({f"q{i}": f"a{i}" for i in range(5)})
    assert ask(pipeline, questions, tmp_path / "a.jsonl") == ["a0", None, "a2", "a3", "a4"]
    questions[3].image.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images are missing: .*3\.png"):
        ask(pipeline, questions, tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


def test_what_is_asked_otherwise_now_is_asked_again(questions, tmp_path, by_heart):
    said, out = {f"q{i}": f"a{i}" for i in range(5)} | {"new": "b"}, tmp_path / "a.jsonl"
    ask(by_heart(said), questions, out)
    changed = [dataclasses.replace(questions[1], text="new"), *questions[2:]]
    rest = by_heart(said)
    assert ask(rest, changed, out) == ["b", "a2", "a3", "a4"] and rest.asked == [["new"]]
    elsewhere = questions[3].image.with_name("other.png")
    elsewhere.write_bytes(questions[3].image.read_bytes())
    rest = by_heart(said)
    ask(rest, [dataclasses.replace(questions[3], image=elsewhere), questions[1]], out)
    assert rest.asked == [["q3"]]


@pytest.mark.parametrize(
    "line", ["no JSON", "5", "[" * 100_000, '{"key": "0", "question": "q0", "image": "0.png"}',
             '{"key": "0", "question": "q0", "image": "0.png", "answer": 5}',
             '{"key": 0, "question": "q0", "image": "0.png", "answer": "a"}'],
)  # fmt: skip
def test_damaged_answers_are_named(questions, tmp_path, by_heart, line):
    said, out = {f"q{i}": f"a{i}" for i in range(5)}, tmp_path / "a.jsonl"
    ask(by_heart(said), questions, out)
    with open(out, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 7, is no key, image, question and answer: .* remove"):
        ask(by_heart(said), questions, out)


def test_another_models_answers_are_no_answers(folder, tmp_path):
    """The checkpoint's name and all else being as it was."""
    line = {"question_id": 3, "image": "a.png", "text": "word1", "label": "yes"}
    (tmp_path / "pope.json").write_text(json.dumps(line))

    def judged(out="out", **options):
        pipeline = Pipeline.load(folder, **options)
        options = dict(checkpoint="c", ending="", form="plain")
        return judge("pope", pipeline, [tmp_path / "pope.json"], folder, tmp_path / out, **options)

    assert judged() == judged()
    with pytest.raises(ValueError, match="holds answers of another run"):
        judged(dtype=torch.bfloat16)
    model = load(folder)
    with torch.no_grad():
        model.backbone.norm_f.weight += 1
    save(model, folder)
    with pytest.raises(ValueError, match="holds answers of another run"):
        judged()
    judged("again")
