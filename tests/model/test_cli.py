import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from omnimamba_model import OmniMamba, Sampling, cli, save
from omnimamba_model.pipeline import Pipeline


@pytest.fixture
def calls(monkeypatch):
    """A checkpoint that loads in no time and records what it is asked."""
    seen = []

    class Recorder:
        def describe(self):
            return {"weights": "recorded"}

        def draw(self, prompts, sampling, guidance, copies, exact):
            seen.append((prompts, sampling, guidance, copies, exact))
            return [Image.new("L", (8, 8), 30 * i % 256) for i in range(len(prompts) * copies)]

        def ask(self, images, questions, sampling, form, *steps):
            seen.append(([image.size for image in images], questions, sampling, form, *steps))
            return ["It is a seven."]

    def load(cls, folder, *place, fold=False):
        seen.append((Path(folder).name, *place, fold))
        return Recorder()

    monkeypatch.setattr(Pipeline, "load", classmethod(load))
    return seen


def test_info_prints_text_and_json(capsys):
    assert cli.main(["info"]) == 0
    assert "reference" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["reference"] is None


def test_generate_passes_its_options_on(calls, tmp_path):
    out = tmp_path / "seven.png"
    options = "--seed 5 --temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.1 --count 3 --guidance 2.5".split()
    options += "--repetition-penalty 1.5 --dtype float16 --device cuda:1 --exact".split()
    assert cli.main(["generate", "--checkpoint", "trained", "--prompt", "a seven", "--out", str(out), *options]) == 0
    sampling = Sampling(0.8, 40, 0.9, 5, 0.1, 1.5)
    assert calls == [("trained", "cuda:1", torch.float16, None), (["a seven"], sampling, 2.5, 3, True)]
    with Image.open(out) as image:
        assert image.size == (3 * 136 - 8, 128) and image.getpixel((2 * 136, 0)) == 60


@pytest.mark.parametrize("option, folded", [("--fold", True), ("--no-fold", False)])
def test_tables_are_folded_as_the_command_says(calls, tmp_path, option, folded):
    assert cli.main(["generate", "--checkpoint", "c", "--prompt", "a", "--out", str(tmp_path / "a.png"), option]) == 0
    assert calls[0] == ("c", "cpu", None, folded)


@pytest.mark.parametrize(
    "given, prompts",
    [
        (["--prompt", "a"], ["a"]),
        (["--prompt", "a", "b"], ["a", "b"]),
        (["--prompt", "a", "--prompt", "b", "c"], ["a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 12])
def test_one_or_many_prompts_make_a_grid(calls, tmp_path, given, prompts, count):
    """Many drawings of many prompts: a row a prompt; else rows of ten."""
    out = tmp_path / "grid.png"
    assert cli.main(["generate", "--checkpoint", "c", *given, "--count", str(count), "--out", str(out)]) == 0
    assert calls[1][0] == prompts and calls[1][3] == count
    columns = count if count > 1 and len(prompts) > 1 else 10
    drawn = len(prompts) * count
    gap = 8 if drawn > 1 else 0
    across, down = min(columns, drawn), -(-drawn // columns)
    with Image.open(out) as image:
        assert image.size == (across * (128 + gap) - gap, down * (128 + gap) - gap)
        last = (drawn - 1) % columns * (128 + gap), (down - 1) * (128 + gap)
        assert image.getpixel(last) == 30 * (drawn - 1) % 256


@pytest.mark.parametrize("seed", ["9223372036854775808", "1.5", "one"])
def test_a_seed_has_64_bits(capsys, seed):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--checkpoint", "c", "--prompt", "a", "--out", "a.png", "--seed", seed])
    assert "expected a whole number of 64 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nonsense", "must be cpu or cuda"),
        ("meta", "must be cpu or cuda"),
        ("cuda:99", "cuda:99 is not there"),
        ("cpu:3", "there is one cpu"),
    ],  # fmt: skip
)
def test_a_device_that_is_not_there(model, tmp_path, capsys, device, message):
    save(model, tmp_path / "c")
    (tmp_path / "OmniMamba.pth").write_bytes(b"not read")
    given = ["--prompt", "a", "--out", str(tmp_path / "a.png"), "--device", device]
    assert cli.main(["generate", "--checkpoint", str(tmp_path / "c"), *given]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        OmniMamba.from_pretrained(tmp_path, device=device)


def test_ask_prints_the_answer(calls, tmp_path, capsys):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    assert cli.main(["ask", "--checkpoint", "c", "--image", str(tmp_path / "a.png"), "--question", "Which digit?",
                     "--dtype", "int8"]) == 0  # fmt: skip
    assert capsys.readouterr().out == "It is a seven.\n"
    assert calls == [("c", "cpu", torch.int8, False), ([(20, 10)], ["Which digit?"], Sampling(0.0, seed=0), None, 256)]


def test_evaluate_passes_its_options_on(calls, tmp_path, capsys):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    line = {"question_id": 3, "image": "a.png", "text": "Is it a seven?", "label": "yes"}
    (tmp_path / "pope.json").write_text(json.dumps(line))
    place = [
        str(tmp_path / "pope.json"),
        "--images",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--checkpoint",
        "c",
    ]
    assert cli.main(["evaluate", "pope", *place, "--ending", " Yes or no?", "--format", "user", "--top-k", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"]["accuracy"] == 100
    asked = ([(20, 10)], ["Is it a seven? Yes or no?"], Sampling(0.0, 3, seed=0), "user")
    assert calls == [("c", "cpu", None, False), asked]


def test_drawings_of_captions_by_command(calls, monkeypatch, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a seven\na two\n")
    recorder = Pipeline.load(tmp_path)
    monkeypatch.setattr(type(recorder), "draw", lambda *given: [Image.new("L", (4, 4)) for _ in given[1]])
    place = [str(tmp_path / "captions.txt"), "--out", str(tmp_path / "out"), "--checkpoint", "c", "--batch", "1"]
    assert cli.main(["evaluate", "draw", *place]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "drawings.json"]
    assert capsys.readouterr().out == f"2 drawings in {tmp_path / 'out'}\n"


def test_web_serves_this_machine_alone_unless_told(calls, monkeypatch):
    seen = []
    module = type(sys)("omnimamba_model.web")
    module.serve = lambda pipeline, *place: seen.append(place)
    monkeypatch.setitem(sys.modules, "omnimamba_model.web", module)
    assert cli.main(["web", "--checkpoint", "c", "--port", "17860", "--backend", "native"]) == 0
    assert cli.main(["web", "--checkpoint", "c", "--host", "0.0.0.0", "--share"]) == 0
    assert seen == [("127.0.0.1", 17860, "native", False), ("0.0.0.0", 7860, None, True)]


def test_web_says_what_to_install(calls, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "omnimamba_model.web", raising=False)
    assert cli.main(["web", "--checkpoint", "c"]) == 2
    assert "needs Gradio, pip install 'omnimamba[web]'" in capsys.readouterr().err and calls == []


def test_demo_passes_its_options_on(monkeypatch, tmp_path, capsys):
    seen = []
    module = type(sys)("omnimamba_model.demo")
    module.Settings = lambda **changes: changes
    module.run = lambda out, **options: seen.append((out, options)) or {"t2i_accuracy": 0.25}
    monkeypatch.setitem(sys.modules, "omnimamba_model.demo", module)
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "7"]) == 0
    assert cli.main(["demo", "--out", str(tmp_path), "--control", "--validate"]) == 0
    assert seen == [
        (tmp_path, {"seed": 7, "settings": {"staged": True}, "validate": False}),
        (tmp_path, {"seed": 0, "settings": {"staged": False}, "validate": True}),
    ]
    assert '"t2i_accuracy": 0.25' in capsys.readouterr().out


def test_demo_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "needs sklearn and matplotlib and tokenizers: pip install 'omnimamba[demo]'" in capsys.readouterr().err


def test_errors_are_one_line_with_status_2(model, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("not a picture")
    save(model, tmp_path / "bare")
    generate = ["generate", "--prompt", "a seven", "--checkpoint"]
    out = ["--out", str(tmp_path / "x.png")]
    for arguments, message in [
        ([*generate, str(tmp_path / "none"), *out], "is not a checkpoint here, nor OWNER/NAME on the hub"),
        ([*generate, str(tmp_path / "bare"), *out], "has no tokenizer.json"),
        ([*generate, "c", "--out", str(tmp_path / "no" / "x.png")], "is not a folder; make it first"),
        ([*generate, "c", "--out", str(tmp_path)], "is no regular file; name another"),
        ([*generate, "c", *out, "--top-p", "2"], "top_p must lie in (0, 1], got 2.0"),
        (["ask", "--checkpoint", "c", "--image", str(tmp_path / "notes.png"), "--question", "?"], "notes.png"),
        (["ask", "--checkpoint", "c", "--image", str(tmp_path / "none.png"), "--question", "?"], "none.png"),
    ]:
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith(f"omnimamba {arguments[0]}: ")
        assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "x.png").exists()


def test_a_place_that_is_no_regular_file_is_refused_before_the_work(calls, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "lost").symlink_to(tmp_path / "no" / "x.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in [("pipe", "no regular file"), ("lost", "make it first"), ("loop", "no regular file")]:
        generate = ["generate", "--checkpoint", "c", "--prompt", "a seven", "--out", str(tmp_path / name)]
        assert cli.main(generate) == 2
        assert message in capsys.readouterr().err
    assert calls == []


def test_an_image_too_large_to_be_honest_is_one_line(calls, tmp_path, capsys, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert cli.main(["ask", "--checkpoint", "c", "--image", str(tmp_path / "bomb.png"), "--question", "?"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "bomb.png cannot be read as an image" in said and calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["demo"],
        ["generate", "--checkpoint", "c", "--out", "a.png", "--prompt"],
        ["generate", "--count", "0"],
        ["generate", "--count", "10001"],
        ["generate", "--count", "9" * 5000],
        ["ask", "--image"],
        ["web", "--checkpoint", "c", "--port", "65536"],
    ],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err
