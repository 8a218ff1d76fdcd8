import os
import stat

import pytest

from omnimamba_model.files import write_whole


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
