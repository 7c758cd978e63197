import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock

from corun_ray.service.models import mlflow_database
from corun_ray.service.models.mlflow_database import is_ready, set_up_database


def fill(path: Path) -> None:
    """Do what is left of MLflow's set-up."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE experiments (name TEXT)")
        database.execute("INSERT INTO experiments VALUES ('Default')")


def fill_uri(uri: str) -> None:
    fill(Path(uri.removeprefix("sqlite:///")))


def test_the_second_waits_for_the_first_and_says_so(tmp_path):
    path, begun, go_on = tmp_path / "runs" / "mlflow.db", threading.Event(), threading.Event()
    fills, said = [], []

    def fill_slowly(uri: str) -> None:
        begun.set()
        assert not path.exists(), "seen half done"
        assert go_on.wait(30)
        fills.append(uri)
        fill_uri(uri)

    def say(text: str) -> None:
        said.append(text)
        go_on.set()

    first = threading.Thread(target=set_up_database, args=(path, fill_slowly))
    first.start()
    assert begun.wait(30)
    set_up_database(path, fill_slowly, say)
    first.join()
    assert len(fills) == 1 and is_ready(path) and f"another process sets up MLflow's database {path}" in said[0]
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".db"] == ["mlflow.db"]


def test_a_server_that_begins_at_the_same_moment_keeps_its_file(tmp_path):
    path = tmp_path / "mlflow.db"

    def fill_while_a_server_begins(uri: str) -> None:
        fill_uri(uri)
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("CREATE TABLE of_the_server (name TEXT)")
        threading.Timer(0.5, fill, [path]).start()

    set_up_database(path, fill_while_a_server_begins, lambda text: None)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT * FROM of_the_server").fetchall() == [] and is_ready(path)


def test_a_lock_that_stays_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_database, "PATIENCE_S", 0.2)
    monkeypatch.setattr(mlflow_database, "WORD_EVERY_S", 0.1)
    said = []
    with FileLock(tmp_path / "mlflow.db.lock"), pytest.raises(TimeoutError, match="holds"):
        set_up_database(tmp_path / "mlflow.db", fill_uri, said.append)
    assert len(said) == 3
