"""The demo end to end, with too few steps to be any good."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

from omnimamba_model import OmniMamba, load
from omnimamba_model.cli import main
from omnimamba_model.demo import Settings, run
from omnimamba_model.demo.experiment import _claim
from omnimamba_model.training import Trainer

SHORT = Settings(
    codes=16, d_model=16, d_state=8, headdim=16, batch=4, copies=1, drawings=20, stage0=2, stage1=2, stage2=2
)
WRITTEN = {
    "config.json",
    "image_tokenizer.safetensors",
    "loss.png",
    "metrics.json",
    "model.safetensors",
    "samples.png",
    "tokenizer.json",
}
ACCURACIES = ("t2i_accuracy", "mmu_accuracy", "classifier_accuracy", "ceiling_accuracy", "copied_fraction")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of the short demo and the metrics it returned."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    return folder, run(folder, settings=SHORT, progress=False)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def scored(metrics):
    return {**metrics, "seconds": 0}


def test_everything_is_written(made):
    folder, metrics = made
    assert set(files(folder)) == WRITTEN
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert all(0 <= metrics[name] <= 1 for name in ACCURACIES)
    assert metrics["classifier_accuracy"] >= metrics["ceiling_accuracy"] - 0.05 > 0.5
    assert metrics["schedule"] == "staged" and metrics["scored_on"] == "held-out scans" and metrics["seconds"] > 0
    for name in ("samples.png", "loss.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 500 and len(picture.convert("L").getcolors()) > 20
    assert isinstance(load(folder), OmniMamba)


def test_the_trainer_did_it_and_can_do_it_again(made, tmp_path, capsys):
    """The settings files that were left are `omnimamba train`'s own, and the demo's model is the last run's."""
    folder, metrics = made
    work = folder / "training"
    assert {path.stem for path in work.glob("*.yaml")} == set(metrics["steps"])
    again = ["train", str(work / "stage2.yaml"), f"out={tmp_path / 'again'}"]
    assert main(again) == 0
    one, other, kept = (
        load(path).state_dict() for path in (work / "stage2" / "model", tmp_path / "again/model", folder)
    )
    assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], kept[name]) for name in one)


def test_a_seed_fixes_the_metrics_and_the_callers_settings_stay(made, tmp_path):
    torch.manual_seed(123)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    again = run(tmp_path, settings=SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    other = run(tmp_path, seed=1, settings=SHORT, progress=False)  # a finished demo is made anew
    metrics = made[1]
    assert scored(again) == scored(metrics)
    assert other["held_out_loss"] != metrics["held_out_loss"]


def test_nobody_elses_files_are_removed(tmp_path, capsys):
    """A folder of that name may be anybody's; a demo's own, however it was left, is made anew."""
    theirs = tmp_path / "training" / "data" / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "training holds data, which are no demo's; name another folder, or remove it" in capsys.readouterr().err
    assert theirs.read_text() == "years of work"
    work = tmp_path / "other"
    _claim(work, {"seed": 1})
    (work / "start").mkdir()
    (work / "start" / "config.json").write_text("{}")
    (work / "stage2.yaml").write_text("")
    _claim(work, {"seed": 1})
    assert (work / "start" / "config.json").exists(), "it goes on"
    (work / "data").symlink_to(theirs.parent)
    _claim(work, {"seed": 2})
    assert [path.name for path in work.iterdir()] == ["demo.json"] and theirs.exists()


def test_the_control_learns_everything_at_once_and_held_out_scans_stay_alone(tmp_path, monkeypatch):
    from omnimamba_model.demo import digits

    kept, _ = digits.split()
    known = {tuple(row) for row in kept.images.flatten(1).tolist()}
    seen = []
    monkeypatch.setattr(
        "omnimamba_model.demo.experiment.metrics",
        lambda pipeline, work, training, scored, *made: seen.extend([training, scored]) or {},
    )
    short = dataclasses.replace(SHORT, staged=False)
    monkeypatch.setattr("omnimamba_model.demo.Settings", lambda staged: dataclasses.replace(SHORT, staged=staged))
    assert main(["demo", "--out", str(tmp_path), "--control", "--validate"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["schedule"] == "one stage (control)" and metrics["steps"] == {"one-stage": 8} and not short.staged
    assert metrics["scored_on"] == "validation part of the training split"
    training, scored = seen
    assert len(training) + len(scored) == 1347
    assert {tuple(row) for part in seen for row in part.images.flatten(1).tolist()} == known


def test_words_become_a_picture(made, tmp_path):
    png = tmp_path / "seven.png"
    asked = ["generate", "--checkpoint", str(made[0]), "--out", str(png), "--guidance", "2", "--prompt"]
    assert main([*asked, "a handwritten seven", "--seed", "3"]) == 0
    with Image.open(png) as drawn:
        assert drawn.mode == "L" and drawn.width == drawn.height
        pixels = drawn.tobytes()
    main([*asked, "a handwritten seven", "--seed", "3"])
    with Image.open(png) as again:
        assert again.tobytes() == pixels
    assert main([*asked, "a purple seven"]) == 0


@pytest.mark.parametrize("size", [(8, 8), (128, 128), (57, 31)])
def test_a_picture_becomes_words(made, tmp_path, capsys, size):
    png = tmp_path / "digit.png"
    Image.new("L", size, 90).save(png)
    assert main(["ask", "--checkpoint", str(made[0]), "--image", str(png), "--question", "Which digit is this?"]) == 0
    assert capsys.readouterr().err == ""


def test_a_file_that_is_no_image_is_refused(made, tmp_path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    assert main(["ask", "--checkpoint", str(made[0]), "--image", str(text), "--question", "which digit is this?"]) == 2
    assert "notes.png" in capsys.readouterr().err


def test_a_stopped_demo_goes_on_and_leaves_whole_files_only(made, tmp_path, monkeypatch):
    taken, steps = Trainer.step, []

    def step(self):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return taken(self)

    def stop(*_):
        raise KeyboardInterrupt

    def half(self, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for place, stopper in (
        ("omnimamba_model.training.Trainer.step", step),
        ("omnimamba_model.demo.experiment.make_answers", stop),
        ("matplotlib.figure.Figure.savefig", half),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, stopper)
            run(tmp_path, settings=SHORT, progress=False)
        left = files(tmp_path)
        assert set(left) <= WRITTEN - {"samples.png", "loss.png", "metrics.json"}
        assert all(files(made[0])[name] == content for name, content in left.items())
    monkeypatch.setattr("omnimamba_model.training.Trainer.step", stop)  # nothing is left to train
    assert scored(run(tmp_path, settings=SHORT, progress=False)) == scored(made[1])
