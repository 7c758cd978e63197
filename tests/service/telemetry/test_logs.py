"""Log lines without a Ray: what is in them and what is not. With one: test_scrape.py."""

import io
import json
import logging

import pytest

from corun_ray.service.telemetry import logs
from corun_ray.service.telemetry.logs import Log, redact


@pytest.fixture
def lines(monkeypatch):
    """Reads the lines written so far, by the formatter that the files have."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs._SessionFile().formatter)
    monkeypatch.setattr(logs.LOGGER, "handlers", [handler])
    monkeypatch.setattr(logs.LOGGER, "propagate", False)
    monkeypatch.setattr(logs.LOGGER, "level", logging.INFO)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_its_context_its_fields_and_where_it_was_written(lines):
    log = Log("worker", {"job_name": "j", "kind": "colabator", "run": "j-1"}, rank=3)
    log.info("checkpoint saved", step=12, seconds=0.5)
    log.warning("note", text='quotes " and\nlines', step=None)
    first, second = lines()
    expected = {"component": "worker", "job": "j", "kind": "colabator", "run": "j-1", "rank": 3, "step": 12}
    assert expected.items() <= first.items() and first["seconds"] == 0.5
    assert (first["message"], first["levelname"], first["filename"]) == ("checkpoint saved", "INFO", "test_logs.py")
    assert second["text"] == 'quotes " and\nlines' and "step" not in second and second["levelname"] == "WARNING"


def test_an_error_has_its_traceback_where_there_is_one(lines):
    log = Log("worker", {})
    try:
        raise ValueError("upside down")
    except ValueError:
        log.error("worker failed", step=4)
    log.error("training failed", error="two lines\nof text")
    raised, plain = lines()
    assert raised["exc_text"].endswith("ValueError: upside down") and "exc_text" not in plain


def test_numbers_that_json_does_not_know_are_texts(lines):
    Log("driver", {}).info("validated", step=1, good=2.5, bad=float("nan"), worse=float("inf"))
    (line,) = lines()
    assert (line["good"], line["bad"], line["worse"]) == (2.5, "nan", "inf")


def test_secrets_stay_out(lines, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'planted/"key"+value')
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-token")
    monkeypatch.setenv("SHORT_KEY", "image")
    monkeypatch.setenv("PLAIN", "not-a-secret")
    log = Log("driver", {})
    try:
        raise OSError('s3 refused planted/"key"+value; http://user:pass%40word@mlflow:5000/api?token=abc')
    except OSError as error:
        log.error("training failed", error=str(error), image="a/image.png", other="not-a-secret")
    (line,) = lines()
    text = json.dumps(line)
    for secret in ("planted", "pass%40word", "abc"):
        assert secret not in text
    assert line["error"] == "s3 refused ***; http://***@mlflow:5000/api?token=***"
    assert line["image"] == "a/image.png" and line["other"] == "not-a-secret"
    assert redact("Bearer planted-token") == "Bearer ***"


def test_the_console_hears_nothing(lines, capfd):
    Log("driver", {}).error("training failed")
    assert capfd.readouterr() == ("", "")
    assert len(lines()) == 1
