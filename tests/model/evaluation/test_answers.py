"""Long runs: stopped, gone on with, and met with damaged pictures."""

import json

import pytest

from omnimamba_model.evaluation import Question
from omnimamba_model.evaluation.answers import answers


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
