"""Folders that one process at a time writes into, and what killed processes left in them.

A lock is the operating system's, on the folder itself: it ends with the process that holds it,
however that ends, and leaves no file behind. Where there are no such locks (Windows, some network
drives) nothing is locked, and nothing is cleaned up.
"""
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

from sd import UserError

UNFINISHED = ".stable-diffusion-unfinished-"  # how folders begin that files are written in
held: set[int] = set()                        # the open folders that this process has locked


def try_lock(folder: Path) -> int | None:
    """Lock a folder and return its number for `unlock`; None if another process holds it.

    -1 stands for a lock where there are none. Raises OSError if there is no such folder.
    """
    if fcntl is None:
        return -1
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        return None
    except OSError:
        os.close(number)
        return -1
    held.add(number)
    return number


def unlock(number: int) -> None:
    if number in held:
        held.remove(number)
        os.close(number)


def release_locks() -> None:
    """For a child process, which would hold its parent's locks when that is killed."""
    for number in list(held):
        unlock(number)


@contextmanager
def alone_in(folder: Path, rank: int = 0) -> Iterator[None]:
    """Inside, no other process is alone in the folder. Only rank 0 locks it.

    Raises UserError if another one is.
    """
    if rank != 0:
        yield
        return
    number = try_lock(folder)
    if number is None:
        raise UserError(f"another train.py is training in {folder}: wait until it ends, or give "
                        "another --out")
    try:
        yield
    finally:
        unlock(number)


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A locked folder to write files in. It is removed at the end, with what is left in it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        try:
            number = try_lock(folder)
            if number is not None and folder.exists():
                break
        except FileNotFoundError:       # another process cleaned it up before it was locked
            pass
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(number)


def clean_up(parent: Path) -> None:
    """Remove the unfinished folders of processes that were killed."""
    for folder in parent.glob(f"{UNFINISHED}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            number = try_lock(folder)
        except OSError:
            continue
        if number is not None and number >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            unlock(number)
