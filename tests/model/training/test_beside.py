"""Lessons in processes of their own: the same losses and parameters as in one process, and no process left behind."""

import dataclasses
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from runs import losses, until, written

from omnimamba_model import OmniMamba, load
from omnimamba_model.training import Phase, Trainer, beside, checkpoints
from omnimamba_model.training.beside import side_by_side
from omnimamba_model.training.parallel import Ranks
from omnimamba_model.training.run import run

ROOT = Path(__file__).resolve().parents[3]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_the_same_bits_through_a_kill_and_no_process_or_file_stays(values, data, tmp_path):
    """With dropout, for which each step and lesson has its own seed; a bad picture is counted over there too."""
    (data / "3.png").write_bytes(b"no picture")
    values = values | {"steps": 8, "fresh": values["fresh"] | {"lora_dropout": 0.3}}
    run(written(tmp_path / "one.yaml", values | {"out": str(tmp_path / "one")}), print)
    values |= {"side_by_side": True, "recompute": True}
    settings = written(tmp_path / "two.yaml", values)
    command = [sys.executable, "-m", "omnimamba_model", "train", str(tmp_path / "two.yaml")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(scratch)}, **silent)
    begun = until(lambda: checkpoints.kept(Path(values["out"])))
    theirs = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert begun and process.wait() == -signal.SIGKILL and theirs
    assert until(lambda: all(map(ended, theirs)))
    assert not list(scratch.iterdir())
    run(settings, print)
    assert losses(values["out"]) == losses(tmp_path / "one")
    assert losses(values["out"])[-1]["passed over"]
    a, b = (load(Path(out) / "model").state_dict() for out in (values["out"], tmp_path / "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16", "recompute": True}, {"precision": "bf16", "recompute": True, "accumulate": 2}],
    ids=["one batch a step", "two batches a step"],
)
def test_sixteen_bits_layers_computed_again_and_accumulation_go_together(values, tmp_path, changes):
    """The bits of one process; with accumulation its sums in another order, so that the last bits differ."""
    values |= {"steps": 3, "fresh": values["fresh"] | {"lora_dropout": 0.3}, **changes}
    run(written(tmp_path / "one.yaml", values | {"out": str(tmp_path / "one")}), print)
    plain = values | {"recompute": False, "precision": "fp32", "out": str(tmp_path / "wide")}
    run(written(tmp_path / "wide.yaml", plain), print)
    run(written(tmp_path / "two.yaml", values | {"side_by_side": True}), print)
    one, two, wide = (losses(out) for out in (tmp_path / "one", values["out"], tmp_path / "wide"))
    assert one != wide, "16 bits are used"
    if "accumulate" not in changes:
        assert two == one
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    for a, b, exact in zip(one, two, wide, strict=True):
        for name in ("loss t2i", "loss mmu"):
            assert abs(a[name] - b[name]) <= 2 * max(abs(a[name] - exact[name]), 1e-4)
        assert a["tokens"] == b["tokens"]


def test_what_goes_wrong_over_there_is_raised_here(values, data, tmp_path):
    for i in range(7):
        (data / f"{i}.png").unlink()
    said = []
    with pytest.raises(ValueError, match="none of 7 records can be used, for example: .*png cannot be read"):
        run(written(tmp_path / "s.yaml", values | {"side_by_side": True}), said.append)
    assert "passed over 7 times, a record or a whole file each:" in said, "as it was counted there"


@pytest.mark.parametrize("ranks", [Ranks(0, 2), Ranks(device=torch.device("meta"))], ids=["two", "no CPU"])
def test_it_is_for_one_process_on_a_cpu(model, ranks):
    trainer = Trainer(model, Phase("a phase", "joint", ("t2i",), 1, 1e-3), {"t2i": lambda place: None})
    trainer.ranks = dataclasses.replace(ranks)
    with pytest.raises(ValueError, match="one process on a CPU, got"), side_by_side(trainer):
        pass


def two_lessons(model, other=int) -> Trainer:
    """A trainer that takes no step."""
    return Trainer(model, Phase("a phase", "joint", ("t2i", "mmu"), 1, 1e-3), {"t2i": int, "mmu": other})


@pytest.mark.skipif(sys.platform != "linux", reason="not every system can reserve room on a disk")
def test_a_process_is_sent_the_parameters_once_and_the_file_has_its_room(config, monkeypatch):
    model = OmniMamba(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, d_model=128)))
    sent, made, send, make = [], [], Connection.send_bytes, tempfile.TemporaryFile
    monkeypatch.setattr(Connection, "send_bytes", lambda link, data: sent.append(data) or send(link, data))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: made.append(make(**options)) or made[-1])
    with side_by_side(two_lessons(model)):
        file = os.fstat(made[0].fileno())
    assert file.st_blocks * 512 >= file.st_size > 0
    (data,) = sent
    assert len(data) <= 1.5 * sum(parameter.nbytes for parameter in model.parameters())


def test_what_cannot_be_sent_leaves_no_process(model, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    trainer = two_lessons(model, lambda place: None)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"), side_by_side(trainer):
        pass


@pytest.mark.parametrize("had, asked, each", [(5, None, 2), (1, None, 1), (5, 4, 4)])
def test_threads_are_dealt_out_unless_they_are_told(model, monkeypatch, had, asked, each):
    given = []

    class Noted(beside.Beside):
        def __init__(self, *_):
            pass

        def give(self, packed):
            given.append(torch.load(io.BytesIO(packed), weights_only=False))

        def end(self):
            pass

    monkeypatch.setattr(beside, "Beside", Noted)
    torch.set_num_threads(had)
    trainer = two_lessons(model)
    trainer.prefetch = 3
    with side_by_side(trainer, asked):
        assert torch.get_num_threads() == each
    assert torch.get_num_threads() == had
    ((*_, prefetch, threads),) = given
    assert threads == each and prefetch == 3
