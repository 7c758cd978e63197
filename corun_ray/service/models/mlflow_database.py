"""MLflow's SQLite file: set up once, by whichever process comes first, and never seen half done."""

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from corun_ray.service.waiting import WORD_EVERY_S, Say, announce_wait, print_line

PATIENCE_S = 60.0
"""The longest wait for another process."""
STANDSTILL_S = 4.0
"""A set-up by another program that changes nothing for so long has ended, or was cut off."""
POLL_S = 0.2


def set_up_database(path: Path, open_store: Callable[[str], object], say: Say = print_line) -> None:
    """Make an SQLite file that MLflow can use, unless there is one.

    `open_store` lets MLflow open, and so fill, the database of a URI. The file appears whole: MLflow fills a copy
    elsewhere. So a second process, or an `mlflow server` that starts at the same moment, finds all or nothing.

    Raises `TimeoutError` where another process holds the lock for a minute, `OSError`, and the errors of `open_store`.
    """
    if is_ready(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)

    lock = FileLock(f"{path}.lock")
    try:
        _take(lock, path, say)
        if not path.exists():
            with announce_wait(f"MLflow's database {path} to be set up", say):
                _create(path, open_store)
        # A file without experiments: an `mlflow server` may be at work in it at this moment.
        _wait_while_it_grows(path, say)
    finally:
        lock.release()


def is_ready(path: Path) -> bool:
    """Tell whether MLflow has set a database up: the first experiment is made last."""
    if not path.is_file():
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as database:
        return database.execute("SELECT 1 FROM experiments LIMIT 1").fetchone() is not None
    return False


def _take(lock: BaseFileLock, path: Path, say: Say) -> None:
    """Take the lock, and tell a person where another process has it."""
    with contextlib.suppress(Timeout):
        lock.acquire(blocking=False)
        return

    say(f"another process sets up MLflow's database {path}: waiting for it")
    waited_s = 0.0
    while waited_s < PATIENCE_S:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=WORD_EVERY_S)
            return
        waited_s += WORD_EVERY_S
        say(f"another process sets up MLflow's database {path}: waited {waited_s:.0f} s")
    raise TimeoutError(f"another process holds {path}.lock for more than {PATIENCE_S:.0f} s")


def _create(path: Path, open_store: Callable[[str], object]) -> None:
    """Let MLflow fill a new database elsewhere, then put it in its place."""
    copy = path.with_name(f".{path.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        filled = Path(folder) / path.name
        open_store(f"sqlite:///{filled}")
        shutil.copyfile(filled, copy)

    # A link fails where the file has come meanwhile (an `mlflow server`): that one stays.
    try:
        os.link(copy, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without hard links.
        if not path.exists():
            copy.replace(path)
    finally:
        copy.unlink(missing_ok=True)


def _wait_while_it_grows(path: Path, say: Say) -> None:
    """Wait until a database is ready, or nobody works in it."""
    started_s = time.monotonic()
    last_change_s, content, has_said = started_s, _look_at(path), False
    while not is_ready(path) and time.monotonic() - last_change_s < STANDSTILL_S:
        # Only the first look may come too early to see a change.
        time.sleep(POLL_S)
        if _look_at(path) != content:
            last_change_s, content = time.monotonic(), _look_at(path)
            if not has_said:
                say(f"another program sets up MLflow's database {path}: waiting for it")
                has_said = True
        if time.monotonic() - started_s > PATIENCE_S:
            raise TimeoutError(f"another program has not set up {path} within {PATIENCE_S:.0f} s")


def _look_at(path: Path) -> tuple[float, ...]:
    """Return what changes when somebody writes to a database: times and sizes of the file and of its journal."""
    look: list[float] = []
    for file in (path, path.with_name(f"{path.name}-journal"), path.with_name(f"{path.name}-wal")):
        with contextlib.suppress(OSError):
            look += [file.stat().st_mtime, file.stat().st_size]
    return tuple(look)
