"""Asking an MLflow server for the first time, with words for the person who waits."""

import time

import requests

from corun_ray.service.models.mlflow_errors import PASSING_STATUSES, UnexpectedAnswer, is_timeout
from corun_ray.service.waiting import WORD_EVERY_S, Say, print_line

FIRST_TRY_S = 5.0
"""How long the first try waits for an answer."""
PAUSE_S = 2.0
"""Before the second try of a server that answers as overloaded."""
PROBE = "/api/2.0/mlflow/experiments/get-by-name"
PROBED_NAME = "corun-ray"
MISSING = "RESOURCE_DOES_NOT_EXIST"


def probe_server(uri: str, patience_s: float, say: Say = print_line) -> None:
    """Ask a server whether MLflow answers there, with the credentials of the environment.

    A refusal is an error at once. Only a server that does not answer in time is asked again, `patience_s` in all.

    Raises the errors of `requests`, `MlflowException` around them, and `UnexpectedAnswer`.
    """
    waited_s, has_paused = 0.0, False
    while True:
        # The first word comes early; no try lasts beyond the patience.
        limit_s = FIRST_TRY_S if not waited_s else WORD_EVERY_S - waited_s % WORD_EVERY_S
        limit_s = min(limit_s, patience_s - waited_s)
        try:
            _ask(uri, limit_s)
            return
        except UnexpectedAnswer as error:
            if error.status not in PASSING_STATUSES or has_paused:
                raise
            has_paused = True
            time.sleep(PAUSE_S)
        except Exception as error:
            waited_s += limit_s
            if not is_timeout(error) or waited_s >= patience_s:
                raise
            say(f"waiting for MLflow at {uri}: no answer for {waited_s:.0f} s (at most {patience_s:.0f} s)")


def _ask(uri: str, limit_s: float) -> None:
    """Ask for an experiment, once, for at most `limit_s`."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    # A proxied body may come drop by drop: connecting and each read have the limit.
    response = http_request(
        get_default_host_creds(uri),
        PROBE,
        "GET",
        max_retries=0,
        timeout=limit_s,
        retry_codes=(),
        params={"experiment_name": PROBED_NAME},
    )
    content = _read_json(response)
    if response.ok and isinstance(content, dict) and "experiment" in content:
        return
    if isinstance(content, dict) and content.get("error_code") == MISSING:
        return
    raise UnexpectedAnswer(response.status_code, is_page=content is None)


def _read_json(response: requests.Response) -> object:
    """Read a JSON answer, None where it is none."""
    try:
        return response.json()
    except ValueError:
        return None
