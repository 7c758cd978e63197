"""What MLflow's errors mean, in one line that says what helps."""

import re
from collections.abc import Iterator

import requests
import urllib3

from corun_ray.service.errors import format_reason
from corun_ray.service.proxies import describe_proxy

REFUSED = {
    401: "it answers 401: wrong user, password or token (MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN)",
    403: "it answers 403: this user may not do that there, or a proxy in between refuses",
    404: "it answers 404: no MLflow at this path (is a part of the URI missing, or is it a proxy's answer?)",
    407: "it answers 407: a proxy in between asks for a password",
}
"""HTTP status → meaning."""
WEB_PAGE = "it answers with a web page, not as MLflow's API: a login page or another server is at this address"
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
"""Statuses of a server, or a proxy before it, that may answer properly later."""

STATUS_IN_TEXT = re.compile(r"failed with error code (\d{3})\b|too many (\d{3}) error responses")
ENDPOINT = re.compile(r"API request to endpoint (\S+) failed")
SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+), but expected (\w+)\)")
CUT_OFF_SETUP = re.compile(r"table \w+ already exists|duplicate column name|no such table: experiments")
PASSING_TEXTS = ("database is locked", "disk is full", "TEMPORARILY_UNAVAILABLE")


class UnexpectedAnswer(Exception):
    """An HTTP answer that is not MLflow's."""

    def __init__(self, status: int, is_page: bool) -> None:
        super().__init__(f"it answers {status}")
        self.status, self.is_page = status, is_page


def explain_error(error: BaseException, uri: str) -> str:
    """Explain an error of MLflow, or of the way to it, in one line.

    `uri` is that of the MLflow; the caller names it.
    """
    chain = list(walk_causes(error))
    network = _explain_network(chain, uri)
    if network is not None:
        return network + describe_proxy(uri)
    return _explain_answer(chain) or _explain_database(chain, uri) or _take_line(error)


def is_passing(error: BaseException) -> bool:
    """Tell whether an error may pass by itself: MLflow is away, or overloaded; a refusal does not pass."""
    chain = list(walk_causes(error))
    if _find(chain, requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        return False
    status = _read_status(chain)
    away = (ConnectionError, TimeoutError, requests.exceptions.ConnectionError, urllib3.exceptions.HTTPError)
    if is_timeout(error) or (_find(chain, *away) and not status):
        return True
    return status in PASSING_STATUSES if status else any(text in str(error) for text in PASSING_TEXTS)


def is_timeout(error: BaseException) -> bool:
    """Tell whether no answer came in time."""
    for one in walk_causes(error):
        # urllib3 counts every failed connection among these.
        is_late = isinstance(one, TimeoutError | requests.exceptions.Timeout | urllib3.exceptions.TimeoutError)
        if is_late and not isinstance(one, urllib3.exceptions.NewConnectionError):
            return True
    return False


def walk_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that led to it.

    requests and urllib3 hand on their causes as arguments, MLflow as the error that was being handled.
    """
    open_errors, seen = [error], set()
    while open_errors:
        one = open_errors.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        links = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        open_errors += [link for link in links if isinstance(link, BaseException)]


def _find(chain: list[BaseException], *kinds: type[BaseException]) -> BaseException | None:
    """Return the last error of some kinds, the one nearest to the cause."""
    found = [error for error in chain if isinstance(error, kinds)]
    return found[-1] if found else None


def _explain_network(chain: list[BaseException], uri: str) -> str | None:
    """Explain why no answer came, None where one came."""
    host = requests.utils.urlparse(uri).netloc
    tls = _find(chain, requests.exceptions.SSLError, urllib3.exceptions.SSLError)
    if tls is not None:
        reason = re.sub(r"^.*?\[SSL[^\]]*\]\s*|\s*\(_ssl.*$", "", str(_find(chain, OSError) or tls))
        return f"its TLS certificate or protocol is not accepted: {format_reason(Exception(reason))}"

    if _find(chain, urllib3.exceptions.NameResolutionError):
        return f"the name {host.rpartition('@')[2].partition(':')[0]} does not resolve"
    if _find(chain, requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return f"the proxy of HTTP_PROXY or HTTPS_PROXY does not lead there ({format_reason(_as_plain(chain[-1]))})"
    if _find(chain, ConnectionRefusedError):
        return f"nobody listens at {host} (connection refused)"
    if is_timeout(chain[0]):
        return "no answer in time (MLFLOW_HTTP_REQUEST_TIMEOUT gives it more)"
    if _find(chain, requests.exceptions.ConnectionError, urllib3.exceptions.HTTPError) and not _read_status(chain):
        system = _find(chain, OSError)
        return f"the connection to {host} fails ({format_reason(_as_plain(system or chain[-1]))})"
    return None


def _explain_answer(chain: list[BaseException]) -> str | None:
    """Explain an answer that is no success, None for what MLflow itself says best."""
    status = _read_status(chain)
    page = any(getattr(error, "is_page", False) or "not in a valid JSON format" in str(error) for error in chain)
    if page and status in (None, 200):
        return WEB_PAGE
    if status == 404 and not _find(chain, UnexpectedAnswer):
        # The server is MLflow, as its first answer has shown.
        endpoint = ENDPOINT.search(" ".join(str(error) for error in chain))
        return f"it does not know {endpoint[1]} (404): an MLflow older than {_name_version()}?" if endpoint else None
    if status in REFUSED:
        return REFUSED[status]
    if status in PASSING_STATUSES:
        return f"it answers {status}: the server, or what it needs, is down or overloaded"
    return None


def _read_status(chain: list[BaseException]) -> int | None:
    """Read the HTTP status of an answer that is not in MLflow's own form."""
    for error in chain:
        if isinstance(error, UnexpectedAnswer):
            return error.status
        response = getattr(error, "response", None)
        if isinstance(response, requests.Response):
            return response.status_code
        match = STATUS_IN_TEXT.search(str(error))
        if match:
            return int(match[1] or match[2])

        # A server with users tells these two in MLflow's own form.
        code = getattr(error, "error_code", None)
        if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            return 401
        if code == "PERMISSION_DENIED":
            return 403
    return None


def _explain_database(chain: list[BaseException], uri: str) -> str | None:
    """Explain the state of a database that MLflow cannot use as it is."""
    text = "\n".join(str(error) for error in chain)
    match = SCHEMA.search(text)
    if match and (match[1] == "None" or _knows_revision(match[1])):
        return f"the database is of an older MLflow; make a copy of it, then: mlflow db upgrade {uri}"
    if match or "Can't locate revision" in text:
        return f"the database is of a newer MLflow than the {_name_version()} here: use that one, or another database"
    if CUT_OFF_SETUP.search(text):
        path = uri.removeprefix("sqlite:///")
        return f"the set-up of this database was cut off, no run is in it; delete it and start again: rm {path}"
    return None


def _knows_revision(revision: str) -> bool:
    """Tell whether the MLflow here has migrated databases from a revision of the schema."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db.utils import _get_alembic_config

    try:
        ScriptDirectory.from_config(_get_alembic_config("")).get_revision(revision)
    except CommandError:
        return False
    return True


def _name_version() -> str:
    """Return the version of this process's MLflow."""
    import mlflow

    return mlflow.__version__


def _as_plain(error: BaseException) -> Exception:
    """Return an error whose text lacks the objects that urllib3 puts before it."""
    return Exception(re.sub(r"^.*?(<[^>]*>|\)): ", "", str(error)))


def _take_line(error: BaseException) -> str:
    """Return the first line of an error's own text."""
    return format_reason(error if isinstance(error, Exception) else Exception(str(error)))
