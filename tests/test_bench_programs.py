"""What stands beside the benchmarks: accuracy of narrow weights, the ablation's arms, a run that is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
pytest.importorskip("sklearn", reason="the demo's scans are scikit-learn's")
sys.path.insert(0, str(ROOT))

from bench import ablation, accuracy, claims, kills, report  # noqa: E402
from omnimamba_model.config import TASKS  # noqa: E402
from omnimamba_model.demo.digits import Scans, split  # noqa: E402
from omnimamba_model.demo.experiment import WORK, prepare  # noqa: E402
from omnimamba_model.demo.score import EXAM, losses  # noqa: E402
from omnimamba_model.demo.settings import Settings  # noqa: E402
from omnimamba_model.pipeline import Pipeline  # noqa: E402
from omnimamba_model.training import checkpoints  # noqa: E402
from omnimamba_model.weights import load  # noqa: E402

FEW = 24
SMALL = Settings(d_model=16, d_state=8, headdim=16, codes=16, copies=1, batch=4, stage0=1, stage1=1, stage2=2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder as `make demo` leaves it, of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("demo")
    few = [Scans(scans.images[:FEW], scans.labels[:FEW]) for scans in split()]
    prepare(folder / WORK, SMALL, *few, seed=0)
    shutil.copytree(folder / WORK / "start", folder, dirs_exist_ok=True)
    return folder


def test_narrow_weights_are_scored_against_the_stored_ones(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "FILE", tmp_path / "accuracy.json")
    assert "Not scored" in report.narrow({})
    assert accuracy.main([str(demo), "--out", str(accuracy.FILE)]) == 0
    costs = {(c.weights, c.task): c for c in accuracy.kept()["costs"]}
    assert costs.keys() == {(dtype, task) for dtype in accuracy.DTYPES for task in TASKS}
    own = losses(Pipeline.load(demo, fold=False), demo / WORK / EXAM)
    for task in TASKS:
        exact, narrow = costs["float32", task], [costs[dtype, task] for dtype in accuracy.DTYPES[1:]]
        assert (exact.loss, exact.change, exact.error, exact.same) == (own[task], 0.0, 0.0, 1.0)
        assert all(0 < c.error < 0.05 and 0.5 < c.same <= 1 and c.change == c.loss - own[task] for c in narrow)
        assert costs["float16", task].error < costs["bfloat16", task].error < costs["int8", task].error
    assert "| int8 " in report.narrow({}) and report.narrow({}) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        (kills, ["--kills", "0"], "--kills: got 0"),
        (ablation, ["--arms", "0", "5"], "--arms: got 0 5, expected some of 0 to 4"),
        (ablation, ["--arms", "-1"], "--arms: got -1"),
        (ablation, ["--arms", "0"], "is not JSON"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(program, arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.json").write_text('{"runs": [')
    monkeypatch.setattr(sys, "argv", ["program", *arguments, "--out", str(tmp_path / "out.json")])
    for name in ("start", "run", "settings_of"):
        monkeypatch.setattr(program, name, None, raising=False)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == '{"runs": ['


def test_a_folder_without_a_checkpoint_is_named(tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit) as ended:
            accuracy.main([str(folder), "--out", str(tmp_path / "scores.json")])
        assert ended.value.code == 2 and str(folder) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_kept_scores_are_of_every_dtype_and_task():
    """That the README shows them is test_bench's."""
    costs = accuracy.kept()["costs"]
    assert [(c.weights, c.task) for c in costs] == [(dtype, task) for dtype in accuracy.DTYPES for task in TASKS]


def ablated(demo: Path, **arm: bool) -> ablation.Ablated:
    model = load(demo)
    model.__class__, model.arm = ablation.Ablated, ablation.Arm(**arm)
    return model


def test_an_arm_without_adapters_trains_everything_but_them(demo):
    for stage in ("t2i", "joint"):
        whole, without = (set(ablated(demo, adapters=there).train_only(stage)) for there in (True, False))
        assert whole - without == {name for name in whole if "_lora_" in name} and whole > without
        model = ablated(demo, adapters=False)
        assert {name for name, p in model.named_parameters() if model.train_only(stage) and p.requires_grad} == without


@torch.no_grad()
def test_one_vocabulary_is_one_softmax_over_both_tables_while_training(demo):
    model, whole = ablated(demo, vocabularies=False), load(demo)
    hidden = torch.randn(2, 3, SMALL.d_model, generator=torch.Generator().manual_seed(0))
    heads = {name: getattr(whole, name)(hidden) for name in ("text_head", "image_head")}
    for own, other in (("text_head", "image_head"), ("image_head", "text_head")):
        together = getattr(model.train(), own)(hidden)
        torch.testing.assert_close(together, torch.cat([heads[own], heads[other]], -1))
        torch.testing.assert_close(getattr(model.eval(), own)(hidden), heads[own])
        torch.testing.assert_close(getattr(ablated(demo).train(), own)(hidden), heads[own])


def test_every_arm_has_as_many_steps_and_batches_of_each_task():
    for arm in ablation.ARMS.values():
        begin, *rest = ablation.phases(arm, SMALL, 10, 4)
        assert (begin.lessons, begin.steps) == (("text", "blind"), SMALL.stage0)
        steps = [names for phase in rest for names in ablation.learned(phase, 4)]
        assert sum(phase.steps for phase in rest) == len(steps) == 14
        for task in ("t2i", "mmu"):
            assert sum(task in names for names in steps) == 10
            assert sum((task,) == names for names in steps) == 4
        assert (len(rest) == 1) != arm.stages and rest[-1].stage == "joint"
    single = [at for at, names in enumerate(steps) if len(names) == 1]
    assert max(b - a for a, b in zip(single, single[1:], strict=False)) <= 2 and {steps[at] for at in single[:2]} == {
        ("mmu",), ("t2i",)
    }  # fmt: skip


def test_every_arm_learns_from_the_same_batches_in_the_same_order(demo, monkeypatch):
    taken, met = ablation.Lesson.__call__, []

    def noting(lesson, place):
        met[-1].append((type(lesson).__name__, place))
        return taken(lesson, place)

    monkeypatch.setattr(ablation.Lesson, "__call__", noting)
    for stages in (True, False):
        model = ablated(demo, stages=stages)
        lessons = ablation.lessons_of(demo / WORK, SMALL, model.config, 0)
        met.append([])
        ablation.teach(model, ablation.phases(model.arm, SMALL, 5, 2), 2, lessons)
    for kind in ("Understanding", "Drawing"):
        one, other = ([place for name, place in each if name == kind] for each in met)
        assert one == other == [*([0] if kind == "Drawing" else []), *range(5)]  # stage 0 draws without captions


WRITES = """
import contextlib, json, pathlib, sys, time
run, steps, saves = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with open(run / "metrics.jsonl", "a") as out:
    for step in range(steps):
        print(json.dumps({"step": step, "loss": 0.5, "seconds": 1.0}), file=out, flush=True)
        time.sleep(0.002)
        if saves and step % 20 == 0:
            folder = run / "checkpoints" / f".unfinished-step-{step:08}"
            folder.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):  # the test renames it
                for name in range(saves):
                    time.sleep(0.02)
                    (folder / str(name)).touch()
                time.sleep(0.02)
                folder.rename(folder.with_name(f"step-{step:08}"))
"""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Have ``kills`` start a program that logs its steps and saves so many files at some of them; what it started."""
    found: list[subprocess.Popen] = []

    def start(steps: int, saves: int = 0) -> list[subprocess.Popen]:
        def popen(path: Path) -> subprocess.Popen:
            found.append(subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), str(steps), str(saves)]))
            return found[-1]

        monkeypatch.setattr(kills, "start", popen)
        return found

    return start


def test_a_run_is_killed_at_a_drawn_step_or_had_ended_before(tmp_path, monkeypatch, begun):
    began = begun(10**6)
    monkeypatch.setattr(kills, "APART", 200)  # a drawn step that a while of waiting does not reach by itself
    found = kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0))
    wanted, wait = (draw := random.Random(0)).randint(1, kills.APART), draw.uniform(0, kills.AFTER)
    assert found["step"] >= wanted > 90 and found["milliseconds after it"] == round(1e3 * wait)
    assert not found["while saving"] and began[0].returncode == -signal.SIGKILL
    begun(0)
    for aimed in (False, True):
        (tmp_path / "metrics.jsonl").unlink()
        assert kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0), aimed) is None


def test_the_next_kill_comes_at_a_step_that_no_run_has_reached(tmp_path, begun):
    begun(10**6)
    (tmp_path / "metrics.jsonl").write_text('{"step": 60}\n')
    assert kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0))["step"] > 60
    (tmp_path / "metrics.jsonl").unlink()
    (kept := tmp_path / "checkpoints" / "step-00000090").mkdir(parents=True)
    (kept / checkpoints.EXTRA).touch()
    assert kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0))["step"] > 90


@pytest.mark.parametrize("seed", range(4))
def test_an_aimed_kill_tears_a_save_after_the_drawn_step_and_the_drawn_files(tmp_path, begun, seed):
    began, draw = begun(10**6, saves=kills.FILES + 1), random.Random(seed)
    found = kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(seed), aimed=True)
    wanted, _, files = draw.randint(1, kills.APART), draw.uniform(0, kills.AFTER), draw.randint(0, kills.FILES)
    (torn,) = (tmp_path / "checkpoints").glob(".unfinished*")
    assert found["while saving"] and found["step"] >= wanted and began[0].returncode == -signal.SIGKILL
    assert found["files of the torn save"] == sorted(f.name for f in torn.iterdir())
    assert files <= len(found["files of the torn save"]) <= kills.FILES + 1


def test_what_an_earlier_kill_left_is_no_torn_save(tmp_path, begun):
    (tmp_path / "checkpoints" / ".unfinished-step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".unfinished-removal-step-00000002").mkdir()
    begun(10**6)
    assert not kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0))["while saving"]
    (tmp_path / "metrics.jsonl").unlink()
    begun(100)
    assert kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0), aimed=True) is None


def test_a_save_that_was_whole_before_the_process_stood_still_is_not_it(tmp_path, monkeypatch, begun):
    """Its process goes on, to the next one."""
    began, waits, whole = begun(10**6, saves=4), os.waitid, []

    def waitid(*arguments):
        status = waits(*arguments)
        if not whole:
            whole.extend(kills.unfinished(tmp_path))
            whole[0].rename(tmp_path / "whole")
        return status

    monkeypatch.setattr(kills.os, "waitid", waitid)
    found = kills.kill_once(tmp_path / "run.yaml", tmp_path, random.Random(0), aimed=True)
    assert found["while saving"] and began[0].returncode == -signal.SIGKILL
    assert len(whole) == 1 and not kills.unfinished(tmp_path) & set(whole)


def test_the_kept_kills_tore_saves_and_the_claim_asks_for_it(tmp_path, monkeypatch):
    kept = json.loads(kills.FILE.read_text())
    assert claims._kills().passed and len(kept["kills"]) == 20 and kept["exact"]
    assert sum(kill["while saving"] for kill in kept["kills"]) >= 1
    monkeypatch.setattr(claims, "KILLS", tmp_path / "kills.json")
    for changes in ({"exact": False}, {"kills": [k | {"while saving": False} for k in kept["kills"]]}, {"kills": []}):
        claims.KILLS.write_text(json.dumps(kept | changes))
        assert claims._kills().passed is False


def test_runs_are_the_same_only_bit_for_bit(demo, tmp_path):
    lines = [{"step": 1, "loss_t2i": 0.5, "rate": 0.1, "seconds": 3.0}, {"note": "saved"}]
    for name in "ab":
        shutil.copytree(demo, tmp_path / name / "model", ignore=shutil.ignore_patterns(WORK))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert kills.steps_of(tmp_path / "a") == [{"step": 1, "loss_t2i": 0.5, "rate": 0.1}]
    assert kills.same(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps(lines[0] | {"loss_t2i": 0.5000001}) + "\n")
    assert not kills.same(tmp_path / "a", tmp_path / "b")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    model = load(tmp_path / "b" / "model")
    next(model.parameters()).data.view(-1)[0] += 1e-6
    model.save_pretrained(tmp_path / "b" / "model")
    assert not kills.same(tmp_path / "a", tmp_path / "b")
