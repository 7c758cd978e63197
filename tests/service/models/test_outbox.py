import threading
import time

import pytest

from corun_ray.service.models import outbox as module
from corun_ray.service.models.outbox import UNSENT_FOLDER, Entry, Outbox
from corun_ray.service.storage import locate

URI = "http://mlflow"


class Server:
    """Takes entries, or is away."""

    def __init__(self) -> None:
        self.is_away, self.taken = False, []
        self.tried = threading.Event()

    def take(self, entries) -> None:
        self.tried.set()
        if self.is_away:
            raise ConnectionRefusedError
        self.taken += entries


@pytest.fixture
def hurried(monkeypatch) -> None:
    for name in ("RETRY_EVERY_S", "HURRIED_RETRY_S", "SAVE_EVERY_S"):
        monkeypatch.setattr(module, name, 0.02)


def test_what_is_logged_while_mlflow_is_away_comes_later_in_its_order(hurried, tmp_path):
    server, said, run = Server(), [], locate(str(tmp_path))
    box = Outbox(URI, run, server.take, said.append)
    server.is_away = True
    for step in range(3):
        box.put(Entry(step, step, metrics={"loss": float("nan")}))
    box.put(Entry(3, file="a.png", content=b"png"))
    assert not box.wait(0.2) and box.describe() == "3 metrics, 1 file"
    assert "nobody listens" in box.failure and len(said) == 1 and UNSENT_FOLDER in said[0]

    server.is_away = False
    assert box.wait(30) and [entry.step for entry in server.taken[:3]] == [0, 1, 2] and server.taken[3].file == "a.png"
    box.close()
    assert "answers again" in said[1] and not (tmp_path / UNSENT_FOLDER).exists()


def test_a_later_start_sends_what_was_kept(hurried, tmp_path):
    server, run = Server(), locate(str(tmp_path))
    server.is_away = True
    box = Outbox(URI, run, server.take, lambda text: None)
    box.put(Entry(1, 7, metrics={"loss": 1.0}, content=None))
    assert server.tried.wait(30)
    box.put(Entry(2, file="a.png", content=b"pixels"))
    box.put(Entry(3, tags={"kind": "x"}))
    box.close()
    assert box.failure is not None and b"pixels" not in b"".join(
        file.read_bytes() for file in (tmp_path / UNSENT_FOLDER).iterdir()
    )

    server.is_away = False
    again = Outbox(URI, run, server.take, lambda text: None)
    assert again.load() == 3 and again.wait(30)
    again.close()
    assert [(one.step, one.file, one.tags) for one in server.taken] == [
        (7, None, None),
        (0, "a.png", None),
        (0, None, {"kind": "x"}),
    ]
    assert not (tmp_path / UNSENT_FOLDER).exists()


def test_a_run_that_another_driver_has_keeps_what_that_driver_wrote(hurried, tmp_path):
    server, run, may_end = Server(), locate(str(tmp_path)), threading.Event()
    server.is_away = True
    box = Outbox(URI, run, server.take, lambda text: None)
    box.put(Entry(1, 7, metrics={"loss": 1.0}))
    while not (tmp_path / UNSENT_FOLDER).exists():
        time.sleep(0.01)

    # A request is under way when the run is handed over.
    begun = threading.Event()
    box._send = lambda entries: (begun.set(), may_end.wait(30))
    assert begun.wait(30)
    box.abandon()
    may_end.set()
    box._thread.join(30)
    assert not box._thread.is_alive() and (tmp_path / UNSENT_FOLDER).exists(), "the other driver's, by now"


def test_a_refusal_is_not_waited_for(hurried, tmp_path):
    def refuse(entries) -> None:
        raise ValueError("the run was deleted")

    box = Outbox(URI, None, refuse, lambda text: None)
    box.put(Entry(0, metrics={"loss": 1.0}))
    started_s = time.monotonic()
    assert not box.wait(60) and time.monotonic() - started_s < 30
    box.close()
