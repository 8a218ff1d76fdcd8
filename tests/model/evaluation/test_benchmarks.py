"""Each benchmark's files, small, and scores worked out by hand."""

import json
from pathlib import Path

import pytest

from omnimamba_model.evaluation import BENCHMARKS, Question, judge
from omnimamba_model.evaluation.vqav2 import normalised


def scores(name, said, tmp_path, files, images, **options):
    """What ``judge`` finds where the model's answers are ``said``, question by question."""
    return judge(name, said, files, images, tmp_path / "out", ending="", **options)


def test_pope(tmp_path, images, by_heart):
    folder = images("a.jpg", "b.jpg")
    for name, labels in (("coco_pope_random", "yes yes no no"), ("coco_pope_popular", "yes no no no")):
        lines = [
            {"question_id": i, "image": "ab"[i % 2] + ".jpg", "text": f"{name} {i}", "label": label}
            for i, label in enumerate(labels.split())
        ]
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = ["Yes. It is no cat.", "That is not so. Yes", "yes", "There is no cat"]
    said = by_heart({f"coco_pope_{n} {i}": answers[i] for n in ("random", "popular") for i in range(4)})
    files = [tmp_path / "coco_pope_random.json", tmp_path / "coco_pope_popular.json"]
    found = scores("pope", said, tmp_path, files, folder)
    assert found["coco_pope_random"] == {
        "accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50, "questions": 4,
    }  # fmt: skip
    assert found["coco_pope_popular"] == {
        "accuracy": 75, "precision": 50, "recall": 100, "f1": pytest.approx(200 / 3), "yes_ratio": 50, "questions": 4,
    }  # fmt: skip
    assert found["mean"]["accuracy"] == 62.5 and found["unreadable"] == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found


@pytest.mark.parametrize(
    ("said", "yes"),
    [("no", False), ("No, none", False), ("It is not there", False), ("Yes. No.", True), ("Nothing", True),
     ("NO", True), ("no\nmore", True), ("", True)],
)  # fmt: skip
def test_pope_reads_an_answer_as_its_own_script(said, yes):
    question = Question("1", Path("a.jpg"), "?", ("yes",), "f")
    assert BENCHMARKS["pope"].score([(question, said)])["mean"]["yes_ratio"] == 100 * yes


def test_mme(tmp_path, images, by_heart):
    folder = images("count/1.jpg", "count/2.png", "OCR/images/3.jpg", "code_reasoning/4.png")
    (folder / "OCR" / "questions_answers_YN").mkdir()
    for place, truth in (
        ("count/1", "YN"),
        ("count/2", "NY"),
        ("OCR/questions_answers_YN/3", "YN"),
        ("code_reasoning/4", "YY"),
    ):
        lines = [f"{place[-1]}{i} please?\t{'Yes' if t == 'Y' else 'No'}" for i, t in enumerate(truth)]
        (folder / f"{place}.txt").write_text("\n".join(lines) + "\n")
    said = by_heart({
        "10 please?": "Yes", "11 please?": "no.", "20 please?": "No", "21 please?": "Nobody: yes",
        "30 please?": " yes", "31 please?": "perhaps no", "40 please?": "YES", "41 please?": "yes",
    })  # fmt: skip
    found = scores("mme", said, tmp_path, [], folder)
    assert found["count"] == {"score": 125, "accuracy": 75, "accuracy_plus": 50, "questions": 4}
    assert found["OCR"]["score"] == 50 and found["code_reasoning"]["score"] == 200
    assert found["perception"] == 175 and found["cognition"] == 200
    assert list(scores("mme", said, tmp_path / "one", [folder / "OCR"], folder)) == [
        "perception", "cognition", "OCR", "unreadable",
    ]  # fmt: skip


def test_mme_passes_by_folders_of_no_kind_unless_they_are_named(images):
    folder = images("count/1.jpg", "eval_tool/x.jpg")
    (folder / "count" / "1.txt").write_text("please?\tYes\n")
    assert [q.key for q in BENCHMARKS["mme"].read([], folder, None)] == ["count/1/1"]
    for files in ([folder / "eval_tool"], [folder / "count", folder / "eval_tool"]):
        with pytest.raises(ValueError, match="named by MME's kinds, got eval_tool"):
            BENCHMARKS["mme"].read(files, folder, None)
    with pytest.raises(ValueError, match="got images"):
        BENCHMARKS["mme"].read([], folder.parent, None)


def test_gqa(tmp_path, images, by_heart):
    questions = {
        "071": {"question": "q1", "imageId": "n1", "answer": "left", "types": {"structural": "choose"}},
        "072": {"question": "q2", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
        "073": {"question": "q3", "imageId": "n2", "answer": "no", "types": {"structural": "verify"}},
    }
    (tmp_path / "q.json").write_text(json.dumps(questions))
    said = by_heart({"q1": "Left.", "q2": "yes", "q3": "no, it is not"})
    found = scores("gqa", said, tmp_path, [tmp_path / "q.json"], images("n1.jpg", "n2.jpg"))
    assert found == {
        "accuracy": pytest.approx(200 / 3), "choose": 100, "verify": 50, "questions": 3, "unreadable": 0,
    }  # fmt: skip


@pytest.fixture
def vqav2(tmp_path, images):
    folder = images("COCO_val2014_000000000042.jpg")
    asked = [{"question_id": i, "image_id": 42, "question": f"q{i}"} for i in range(4)]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    given = [
        ["yes"] * 10,
        ["two"] * 3 + ["2 dogs"] * 4 + ["many"] * 3,
        ["a dog"] * 2 + ["cats"] * 8,
        ["don't know"] * 1 + ["blue"] * 9,
    ]
    notes = [
        {"question_id": i, "image_id": 42, "answer_type": "yes/no" if i == 0 else "other",
         "answers": [{"answer": a, "answer_id": k + 1, "answer_confidence": "yes"} for k, a in enumerate(of)]}
        for i, of in enumerate(given)
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"annotations": notes}))
    return [tmp_path / "q.json"], folder


def test_vqav2(tmp_path, vqav2, by_heart):
    said = by_heart({"q0": "yes", "q1": "Two!", "q2": "the dog", "q3": "dont know"})
    found = scores("vqav2", said, tmp_path, *vqav2, annotations=tmp_path / "a.json")
    # Of three who said so one is left out in 3 of 10 cases: (7 + 3 * 2 / 3) / 10. Of two: (8 * 2 + 2) / 30.
    parts = [100, 90, 60, 30]
    assert found["accuracy"] == pytest.approx(sum(parts) / 4)
    assert found["yes/no"] == 100 and found["other"] == pytest.approx(60) and found["questions"] == 4


def test_vqav2_without_annotations_writes_what_the_server_takes(tmp_path, vqav2, by_heart):
    said = by_heart({"q0": "Yes.", "q1": "Two!", "q2": "the dog", "q3": "dont know"})
    assert scores("vqav2", said, tmp_path, *vqav2) == {"questions": 0, "unreadable": 0}
    sent = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert sent == [
        {"question_id": 0, "answer": "yes"}, {"question_id": 1, "answer": "2"},
        {"question_id": 2, "answer": "dog"}, {"question_id": 3, "answer": "don't know"},
    ]  # fmt: skip


def write_pope(folder, images):
    lines = [{"question_id": n, "image": f"{n}.jpg", "text": f"q{n}", "label": "yes"} for n in (1, 2)]
    (folder / "q.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return images("1.jpg", "2.jpg"), {}


def write_mme(folder, images):
    found = images("count/1.jpg", "count/2.jpg")
    for n in (1, 2):
        (found / "count" / f"{n}.txt").write_text(f"q{n}\tYes\n")
    return found, {}


def write_gqa(folder, images):
    (folder / "q.json").write_text(
        json.dumps({str(n): {"question": f"q{n}", "imageId": f"{n}", "answer": ("yes", ".")[n - 1]} for n in (1, 2)})
    )
    return images("1.jpg", "2.jpg"), {}


def write_vqav2(folder, images):
    asked = [{"question_id": n, "image_id": n, "question": f"q{n}"} for n in (1, 2)]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    given = ["yes"] * 10, ["a"] * 5 + ["the"] * 5  # articles, of which nothing is left to compare
    notes = [{"question_id": n, "answers": [{"answer": a} for a in of]} for n, of in enumerate(given, 1)]
    (folder / "a.json").write_text(json.dumps({"annotations": notes}))
    return images(*(f"COCO_val2014_{n:012}.jpg" for n in (1, 2))), {"annotations": folder / "a.json"}


@pytest.mark.parametrize(
    "name, write, right",
    [
        ("pope", write_pope, lambda found: (found["mean"]["accuracy"], found["mean"]["recall"])),
        ("mme", write_mme, lambda found: (found["count"]["accuracy"], found["count"]["accuracy_plus"])),
        ("gqa", write_gqa, lambda found: (found["accuracy"], 50)),
        ("vqav2", write_vqav2, lambda found: (found["accuracy"], 50)),
    ],
)
def test_a_broken_image_counts_as_a_wrong_answer(tmp_path, images, by_heart, name, write, right):
    """Two questions, the image of the second cut off, with a truth that no answer at all might be taken for."""
    folder, options = write(tmp_path, images)
    (broken,) = folder.rglob("*2.jpg")
    broken.write_bytes(broken.read_bytes()[:200])
    files = [] if name == "mme" else [tmp_path / "q.json"]
    found = scores(name, by_heart({"q1": "yes"}), tmp_path, files, folder, **options)
    assert right(found) == (50, 50) and found["unreadable"] == 1
    assert name != "pope" or found["mean"]["yes_ratio"] == 50


@pytest.mark.parametrize(
    "said, expected",
    [
        ("The Red-Hat.", "red hat"),
        ("a-b c_-d", "b c d"),  # each mark is judged by the answer as it was given
        ("1,000 people", "1000 people"),
        ("yes, please", "yes please"),
        ("3.5", "3.5"),
        ("end. of a\nline", "end of line"),
        ("None", "0"),
        ("it isnt", "it isn't"),
    ],
)
def test_vqav2_compares_answers_without_their_dress(said, expected):
    assert normalised(said) == expected


def test_files_of_another_kind_are_refused_by_name(tmp_path, images):
    folder = images("a.jpg")
    (tmp_path / "bad.json").write_text('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}\n')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "none.json").write_text("{")
    for name, file, message in [
        ("pope", "bad.json", "line 1, is no question of POPE.*yes or no"),
        ("gqa", "list.json", "is no questions file of GQA"),
        ("gqa", "none.json", "holds no JSON"),
        ("vqav2", "list.json", "is no questions file of VQAv2"),
        ("mme", "list.json", "folders named by MME's kinds, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            BENCHMARKS[name].read([tmp_path / file], folder, None)
    (folder / "count").mkdir()
    (folder / "count" / "a.txt").write_text("no tab Yes\n")
    with pytest.raises(FileNotFoundError, match="no image a.jpg or .png"):
        BENCHMARKS["mme"].read([folder / "count"], folder, None)
    images("count/a.jpg")
    with pytest.raises(ValueError, match="line 1, must be a question, a tab"):
        BENCHMARKS["mme"].read([folder / "count"], folder, None)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("pope", {"question_id": 1, "image": "a.jpg", "text": text, "label": "yes"}) for text in (5, None, ["?"])),
        ("gqa", {"1": {"imageId": "a", "question": None, "answer": "yes"}}),
        ("gqa", {"1": {"imageId": "a", "question": "?", "answer": 5}}),
        ("gqa", {"1": {"imageId": "a", "question": "?", "answer": "yes", "types": {"structural": None}}}),
        *(("vqav2", {"question_id": 1, "image_id": 1, "question": "?"} | change)
          for change in ({"question": 5}, {"image_id": "1"}, {"question_id": "1"}, {"question_id": None})),
    ],
)  # fmt: skip
def test_what_is_no_text_is_told_before_anything_is_asked(tmp_path, name, value):
    if name == "vqav2":
        value = {"data_subtype": "val2014", "questions": [value]}
    (tmp_path / "q.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"q\.json.* is no (question of POPE|questions file of (GQA|VQAv2)).*must be"):
        BENCHMARKS[name].read([tmp_path / "q.json"], tmp_path, None)


def test_annotations_without_an_answer_are_no_annotations(tmp_path):
    questions = [{"question_id": 1, "image_id": 1, "question": "?"}]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1, "answers": []}]}))
    with pytest.raises(ValueError, match=r"a\.json is no annotations file of VQAv2.*question 1 has no answers"):
        BENCHMARKS["vqav2"].read([tmp_path / "q.json"], tmp_path, tmp_path / "a.json")


def test_mmes_text_that_is_none_is_named(images):
    folder = images("count/a.jpg")
    (folder / "count" / "a.txt").write_bytes(b"q\xff\tYes\n")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        BENCHMARKS["mme"].read([], folder, None)
