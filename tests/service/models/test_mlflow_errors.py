import pytest
import requests
import urllib3
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.db.utils import _get_latest_schema_revision

from corun_ray.service.models.mlflow_errors import UnexpectedAnswer, explain_error, is_passing, is_timeout

URI = "http://mlflow.lan:5000"


def refused() -> MlflowException:
    """What MLflow makes of a port where nobody listens."""
    try:
        requests.get("http://127.0.0.1:1/", timeout=5)
    except requests.ConnectionError as error:
        caught = error
    raised = MlflowException(f"API request failed with exception {caught}")
    raised.__context__ = caught
    return raised


CASES = [
    (UnexpectedAnswer(401, is_page=True), "401: wrong user, password or token", False),
    (UnexpectedAnswer(404, is_page=True), "404: no MLflow at this path", False),
    (UnexpectedAnswer(200, is_page=True), "a web page, not as MLflow's API", False),
    (UnexpectedAnswer(503, is_page=True), "503: the server, or what it needs", True),
    (
        MlflowException("API request to endpoint /api failed with error code 403 != 200. Response body: 'no'"),
        "403",
        False,
    ),
    (
        MlflowException("API request to endpoint /api/x failed with error code 404 != 200. Body: 'no'"),
        "know /api/x",
        False,
    ),
    (RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), "403", False),
    (refused(), "nobody listens at mlflow.lan:5000", True),
    (requests.ReadTimeout("Read timed out."), "no answer in time", True),
    (requests.exceptions.SSLError("certificate verify failed"), "TLS certificate or protocol is not accepted", False),
    (
        requests.ConnectionError(urllib3.exceptions.NameResolutionError("mlflow.lan", None, OSError("unknown"))),
        "the name mlflow.lan does not resolve",
        True,
    ),
    (MlflowException("(sqlite3.OperationalError) database is locked"), "database is locked", True),
    (MlflowException("(sqlite3.OperationalError) duplicate column name: step"), "rm ", False),
    (ValueError("something else\nand more"), "something else", False),
]


@pytest.mark.parametrize(("error", "said", "passes"), CASES)
def test_an_error_is_one_line_that_says_what_helps(error, said, passes):
    text = explain_error(error, URI)
    assert said in text and "\n" not in text and "object at 0x" not in text
    assert is_passing(error) == passes
    assert is_timeout(error) == isinstance(error, requests.Timeout)


def test_a_database_of_another_schema_has_its_command():
    words = "Detected out-of-date database schema (found version {}, but expected {})"
    head = _get_latest_schema_revision()
    older = MlflowException(words.format("451aebb31d03", head))
    assert "mlflow db upgrade sqlite:///x.db" in explain_error(older, "sqlite:///x.db")
    newer = MlflowException(words.format("ffffffffffff", head))
    assert "newer MLflow" in explain_error(newer, "sqlite:///x.db")
