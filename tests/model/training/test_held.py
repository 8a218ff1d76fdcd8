"""One folder is one process's at a time, and keeps whole steps alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import losses, written

from omnimamba_model.training import Trainer, checkpoints
from omnimamba_model.training.run import run

HOLDS = """
import sys, time
from pathlib import Path
from omnimamba_model.training.parallel import ALONE
from omnimamba_model.training.run import _held

with _held(Path(sys.argv[1]), ALONE):
    print("held", flush=True)
    time.sleep(300)
"""


def test_two_runs_never_share_a_folder(values, tmp_path, monkeypatch):
    """Neither mixes its files into the other's; one that was killed holds nothing."""
    out = Path(values["out"])
    settings = written(tmp_path / "s.yaml", values | {"steps": 2})
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], cwd=root, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            (out / ".metrics.jsonl.12.tmp").touch()
            with pytest.raises(RuntimeError, match="a process trains into .* just now; wait for its end, or name"):
                run(settings, lambda line: None, progress=False)
            assert [path.name for path in out.iterdir()] == [".metrics.jsonl.12.tmp"], "nothing was cleared or written"
        finally:
            other.kill()
    step, met = Trainer.step, []

    def stepped(trainer):
        with pytest.raises(RuntimeError, match="just now"):
            run(settings, lambda line: None, progress=False)
        met.append(trainer.done)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stepped)
    assert run(settings, lambda line: None, progress=False) == out / "model"
    assert met == [0, 1] and [line["step"] for line in losses(out)] == [1, 2]


def test_a_file_system_without_locks_trains_all_the_same(values, tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert run(written(tmp_path / "s.yaml", values | {"steps": 1}), lambda line: None, progress=False)


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 451520 vs 451412"), OSError(28, "No space left")])
def test_a_step_that_the_disk_has_no_room_for(values, tmp_path, monkeypatch, error):
    """What was written of it goes, so that there is room; the same command goes on after the last whole one."""
    out, write = Path(values["out"]), checkpoints.torch.save
    settings = written(tmp_path / "s.yaml", values | {"steps": 3, "save_every": 1, "keep": 9})

    def full(extra, path):
        if extra["done"] == 2:
            path.write_bytes(b"half")
            raise error
        write(extra, path)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match=r"step 2 cannot be kept in .*checkpoints, where [\d,]+ MiB were free: .*"):
        run(settings, lambda line: None, progress=False)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert run(settings, lambda line: None, progress=False) and [line["step"] for line in losses(out)] == [1, 2, 3]
