"""The tuning script with a stand-in for the GPU: a clock that tells a time for each setting."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import tune  # noqa: E402
from bench.gpu_problems import Problem  # noqa: E402
from omnimamba_kernels import triton_launch  # noqa: E402
from omnimamba_kernels.triton_launch import TARGETS, settings  # noqa: E402

OP, KERNEL = "state_update", "update"
SIZES = ({"values": 2**21}, {"values": 2**24})


class Gpu:
    """A chip on which a setting takes ``time(use)``, sizes beside it; it remembers what it was given last."""

    def __init__(self, arch, time):
        self.target, self.time, self.use, self.sizes = TARGETS[arch], time, None, None
        self.device = torch.device("cpu")

    def run(self, sizes):
        self.use, self.sizes = settings(OP, KERNEL, self.target, **sizes), sizes
        if self.use["num_warps"] == 16:
            raise RuntimeError("too many registers")
        return float(self.use["num_warps"] == 2)  # its error

    def median(self, call):
        call()
        return self.time({**self.use, **self.sizes})

    def problems(self, device):
        assert device == self.device
        for sizes in SIZES:
            call = lambda sizes=sizes: self.run(sizes)  # noqa: E731
            yield Problem(OP, str(sizes), 1.0, 1.0, {"triton": lambda call=call: call}, error=abs, bound=0.5)


def warps(use):
    """16 would be fastest if it compiled, then 2 if it were right, then 1."""
    return {16: 0.1, 2: 0.2, 1: 0.5, 4: 1.0, 8: 0.9}[use["num_warps"]]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of the table, for the script to write."""
    (tmp_path / OP).mkdir()
    path = tmp_path / OP / "launch.json"
    shutil.copy(tune.KERNELS / OP / "launch.json", path)
    monkeypatch.setattr(tune, "KERNELS", tmp_path)
    return path


def run(monkeypatch, arch, time):
    gpu = Gpu(arch, time)
    monkeypatch.setattr(tune, "Clock", lambda device, seconds: gpu)
    monkeypatch.setattr(tune, "OPERATIONS", {OP: gpu.problems})
    monkeypatch.setattr(tune, "backends", lambda: {"triton": None})
    monkeypatch.setattr(triton_launch, "_target", lambda index: gpu.target)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tune.main([OP])


def whens():
    """Of the rules that are written, the latest first."""
    return [{k: [v // 2 + 1, v] for k, v in sizes.items()} for sizes in reversed(SIZES)]


def test_the_fastest_that_is_right_becomes_a_rule_of_this_chip_alone(table, monkeypatch):
    old = json.loads(table.read_text())[KERNEL]
    before = [settings(OP, KERNEL, TARGETS["sm_90"], **sizes) for sizes in reversed(SIZES)]
    assert run(monkeypatch, "sm_90", warps) == 0
    found = json.loads(table.read_text())[KERNEL]
    assert found[2:] == old and [rule["when"] for rule in found[:2]] == whens()
    assert [rule["use"] for rule in found[:2]] == [{**use, "num_warps": 1} for use in before]
    assert all(rule["arch"] == ["sm_90"] for rule in found[:2])
    hopper = found[:2]
    assert run(monkeypatch, "sm_80", warps) == 0  # another chip's rules come beside, the first one's stay
    found = json.loads(table.read_text())[KERNEL]
    assert found[2:4] == hopper and [rule["arch"] for rule in found[:2]] == [["sm_80"]] * 2
    assert run(monkeypatch, "sm_90", lambda use: {8: 0.1}.get(use["num_warps"], 1.0)) == 0  # anew: they are replaced
    found = json.loads(table.read_text())[KERNEL]
    assert [rule["arch"] for rule in found[:4]] == [["sm_90"]] * 2 + [["sm_80"]] * 2 and found[4:] == old
    assert all(rule["use"]["num_warps"] == 8 for rule in found[:2])


def test_a_rule_is_of_a_class_and_sizes_that_another_setting_suits_keep_it():
    """Sizes with the same next power of two share a rule; a flag's two values do not."""
    assert tune.class_of((("rows", 16000), ("p", 64), ("packed", 1), ("gated", 0), ("n", 65))) == {
        "rows": [8193, 16384], "p": [33, 64], "packed": [1, 1], "gated": [0, 0], "n": [65, 128],
    }  # fmt: skip
    old, fast, other = {"warps": 4}, {"warps": 8}, {"warps": 2}
    tried = {
        ("walk", (("rows", 100),)): (old, False),  # the setting of before is the best of these
        ("walk", (("rows", 120),)): (fast, True),
        ("walk", (("rows", 128),)): (other, True),
        ("walk", (("rows", 127),)): (fast, True),
        ("walk", (("rows", 200),)): (old, False),  # a class in which nothing won
        ("ends", (("rows", 120),)): (old, False),
    }
    table = tune.merged({"walk": [{"use": old}], "ends": [{"use": old}]}, tune.rules(tried, "sm_90"))
    assert [(rule["when"]["rows"], rule["use"]) for rule in table["walk"][:-1]] == [
        ([128, 128], other), ([100, 100], old), ([65, 128], fast),
    ]  # fmt: skip
    assert table["walk"][-1] == {"use": old} and table["ends"] == [{"use": old}]


def test_a_size_that_nothing_suits_better_keeps_its_setting_beside_its_class(table, monkeypatch):
    old = json.loads(table.read_text())[KERNEL]
    kept = {"values": 2**21 - 8}
    before = settings(OP, KERNEL, TARGETS["sm_90"], **kept)
    monkeypatch.setattr(sys.modules[__name__], "SIZES", (SIZES[0], kept))
    times = {(1, 2**21): 0.5, (1, 2**21 - 8): 0.99}
    assert run(monkeypatch, "sm_90", lambda of: times.get((of["num_warps"], of["values"]), 1.0)) == 0
    exact, of_class, *rest = json.loads(table.read_text())[KERNEL]
    assert (exact["when"], exact["use"]) == ({"values": [2**21 - 8] * 2}, before) and rest == old
    assert (of_class["when"], of_class["use"]["num_warps"]) == ({"values": [2**20 + 1, 2**21]}, 1)


def test_what_gains_too_little_changes_nothing(table, monkeypatch, capsys):
    old = table.read_bytes()
    assert run(monkeypatch, "sm_90", lambda use: 1.0 - 0.02 * (use["num_warps"] == 8)) == 0
    assert table.read_bytes() == old and "nothing was faster" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [lambda text: text[:-20], lambda text: "", lambda text: text.replace("use", "us")])
def test_a_table_that_is_not_whole_is_left_alone(cut, table, monkeypatch, capsys):
    table.write_text(cut(table.read_text()))
    broken = table.read_bytes()
    assert run(monkeypatch, "sm_90", warps) == 2 and "no launch table" in capsys.readouterr().err
    assert table.read_bytes() == broken


def test_a_last_rule_must_fit_everything(table):
    last = {"use": {"BLOCK_P": 1}}
    for rules in ([], [{"arch": ["sm_90"], **last}], [last, {"when": {"n": [1, 2]}, **last}]):
        table.write_text(json.dumps({KERNEL: rules}))
        with pytest.raises(ValueError, match="always fit"):
            tune.whole(table)
    for path in Path(triton_launch.__file__).parent.glob("*/launch.json"):
        assert tune.whole(path)


def test_a_table_is_written_whole_or_not_at_all(table, monkeypatch):
    old = table.read_bytes()

    def no_space(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tune.os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        run(monkeypatch, "sm_90", warps)
    assert table.read_bytes() == old and list(table.parent.iterdir()) == [table]
