"""Waits are said, and have an end."""

import time

import pytest

from corun_ray.service import waiting
from corun_ray.service.waiting import GaveUp, announce_wait, limit_wait


def test_a_wait_is_said_within_5_s_and_then_every_15_s():
    assert waiting.FIRST_WORD_S < 5 and waiting.WORD_EVERY_S == 15


def test_a_wait_is_said_as_long_as_it_lasts(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "FIRST_WORD_S", 0.05)
    monkeypatch.setattr(waiting, "WORD_EVERY_S", 0.05)
    with announce_wait("the cluster"):
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
