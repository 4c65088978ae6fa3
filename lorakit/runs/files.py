"""Folders and files that are either whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ASIDE = ".writing-"  # prefix of what is being written; whatever bears it can be deleted
OLD = ".replaced-"  # prefix of what is being replaced


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; it takes the name ``folder`` when the block ends well, and is
    removed when it does not.

    An existing ``folder`` is replaced. After a crash at any moment either the old or the new one is
    in force, or, between two renames, both are set aside; the next call, and ``recover``, then
    give the old one its name back.
    """
    recover(folder.parent)
    aside = folder.with_name(f"{ASIDE}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        old = folder.with_name(f"{OLD}{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def recover(parent: Path) -> None:
    """Undo replacements of folders in ``parent`` that a crash has interrupted."""
    for old in parent.glob(f"{OLD}*"):
        folder = old.with_name(old.name.removeprefix(OLD))
        if not folder.exists():
            old.rename(folder)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a path aside, then give what it wrote the name ``path``."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        write(aside)
        _sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def lock_file(path: Path, *, wait: bool = False, shared: bool = False) -> IO[str] | None:
    """Lock ``path`` until the returned file is closed or this process ends; None where another has
    it.

    Args:
        wait: for the other, instead.
        shared: others may lock it so at the same time. It must be there; else it is made.
    """
    file = path.open("r" if shared else "a", encoding="utf-8")
    try:
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except ImportError:  # not on this system
        pass
    except BlockingIOError:
        file.close()
        return None
    return file


def find_write_problem(path: Path) -> str | None:
    """Return why ``path`` cannot be made, by the nearest folder that exists, or None."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        return f"{parent} is not a folder"
    return None if os.access(parent, os.W_OK) else f"no permission to write in {parent}"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
