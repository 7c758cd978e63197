"""Waits are said, and have an end."""

import threading
import time

import pytest

from corun_ray.service import waiting
from corun_ray.service.waiting import GaveUp, Meanwhile, announce_wait, limit_wait, try_import


def test_a_wait_is_said_within_5_s_and_then_every_15_s():
    assert waiting.FIRST_WORD_S < 5 and waiting.WORD_EVERY_S == 15


def test_a_wait_is_said_as_long_as_it_lasts(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "WORD_EVERY_S", 0.05)
    with announce_wait("the cluster", first_word_s=0.05):
        time.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 2 and all(line.startswith("waiting for the cluster: ") for line in said)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_wait_that_is_too_long_is_given_up_though_errors_are_swallowed():
    with pytest.raises(GaveUp), limit_wait(0.05, "no"):
        while True:
            try:
                time.sleep(1)
            except Exception:
                continue


def test_things_are_done_in_their_order_while_the_block_waits():
    done = []
    with Meanwhile(lambda: done.append("first"), lambda: done.append("second")):
        time.sleep(0.1)
        done.append("block")
    assert done == ["first", "second", "block"]


def test_the_end_of_the_block_waits_and_raises_the_first_error():
    def fail():
        time.sleep(0.1)
        raise ValueError("no")

    done = []
    with pytest.raises(ValueError, match="no"), Meanwhile(fail, lambda: done.append("never")):
        done.append("block")
    assert done == ["block"]


def test_an_error_of_the_block_comes_first_and_nothing_more_begins():
    done = []
    meanwhile = Meanwhile(lambda: time.sleep(0.3), lambda: done.append("late"))
    with pytest.raises(KeyError), meanwhile:
        raise KeyError
    assert done == []


def test_what_hangs_is_left_behind_where_the_block_fails(monkeypatch):
    monkeypatch.setattr(waiting, "LAST_RESORT_S", 0.1)
    forever, began_s = threading.Event(), time.monotonic()
    with pytest.raises(KeyError), Meanwhile(forever.wait):
        raise KeyError
    assert time.monotonic() - began_s < 5
    forever.set()


def test_a_module_that_cannot_be_imported_is_left_to_who_needs_it():
    try_import("corun_ray.no_such_module")
