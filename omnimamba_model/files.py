"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = re.compile(r"\..+\.\d+(\.[0-9a-f]{8})?\.tmp")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: an interruption leaves what was there.

    A link stays a link, and the file that it names is replaced. The file may be read by whom the process's umask lets,
    however ``write`` makes it (safetensors: by its owner alone). OSError as in ``regular_target``, and where it cannot
    be written: the disk may be full.
    """
    target = regular_target(path)
    # Processes of several machines may share a folder, and a process number.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        _filled(write, temporary, target)
        temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _filled(write: Callable[[Path], object], temporary: Path, target: Path) -> None:
    """What goes wrong says of which file; safetensors has an error of its own for it."""
    try:
        write(temporary)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def clear_temporaries(folder: Path, age: float | None = None) -> None:
    """Remove what killed processes left of ``write_whole`` in a folder: all, or what is at least ``age`` seconds old,
    where others may be writing. A folder that is not there has nothing."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process removed it
            if _TEMPORARY.fullmatch(path.name) and (age is None or time.time() - path.stat().st_mtime >= age):
                path.unlink()


def absent(path: Path) -> str:
    """What is wrong with a file that safetensors does not find; one that may not be read is among them."""
    return f"{path} cannot be read: is it yours to read?" if os.path.exists(path) else f"{path} does not exist"


def regular_target(path: Path) -> Path:
    """The regular file, there or yet to be made, that ``path`` names once links are followed.

    OSError where its folder is missing or where something else has its place: a folder, a device, a pipe.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder; make it first")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        raise OSError(f"{path} exists and is no regular file; name another")
    return target
