"""What a settings file may say, and what the shipped ones say."""

from pathlib import Path

import pytest
import torch
import yaml

from omnimamba_model import OmniMamba, OmniMambaConfig
from omnimamba_model.cli import main
from omnimamba_model.training import Trainer
from omnimamba_model.training.phase import Phase
from omnimamba_model.training.run import _phase
from omnimamba_model.training.settings import SHIPPED, read


def _written(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_settings_are_the_papers(name):
    found = read(name, ["out=x", "t2i.caption_dropout=0.1"] if name != "stage1-mmu" else ["out=x"])
    expected = {"stage1-mmu": (5000, 1e-3, 100), "stage1-t2i": (100_000, 8e-4, 1000), "stage2": (150_000, 1e-4, 0)}
    assert (found.steps, found.learning_rate, found.warmup) == expected[name] and found.out == "x"
    Phase(name, found.stage, ("t2i",), found.steps, found.learning_rate, found.warmup)


PUBLISHED = {  # learning rate, warm-up, steps, batches of MMU and of T2I over 8 processes
    "stage1-mmu": ("mmu", 1e-3, 100, 5_000, 256, 0),
    "stage1-t2i": ("t2i", 8e-4, 1_000, 100_000, 0, 720),
    "stage2": ("joint", 1e-4, 0, 150_000, 8 * 3, 8 * 48),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_of_a_shipped_schedule_is_published(name, config):
    """The paper's table, and what it says of all stages: AdamW (0.9, 0.95), no weight decay, a cosine to 1 % of the
    peak, bf16, no caption dropped, 449 tokens of text in 1182 positions."""
    found = read(name)
    stage, peak, warmup, steps, mmu, t2i = PUBLISHED[name]
    batches = [data.batch if data else 0 for data in (found.mmu, found.t2i, found.text)]
    assert (found.stage, found.steps, batches) == (stage, steps, [mmu, t2i, 0])
    assert (found.precision, found.accumulate, found.weight_decay, found.clip) == ("bf16", 1, 0.0, 1.0)
    if found.mmu:
        assert found.mmu.form == ("instruct" if name == "stage2" else "caption") and found.mmu.text_length == 449
        assert found.mmu.text_length + 4 + OmniMambaConfig().image_features == 1182
    assert found.t2i is None or found.t2i.caption_dropout == 0.0
    lessons = {task: len for task in ("t2i", "mmu") if getattr(found, task)}
    trainer = Trainer(OmniMamba(config), _phase(found, lessons), lessons)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert all(g["betas"] == (0.9, 0.95) and g["weight_decay"] == 0 for g in trainer.optimizer.param_groups)
    rate = trainer.phase.rate
    assert rate(0) == pytest.approx(peak / max(warmup, 1)) and rate(steps) == pytest.approx(peak / 100)
    assert rate(max(warmup - 1, 0)) == pytest.approx(peak, rel=2e-3)
    assert rate(steps // 2) == pytest.approx(peak * (0.01 + 0.99 / 2))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["stepz=3"], "unknown settings: \\['stepz'\\]"),
        (["t2i.batsh=3"], "t2i.batsh"),
        (["learning_rate=1e-3"], "write 1.0e-4 for 1e-4"),
        (["steps=many"], "steps must be int, got 'many'"),
        (["stage=last"], "stage must be one of"),
        (["t2i.batch=0"], "t2i.batch must be a whole number"),
        (["model=x"], "one of the two"),
        (["t2i=3"], "t2i. must be a group"),
        (["out.x=3"], "out is no group|cannot be set"),
        (["steps"], "expected key=value"),
        (["t2i=null", "mmu=null"], "data for at least one task"),
        (["t2i.files=[]"], "at least one file"),
        (["t2i.files=[3]"], "must be texts"),
        (["recompute=2"], "recompute must be bool"),
        (["seed=-1"], "seed must be a whole number"),
        (["stage=mmu"], r"mmu's alone in stage mmu.*got \['t2i'\]"),
        (["prefetch=-1"], "prefetch must be a whole number of at least 0"),
        (["threads=100000"], "threads must be at most 1024"),
    ],
)
def test_mistakes_in_settings_are_named(values, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(_written(tmp_path / "s.yaml", values), changes)


def test_shards_are_named_by_braces_in_a_file_and_on_the_command_line(values, tmp_path):
    given = values | {"mmu": values["mmu"] | {"files": ["m-{0..3}.tar", "n.json"]}}
    found = read(_written(tmp_path / "s.yaml", given), ["t2i.files=s-{000..012}.tar"])
    assert found.t2i.files == ("s-{000..012}.tar",) and found.mmu.files == ("m-{0..3}.tar", "n.json")


def test_a_file_that_is_no_settings_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("a: [")
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    assert "is not YAML" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="group of settings"):
        read(tmp_path / "a.yaml")


def test_a_setting_given_twice_is_refused(values, tmp_path, capsys):
    """PyYAML alone takes the last one."""
    path = tmp_path / "a.yaml"
    path.write_text("steps: 1\n" + yaml.safe_dump(values))
    assert main(["train", str(path)]) == 2
    assert "steps is set twice" in capsys.readouterr().err and not Path(values["out"]).exists()
    for twice in ("t2i={files: a.jsonl, batch: 2, batch: 3}", "fresh={backbone: {n_layer: 1, n_layer: 2}}"):
        with pytest.raises(ValueError, match="(batch|n_layer) is set twice"):
            read(_written(path, values), [twice])
    path.write_text("common: &c {batch: 2, images: a}\nmmu: {<<: *c, batch: 3}\n")
    with pytest.raises(ValueError, match="unknown settings: .'common'.*missing"):  # what it means is as ever
        read(path)
