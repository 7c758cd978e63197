import pytest
import requests

from corun_ray.service.models import mlflow_server
from corun_ray.service.models.mlflow_errors import UnexpectedAnswer
from corun_ray.service.models.mlflow_server import probe_server


def test_a_server_that_does_not_answer_is_waited_for_with_words(monkeypatch):
    limits, said = [], []

    def ask(uri: str, limit_s: float) -> None:
        limits.append(limit_s)
        raise requests.ReadTimeout

    monkeypatch.setattr(mlflow_server, "_ask", ask)
    with pytest.raises(requests.Timeout):
        probe_server("http://mlflow", 60, said.append)
    assert limits == [5, 10, 15, 15, 15] and [text.split(" for ")[2][:4] for text in said] == [
        "5 s ",
        "15 s",
        "30 s",
        "45 s",
    ]


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (404, 1), (503, 2)])
def test_a_refusal_is_told_at_once(monkeypatch, status, tries):
    asked, said = [], []

    def ask(uri: str, limit_s: float) -> None:
        asked.append(limit_s)
        raise UnexpectedAnswer(status, is_page=True)

    monkeypatch.setattr(mlflow_server, "_ask", ask)
    monkeypatch.setattr(mlflow_server, "PAUSE_S", 0)
    with pytest.raises(UnexpectedAnswer):
        probe_server("http://mlflow", 60, said.append)
    assert len(asked) == tries and not said
