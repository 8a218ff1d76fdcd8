import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from omnimamba_model import save
from omnimamba_model.cli import main
from omnimamba_model.files import absent, write_whole


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    beside = []
    write_whole(link, lambda path: beside.append(path.parent) or path.write_text("new"))
    assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()
    assert beside == [target.parent.resolve()] and os.listdir(target.parent) == ["real.txt"]


def test_a_link_to_nothing_makes_its_target(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("made.txt")
    write_whole(link, lambda path: path.write_text("new"))
    assert link.is_symlink() and (tmp_path / "made.txt").read_text() == "new"


def test_what_is_no_regular_file_stays(tmp_path):
    pipe, folder, link = (tmp_path / name for name in ("pipe", "folder", "link"))
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for path in (pipe, folder, link):
        with pytest.raises(OSError, match=f"{path.name} exists and is no regular file"):
            write_whole(path, lambda temporary: temporary.write_text("new"))
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and folder.is_dir() and link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_file_is_the_umasks_to_say(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "text", lambda temporary: temporary.write_text("new"))
        write_whole(tmp_path / "tensors", lambda temporary: save_file({"a": torch.ones(3)}, temporary))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert load_file(tmp_path / "tensors")["a"].tolist() == [1, 1, 1]


def test_two_machines_processes_of_one_number_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    inner = []

    def write(path):
        write_whole(tmp_path / "a", lambda other: inner.append(other) or other.write_text("theirs"))
        assert inner != [path] and (tmp_path / "a").read_text() == "theirs"
        path.write_text("mine")

    write_whole(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path):
    (tmp_path / "here").touch()
    assert absent(tmp_path / "here").startswith(f"{tmp_path / 'here'} cannot be read")
    assert absent(tmp_path / "gone") == f"{tmp_path / 'gone'} does not exist"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_with_the_files_name(tmp_path, capsys, lm, monkeypatch):
    """However each library says it: safetensors has an error of its own."""

    def full(path):
        path.unlink()
        path.symlink_to("/dev/full")
        return path

    def text(path):
        with open(full(path), "w") as file:
            file.write("new")

    for write in (text, lambda path: Image.new("L", (9, 9)).save(full(path), format="PNG")):
        with pytest.raises(OSError, match="No space left on device: '.*/kept'"):
            write_whole(tmp_path / "kept", write)

    def unwritten(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save(lm, tmp_path / "lm")
    monkeypatch.setattr("omnimamba_model.weights.save_file", unwritten)
    assert main(["convert", str(tmp_path / "lm"), str(tmp_path / "to")]) == 2
    assert "to/model.safetensors cannot be written: Error while" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "to"] and not list((tmp_path / "to").iterdir())
