"""Whole runs: going on after any stop, two processes, both stages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from omnimamba_model import GREEDY, CheckpointError, OmniMamba, load, save
from omnimamba_model.backbone import cast_matrices
from omnimamba_model.cli import main
from omnimamba_model.omnimamba import trained_in
from omnimamba_model.pipeline import Pipeline
from omnimamba_model.text_tokenizer import WordTokenizer
from omnimamba_model.training import Trainer, checkpoints
from omnimamba_model.training.lessons import Lesson
from omnimamba_model.training.parallel import Ranks
from omnimamba_model.training.run import _claim, _go, _lessons, _summary, run
from omnimamba_model.training.settings import read

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def settings(values, tmp_path):
    """Writes the settings file with changes and reads it."""

    def make(**changes):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return read(path)

    return make


def losses(out) -> list[dict]:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "rate")
    return [{k: v for k, v in line.items() if k.startswith(kept) or k == "tokens"} for line in lines if "step" in line]


def passed_over(out) -> tuple:
    """How many records the last step counted, why as the log and as the last checkpoint say."""
    *_, step, end = (json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines())
    kept = torch.load(checkpoints.kept(Path(out))[-1][1] / "trainer.pt", weights_only=True)
    return step["passed over"], end["passed over"], kept["passed over"]["mmu"]


def quietly(line: str) -> None:
    pass


def test_a_run_leaves_a_model_that_draws_and_answers(settings, values, capsys):
    said = []
    folder = run(settings(log_every=1), said.append)
    bar = capsys.readouterr().err
    assert all(shown in bar for shown in ("6/6 [", "<", "t2i=", "mmu=", "tok/s=", "GiB="))
    assert folder == Path(values["out"]) / "model" and "t2i: 11 records" in said
    found = losses(values["out"])
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6] and found[-1]["loss t2i"] < found[0]["loss t2i"]
    lines = map(json.loads, (Path(values["out"]) / "metrics.jsonl").read_text().splitlines())
    assert all(line["tokens/s"] > 0 and line["GiB"] > 0 for line in lines if "step" in line)
    assert [step for step, _ in checkpoints.kept(Path(values["out"]))] == [4, 6]
    assert len(Pipeline.load(folder).draw(["a cat"], sampling=GREEDY)) == 1


@pytest.mark.parametrize("other", [{}, {"mmu": None}], ids=["both tasks", "parameters that nothing reaches"])
def test_a_stopped_run_goes_on_with_the_same_losses(settings, values, tmp_path, other):
    whole, other = tmp_path / "whole", other | {"fresh": values["fresh"] | {"lora_dropout": 0.3}}
    run(settings(out=str(whole), **other), quietly)

    class Stop(Exception):
        pass

    taken = Trainer.step
    for stop_at in (1, 3, 5):

        def step(self, stop_at=stop_at):
            if self.done == stop_at:
                raise Stop
            return taken(self)

        Trainer.step = step
        try:
            with pytest.raises(Stop):
                run(settings(**other), quietly)
        finally:
            Trainer.step = taken
    run(settings(**other), quietly)
    assert losses(values["out"]) == losses(whole)
    a, b = (load(Path(out) / "model").state_dict() for out in (values["out"], whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def command(values, tmp_path, *changes: str) -> list[str]:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "omnimamba_model", "train", str(path), *changes]


def test_killed_at_any_moment(values, tmp_path):
    """SIGKILL at several moments of one run, among them while a checkpoint is written."""
    values = values | {"steps": 30, "save_every": 1}
    run(read(_written(tmp_path / "w.yaml", values | {"out": str(tmp_path / "whole")})), quietly)
    out, kills, torn = Path(values["out"]), 0, 0
    for wait in (None, 0.0, 0.02, 0.05):
        silent = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        process = subprocess.Popen(command(values, tmp_path), cwd=ROOT, **silent)
        before = len(checkpoints.kept(out)) and checkpoints.kept(out)[-1][0]
        until = time.time() + 60
        while time.time() < until and process.poll() is None:
            found = checkpoints.kept(out)
            if found and found[-1][0] > before + 2:
                break
            time.sleep(0.01)
        aimed = wait is None and stopped_within_a_save(process, out)
        time.sleep(wait or 0.0)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        torn += aimed and bool(list((out / "checkpoints").glob(".unfinished-step-*")))
    assert kills >= 3 and torn == 1
    subprocess.run(command(values, tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert losses(out) == losses(tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".unfinished*"))


def stopped_within_a_save(process: subprocess.Popen, out: Path) -> bool:
    """Stop the process as soon as a checkpoint is begun, and again until it is stopped before that is whole."""
    while process.poll() is None:
        if list((out / "checkpoints").glob(".unfinished-step-*")):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if list((out / "checkpoints").glob(".unfinished-step-*")):
                return True
            process.send_signal(signal.SIGCONT)
    return False


def _written(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_two_processes_learn_what_one_learns(values, data, tmp_path):
    (data / "3.png").write_bytes(b"no picture")
    one = values | {"out": str(tmp_path / "one"), "accumulate": 2}
    run(read(_written(tmp_path / "one.yaml", one)), quietly)
    two = _written(tmp_path / "two.yaml", one | {"out": str(tmp_path / "two")})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*launch, "omnimamba_model", "train", str(two)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    assert passed_over(tmp_path / "one") == passed_over(tmp_path / "two")
    assert all(passed_over(tmp_path / "one"))


def test_a_bad_shard_is_skipped_counted_and_reported(settings, values, data, monkeypatch):
    """Once, however often the run is taken up, beside the pictures that cannot be read; and told again at its end, as
    is a TensorBoard that is not there."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (data / "bad.tar").write_bytes(b"no tar at all" * 100)
    (data / "3.png").write_bytes(b"no picture")
    mmu = values["mmu"] | {"files": [str(data / "mmu.json"), str(data / "bad.tar")]}
    for steps in (4, 8):
        said, out = [], Path(values["out"])
        told = out / "settings.json"
        if told.exists():  # the same run, for longer
            told.write_text(json.dumps(json.loads(told.read_text()) | {"steps": steps}))
        run(settings(mmu=mmu, steps=steps, tensorboard=True), said.append)
        assert [line for line in said if "bad.tar is passed over: " in line]
        step, end, kept = passed_over(out)
        (reason,) = (reason for reason in end if reason.startswith(f"{data / 'bad.tar'}: "))
        assert end == kept and end[reason] == 1 and end["image 3.png is no picture"] >= 1
        assert step == sum(end.values())
        missing, *lines = said[-2 - len(end) :]
        assert missing.startswith("TensorBoard is not installed") and said.count(missing) == 2
        assert lines[0].startswith(f"passed over {step} times")
        assert sorted(lines[1:]) == sorted(f"{count:>9} x {reason}" for reason, count in end.items())


def test_files_that_changed_under_a_run_are_told(settings, values, data, tmp_path):
    t2i = values["t2i"] | {"files": [str(data / "t2i*.jsonl")]}
    run(settings(t2i=t2i, steps=2), quietly)
    told = Path(values["out"]) / "settings.json"
    for steps, more in ((3, False), (4, True)):
        told.write_text(json.dumps(json.loads(told.read_text()) | {"steps": steps}))
        if more:
            (data / "t2i2.jsonl").write_bytes((data / "t2i.jsonl").read_bytes())
        said = []
        run(settings(t2i=t2i, steps=steps), said.append)
        line = "t2i had 11 records and has 22 now: they come in another order from here on"
        assert (line in said) == more and "going on after step " + str(steps - 1) in said


def test_a_summary_lists_the_most_frequent_reasons_and_counts_the_others():
    lines = _summary(Counter({f"reason {i}": i for i in range(1, 24)}))
    assert lines[0].startswith("passed over 276 times") and lines[1].split() == ["23", "x", "reason", "23"]
    assert len(lines) == 22 and lines[-1] == "and for 3 reasons more: see metrics.jsonl"
    assert _summary(Counter()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("step 4 is not finite")], ids=repr)
def test_the_same_command_is_named_where_it_goes_on(settings, values, monkeypatch, error):
    """After Ctrl-C it does; after an error it meets the same one."""
    taken, said = Trainer.step, []

    def step(self):
        if self.done == 3:
            raise error
        return taken(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(type(error)):
        run(settings(), said.append)
    goes_on = isinstance(error, KeyboardInterrupt)
    rest = "the same command goes on after 2" if goes_on else "the last one kept is 2"
    assert said[-1] == f"stopped after step 3; {rest}"


@pytest.mark.parametrize("world", [1, 2])
def test_of_many_processes_one_that_is_stopped_tells_its_own_count(settings, words, tmp_path, world):
    def step():
        raise KeyboardInterrupt

    lesson, said = Lesson([], 2), []
    lesson.passed_over["a reason"] = 3
    ranks, phase = SimpleNamespace(first=True, world=world), SimpleNamespace(steps=9, rate=lambda step: 0.1)
    trainer = SimpleNamespace(phase=phase, ranks=ranks, lessons={"t2i": lesson}, done=3, step=step)
    with pytest.raises(KeyboardInterrupt):
        _go(trainer, settings(), tmp_path, words, said.append, progress=False)
    assert any(line.startswith("passed over 3 times, ") for line in said)
    assert any("counted on this process" in line for line in said) == (world > 1)


def test_cutting_a_batch_into_pieces_changes_nothing(settings, values, tmp_path):
    """Batches of unlike sizes: each target counts the same."""
    run(settings(out=str(tmp_path / "a"), steps=3, accumulate=1, t2i=None), quietly)
    halves = values["mmu"] | {"batch": 1}
    run(settings(out=str(tmp_path / "b"), steps=3, accumulate=2, t2i=None, mmu=halves), quietly)
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_recomputing_layers_changes_nothing(settings, values, tmp_path):
    fresh = values["fresh"] | {"lora_dropout": 0.3}
    run(settings(out=str(tmp_path / "a"), fresh=fresh, steps=3), quietly)
    run(settings(out=str(tmp_path / "b"), fresh=fresh, steps=3, recompute=True), quietly)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_bf16_learns(settings, values):
    run(settings(precision="bf16", steps=12, save_every=12), quietly)
    found = losses(values["out"])
    assert found[-1]["loss t2i"] < found[0]["loss t2i"]
    assert all(t.dtype == torch.float32 for t in load(Path(values["out"]) / "model").state_dict().values())


def test_both_stages_and_their_merge(settings, values, data, tmp_path, capsys):
    """From files of the official formats; stage 1 learns the same from shards, and stage 2 goes on with them."""
    shards = {name: values[name] | {"files": [str(data / f"{name}.tar")]} for name in ("mmu", "t2i")}
    shards["mmu"].pop("images")  # the samples bring them along
    run(settings(out=str(tmp_path / "start"), steps=1), quietly)
    start = str(tmp_path / "start" / "model")
    given = dict(model=start, fresh=None, tokenizers=None, steps=2)
    run(settings(out=str(tmp_path / "mmu"), stage="mmu", t2i=None, **given), quietly)
    run(settings(out=str(tmp_path / "t2i"), stage="t2i", mmu=None, **given), quietly)
    for stage, other in (("mmu", "t2i"), ("t2i", "mmu")):
        run(settings(out=str(tmp_path / f"{stage}s"), stage=stage, **given | shards | {other: None}), quietly)
        assert losses(tmp_path / f"{stage}s") == losses(tmp_path / stage)
    halves = [str(tmp_path / name / "model") for name in ("mmu", "t2i")]
    assert main(["merge", *halves, str(tmp_path / "merged")]) == 0
    merged, begun = load(tmp_path / "merged").state_dict(), load(start).state_dict()
    run(
        settings(out=str(tmp_path / "two"), **given | shards | {"model": str(tmp_path / "merged"), "steps": 1}), quietly
    )
    mmu, t2i = (load(half).state_dict() for half in halves)
    for name, tensor in merged.items():
        source = mmu if trained_in("mmu", name) else t2i if trained_in("t2i", name) else begun
        assert torch.equal(tensor, source[name]), name
        if source is not begun and "lora_A" not in name and "pos_embed" not in name and "embedding.weight" not in name:
            assert not torch.equal(tensor, begun[name]), name
    run(settings(out=str(tmp_path / "other"), steps=1, seed=9), quietly)
    assert main(["merge", halves[0], str(tmp_path / "other" / "model"), str(tmp_path / "x")]) == 2
    assert "what neither half trains" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["image tokenizer", "tokenizer.json", "another's"])
def test_a_merge_without_its_tokenizers_writes_nothing(data, config, pixels, tmp_path, capsys, damage):
    """Both halves are the folder of the data: a model before any training."""
    save(OmniMamba(config), data)
    path = data / (pixels.file if damage == "image tokenizer" else "tokenizer.json")
    path.write_text(WordTokenizer(f"w{i}" for i in range(30)).to_json()) if damage == "another's" else path.unlink()
    assert main(["merge", str(data), str(data), str(tmp_path / "merged")]) == 2
    said = {"image tokenizer": pixels.file, "tokenizer.json": "has a tokenizer.json", "another's": "vocab_size"}
    assert said[damage] in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_a_backbone_learns_from_plain_text_before_any_task(settings, values, data):
    (data / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a cat", "the red house")))
    text = {"files": [str(data / "text.jsonl")], "batch": 2, "length": 8}
    run(settings(stage="base", text=text, mmu=None, steps=12, save_every=12), quietly)
    found = losses(values["out"])
    assert set(found[0]) >= {"loss text", "loss t2i"} and found[-1]["loss text"] < found[0]["loss text"] - 0.5


def test_another_run_is_not_continued_by_mistake(settings, values, capsys):
    run(settings(), quietly)
    with pytest.raises(ValueError, match=r"another run \(learning_rate was 0.01, is 0.02\)"):
        run(settings(learning_rate=0.02), quietly)
    run(settings(keep=1), quietly)  # what does not change the run may change
    told = Path(values["out"]) / "settings.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"side_by_side": True}))  # once held fast
    run(settings(), quietly)
    assert "side_by_side" not in json.loads(told.read_text())


def test_a_kill_while_an_old_step_is_removed_leaves_no_torn_one(settings, values, monkeypatch):
    class Kill(Exception):
        pass

    def torn(path, **options):
        if Path(path).exists():
            (Path(path) / "model.safetensors").unlink()
            raise Kill

    monkeypatch.setattr(checkpoints.shutil, "rmtree", torn)
    with pytest.raises(Kill):
        run(settings(keep=1), quietly)
    monkeypatch.undo()
    folder = Path(values["out"]) / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004"]
    assert len(list(folder.glob(".unfinished*"))) == 1
    run(settings(keep=1), quietly)
    assert [path.name for path in folder.iterdir()] == ["step-00000006"]


def test_a_run_begins_by_clearing_what_a_kill_left(settings, values, tmp_path):
    out, cache = Path(values["out"]), tmp_path / "cache"
    left = [out / ".metrics.jsonl.12.tmp", out / "model" / ".model.safetensors.12.0123abcd.tmp"]
    left += [cache / "ab" / ".x.1.tmp"]
    stay = [cache / "ab" / ".y.1.0123abcd.tmp", cache / "ab" / "x.safetensors", out / "model" / "my.tmp"]
    for path in left + stay:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(left[-1], (0, 0))  # another process may be writing the other
    _claim(out, settings(mmu=values["mmu"] | {"cache": str(cache)}))
    assert not any(path.exists() for path in left) and all(path.exists() for path in stay)


def test_a_damaged_checkpoint_is_named(settings, values):
    run(settings(), quietly)
    last = checkpoints.kept(Path(values["out"]))[-1][1]
    for damage in (b"x", b"\x80\x02X\x01"):
        (last / "trainer.pt").write_bytes(damage)
        with pytest.raises(CheckpointError, match="trainer.pt is damaged"):
            run(settings(), quietly)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there(settings, values, device):
    with pytest.raises(ValueError, match="device .*(is not there|must be cpu or cuda)"):
        run(settings(device=device), quietly)
    assert not Path(values["out"]).exists()


def test_a_model_of_another_width_than_its_tokenizers_is_refused(settings, values):
    wrong = values["fresh"] | {"image_vocab_size": 17}
    with pytest.raises(CheckpointError, match="image_vocab_size is 17"):
        run(settings(fresh=wrong), quietly)


def test_the_encoders_are_where_the_model_is(settings, config, words, pixels):
    device = torch.device("meta")
    lessons, _ = _lessons(settings(), config, words, pixels, Ranks(device=device), quietly)
    assert lessons["mmu"].pixels.codebook.device == device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_learn_in_fp32(settings, values, config, tmp_path, dtype):
    save(cast_matrices(OmniMamba(config), dtype), tmp_path / "narrow")
    folder = run(settings(fresh=None, model=str(tmp_path / "narrow"), steps=1), quietly)
    assert {tensor.dtype for tensor in load(folder).state_dict().values()} == {torch.float32}
    kept = torch.load(checkpoints.kept(Path(values["out"]))[-1][1] / "trainer.pt", weights_only=True)
    moments = [state[name] for state in kept["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {moment.dtype for moment in moments} == {torch.float32}
