"""Where a run's figures go besides metrics.jsonl."""

import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from omnimamba_model.training.logs import Logs


class Wandb:
    """Weights & Biases' calls, kept."""

    def __init__(self):
        self.begun, self.logged, self.finished = {}, [], False

    def init(self, **options):
        self.begun = options
        return SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=self.finish)

    def finish(self):
        self.finished = True


def test_weights_and_biases_on_request(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logs = Logs(tmp_path, 0, False, None)
    logs.add(1, {"loss": 2.0})
    logs.close(Counter())
    assert not wandb.begun
    logs = Logs(tmp_path, 1, False, "a project")
    logs.add(2, {"loss": 1.0})
    logs.close(Counter({"a reason": 3}))
    assert wandb.begun["project"] == "a project" and wandb.begun["name"].endswith(f"/{tmp_path.name}")
    assert wandb.logged == [(2, {"loss": 1.0})] and wandb.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"passed over": {"a reason": 3}}]


def test_a_folder_is_one_run_of_weights_and_biases_and_no_others(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    ids = []
    for place in ("a/stage2", "b/stage2", tmp_path / "a" / "stage2", "b/../a/stage2"):
        Path(place).mkdir(parents=True, exist_ok=True)
        Logs(Path(place), 0, False, "a project").close(Counter())
        ids.append(wandb.begun["id"])
        assert wandb.begun["resume"] == "allow" and ids[-1].isalnum()
    assert ids[0] == ids[2] == ids[3] != ids[1]  # the same run goes on


def kept_by_wandb(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file of one block: LevelDB's log behind 7 bytes of its own, each with sum, size, kind."""
    data, at = path.read_bytes(), 7
    assert len(data) < 32768
    while at < len(data):
        size, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1, "whole"
        yield data[at + 7 : at + 7 + size]
        at += 7 + size


def test_weights_and_biases_own_files(tmp_path, monkeypatch):
    """The library itself, offline: the run's project, name and figures as it would send them; and its continuation."""
    pytest.importorskip("wandb")
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONFIG_DIR", str(tmp_path / "config"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    out = tmp_path / "runs" / "stage2"
    out.mkdir(parents=True)
    begun, figures = [], {}
    for done, last in ((0, 2), (2, 3)):
        logs = Logs(out, done, False, "a project")
        for step in range(done + 1, last + 1):
            logs.add(step, {"loss t2i": 1.5 / step, "tokens": 7})
        logs.close(Counter())
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for data in kept_by_wandb(path):
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                begun.append((record.run.project, record.run.display_name, record.run.run_id))
            for item in record.history.item:
                figures.setdefault(item.key or item.nested_key[0], []).append(json.loads(item.value_json))
    assert len(begun) == 2 and begun[0] == begun[1] and begun[0][:2] == ("a project", "runs/stage2")
    assert figures["_step"] == [1, 2, 3] and figures["tokens"] == [7] * 3 and figures["loss t2i"] == [1.5, 0.75, 0.5]


def test_weights_and_biases_is_asked_for_but_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Logs(tmp_path, 0, False, "a project")


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = Logs(tmp_path, 0, True, None)
    for step in (1, 2):
        logs.add(step, {"loss t2i": 3.0 - step})
    logs.close(Counter())
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss/t2i")] == [(1, 2.0), (2, 1.0)]
