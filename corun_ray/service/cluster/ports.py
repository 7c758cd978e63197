"""What listens at a cluster's address, asked before Ray is: Ray's own client waits for minutes, and does not say why.

Nothing heavy is imported until a port has answered, so that a wrong address is told at once.
"""

import http.client
import math
import os
import socket
import time
from contextlib import closing, suppress
from typing import Literal
from urllib.parse import urlsplit

from corun_ray.core.errors import UserError
from corun_ray.service.cluster.tokens import describe_token_trouble, read_token
from corun_ray.service.proxies import describe_proxy
from corun_ray.service.trust import REQUESTS, find_certificate_fault
from corun_ray.service.waiting import announce_wait

PATIENCE_VARIABLE = "CORUN_CONNECT_PATIENCE_S"
POLL_S = 1.0
CONNECT_TIMEOUT_S = 2.5
ANSWER_TIMEOUT_S = 2.0
"""For the first bytes of a connection; with 60 processes waiting for 2 cores, a head takes 1.2 s at most."""
CALL_TIMEOUT_S = 10.0
"""For a call to a server that has answered."""

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The beginning of HTTP/2, as gRPC speaks it, with empty settings; a server of HTTP/1 refuses it in its own words."""
HTTP2_SETTINGS_TYPE = 4
HEADER_BYTES = 9
GCS_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
NODES_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"
CLIENT_SCHEME = "ray"
RAY_EXPECTED = "expected HOST:6379 of a head"
JOBS_EXPECTED = "expected http://HOST:8265"

Speaker = Literal["head", "client", "jobs", "locked", "web", "grpc", "other", "unknown"]
MEANINGS: dict[Speaker, str] = {
    "head": "a Ray head listens there, RAY_ADDRESS={place}",
    "client": "Ray Client listens there, and Ray Data cannot run through it: corun-ray submit sends jobs",
    "jobs": "Ray's dashboard listens there, http://{place} is for corun-ray submit and jobs",
    "locked": "Ray's dashboard listens there, http://{place} is for corun-ray submit and jobs",
    "web": "a web server listens there that is not Ray's dashboard",
    "grpc": "another gRPC service than Ray listens there",
    "other": "something listens there that is not Ray",
    "unknown": "something listens there",
}


class PortError(UserError):
    """An address at which what was looked for does not answer; the message is one line."""


class _Silence(Exception):
    """Nobody answers at a port; the message is the reason. It may pass."""


class _Refusal(Exception):
    """A Ray refuses what it is asked; the message is the reason."""


# --- The address of the environment ---


def read_ray_address() -> str:
    """Return RAY_ADDRESS; it is empty where a local Ray is to be started."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def find_jobs_address(given: str | None) -> str:
    """Return where the Jobs API is: at `given`, else where the environment says; it is empty where nothing says so."""
    return given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""


def read_patience_s() -> float:
    """Return how long a cluster may take to answer, in seconds.

    Raises `PortError` where the variable is no number.
    """
    text = os.environ.get(PATIENCE_VARIABLE) or "0"
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise PortError(f"{PATIENCE_VARIABLE} must be a number of seconds, not {text!r}")


# --- Asking for what is needed ---


def ask_for_ray(address: str) -> None:
    """Return when a Ray head answers at `address`, HOST:PORT.

    `auto` is left to Ray. Raises `PortError`: at once where something else listens there, else after
    some seconds or what CORUN_CONNECT_PATIENCE_S gives.
    """
    if address == "auto":
        return

    failure = f"RAY_ADDRESS: no Ray cluster at {address}"
    scheme, host, port = _split(address)
    if scheme not in ("", CLIENT_SCHEME) or not host or port is None:
        hint = f"{scheme}:// is not Ray's, {RAY_EXPECTED}" if scheme else RAY_EXPECTED
        if scheme.startswith("http"):
            hint = f"{scheme}:// is for the dashboard of corun-ray submit and jobs, {RAY_EXPECTED}"
        raise PortError(f"{failure} ({hint})")

    speaker = _await_speaker(host, port, failure)
    if scheme or speaker not in ("head", "unknown"):
        raise PortError(f"{failure} ({_explain(speaker, host, port)}; {RAY_EXPECTED})")


def ask_for_jobs_api(address: str) -> None:
    """Return when a dashboard answers at `address`: http://HOST:PORT.

    A head or Ray Client will do as well: they know their dashboard. Raises `PortError`, as `ask_for_ray` does.
    """
    if address == "auto":
        return

    failure = f"{address}: no Jobs API answers there"
    scheme, host, port = _split(address)
    if scheme not in ("", CLIENT_SCHEME, "http", "https") or not host:
        raise PortError(f"{failure} ({JOBS_EXPECTED})")
    if port is None:
        if not scheme.startswith("http"):
            raise PortError(f"{failure} (it has no port; {JOBS_EXPECTED})")
        port = 443 if scheme == "https" else 80

    # A proxy reaches what cannot be reached from here: Ray's client tries it itself.
    if _is_behind_proxy(address):
        return
    if scheme == "https":
        _ask_for_tls(address, host, port, failure)
        return

    wanted: Speaker = "client" if scheme == CLIENT_SCHEME else "jobs" if scheme else "head"
    speaker = _await_speaker(host, port, failure)
    if speaker in (wanted, "unknown"):
        return
    if speaker == "locked" and wanted == "jobs":
        raise PortError(f"{address}: {describe_token_trouble()}")
    if speaker in ("jobs", "locked"):
        raise PortError(f"{failure} (Ray's dashboard does, by its whole address: http://{host}:{port})")
    raise PortError(f"{failure} ({_explain(speaker, host, port)}; {JOBS_EXPECTED})")


def _ask_for_tls(address: str, host: str, port: int, failure: str) -> None:
    """Return when a server answers by a certificate that Ray's client will trust; it asks for the rest itself.

    Raises `PortError`.
    """
    try:
        _open(host, port).close()
    except _Silence as silence:
        raise PortError(f"{failure} ({silence})") from None
    # Ray's client reads this variable, which has the CA of any other by now. A folder of CAs is its own matter.
    ca_file = os.environ.get(REQUESTS)
    fault = None if ca_file and os.path.isdir(ca_file) else find_certificate_fault(address, ca_file)
    if fault is not None:
        raise PortError(fault)


def _await_speaker(host: str, port: int, failure: str) -> Speaker:
    """Return who speaks at a port, as soon as somebody does.

    Raises `PortError`, which begins with `failure`.
    """
    patience_s = read_patience_s()
    deadline_s = time.monotonic() + patience_s
    with announce_wait(f"{host}:{port} to answer"):
        while True:
            try:
                return identify(host, port)
            except _Refusal as refusal:
                raise PortError(f"{failure} ({refusal})") from None
            except _Silence as silence:
                if time.monotonic() >= deadline_s:
                    advice = f"{PATIENCE_VARIABLE}=600 waits for it" if not patience_s else f"{patience_s:g} s long"
                    raise PortError(f"{failure} ({silence}; {advice})") from None
            time.sleep(POLL_S)


def _explain(speaker: Speaker, host: str, port: int) -> str:
    """Return what listens at a port, and what its address is good for."""
    return MEANINGS[speaker].format(place=f"{host}:{port}")


# --- Asking a port what it speaks ---


def identify(host: str, port: int) -> Speaker:
    """Ask a port what it speaks.

    Raises `_Silence` where nobody answers, and `_Refusal` where a Ray wants another token.
    """
    # Ray itself finds out more.
    if _has_tls():
        _open(host, port).close()
        return "unknown"

    # The first bytes tell HTTP from gRPC.
    answer = _say_hello(host, port)
    if len(answer) < HEADER_BYTES or answer.startswith(b"HTTP/") or answer[3] != HTTP2_SETTINGS_TYPE:
        return _ask_web_server(host, port)

    # A head and Ray Client differ in the methods that they know.
    if _call(host, port, GCS_METHOD) is not None:
        return "head"
    return "grpc" if _call(host, port, CLIENT_METHOD) is None else "client"


def _open(host: str, port: int) -> socket.socket:
    """Connect to a port; raises `_Silence`."""
    try:
        return socket.create_connection((host, port), CONNECT_TIMEOUT_S)
    except socket.gaierror as error:
        raise _Silence(f"the name {host} is not known: {error.strerror}") from None
    except ConnectionRefusedError:
        raise _Silence("nobody listens there: connection refused") from None
    except TimeoutError:
        raise _Silence(f"no answer within {CONNECT_TIMEOUT_S:g} s: a firewall, or a machine that is off") from None
    except (OSError, OverflowError, UnicodeError) as error:
        raise _Silence(getattr(error, "strerror", None) or str(error)) from None


def _say_hello(host: str, port: int) -> bytes:
    """Return the first bytes that a server answers to the beginning of HTTP/2.

    Raises `_Silence`.
    """
    with closing(_open(host, port)) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        try:
            connection.sendall(HELLO)
            return connection.recv(1024)
        except TimeoutError:
            raise _Silence(f"something accepts connections there and says nothing in {ANSWER_TIMEOUT_S:g} s") from None
        except OSError:
            return b""


def _ask_web_server(host: str, port: int) -> Speaker:
    """Ask for the version of a dashboard, which only those who have its token are told."""
    token = read_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(host, port, timeout=CALL_TIMEOUT_S)
    try:
        with closing(connection):
            connection.request("GET", "/api/version", headers=headers)
            answer = connection.getresponse()
            content = answer.read()
    except (OSError, http.client.HTTPException):
        return "other"

    if answer.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return "locked" if b"authentication token" in content else "web"
    return "jobs" if b'"ray_version"' in content else "web"


def fetch_nodes(address: str) -> bytes:
    """Fetch the list of its nodes from the head at an address, as Ray encodes it.

    The list is empty where it cannot be had in plain gRPC.
    """
    _, host, port = _split(address)
    if port is None or _has_tls():
        return b""
    with suppress(_Silence, _Refusal):
        return _call(host, port, NODES_METHOD) or b""
    return b""


def is_answering(host: str, port: int) -> bool:
    """Return whether something answers at a port."""
    with suppress(_Silence):
        _say_hello(host, port)
        return True
    return False


def _has_tls() -> bool:
    """Return whether the ports of Ray speak TLS, and only to those who have the certificate."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _call(host: str, port: int, method: str) -> bytes | None:
    """Call a method of a gRPC server without arguments; return its answer, or None where there is no such method.

    An answer of another kind is empty. Raises `_Refusal` where it wants another token, and `_Silence` where it does not
    answer.
    """
    # Plain gRPC: importing Ray takes seconds, and is for later.
    import grpc

    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    token = read_token() if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        # As for Ray, without a proxy.
        with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            answer: bytes = channel.unary_unary(method)(b"", timeout=CALL_TIMEOUT_S, metadata=metadata)
            return answer
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise _Refusal(describe_token_trouble()) from None
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise _Silence(f"its gRPC does not answer: {error.details()}") from None
        return None if code == grpc.StatusCode.UNIMPLEMENTED else b""


def _split(address: str) -> tuple[str, str, int | None]:
    """Split an address into scheme, host and port; what is missing is empty or None."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        return parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        return parts.scheme, "", None


def _is_behind_proxy(address: str) -> bool:
    """Return whether requests to an address go through a proxy."""
    return bool(describe_proxy(address))
