"""What is told of an address at which no Ray listens, before Ray is asked."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from corun_ray.service.cluster import ports
from corun_ray.service.cluster.ports import PortError, ask_for_jobs_api, ask_for_ray, read_ray_address
from tests.conftest import free_port


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ports, "POLL_S", 0.05)
    for name in (ports.PATIENCE_VARIABLE, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")


def refused(ask, address: str) -> str:
    with pytest.raises(PortError) as caught:
        ask(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def web_server(content: bytes, status: int = 200) -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def grpc_server(method: str, token: str = "") -> Iterator[str]:
    """A gRPC server with one method, which may want a token."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method == method:
                return grpc.unary_unary_rpc_method_handler(self.answer)
            return None

        def answer(self, request, context) -> bytes:
            if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong")
            return b""

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:8265", "http:// is for the dashboard"),
        ("redis://127.0.0.1:6379", "redis:// is not Ray's"),
        ("127.0.0.1", "expected HOST:6379"),
        ("127.0.0.1:port", "expected HOST:6379"),
        ("nowhere.invalid:6379", "the name nowhere.invalid is not known"),
    ],
)
def test_an_address_that_is_none_is_told(address, reason):
    said = refused(ask_for_ray, address)
    assert said.startswith(f"RAY_ADDRESS: no Ray cluster at {address} (") and reason in said


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_and_a_mute_listener_are_told(scheme, monkeypatch):
    monkeypatch.setattr(ports, "ANSWER_TIMEOUT_S", 0.3)
    said = refused(ask_for_ray, f"{scheme}127.0.0.1:{free_port()}")
    assert "nobody listens there" in said and "CORUN_CONNECT_PATIENCE_S=600 waits for it" in said
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = f"127.0.0.1:{mute.getsockname()[1]}"
        assert "says nothing in 0.3 s" in refused(ask_for_ray, f"{scheme}{place}")
        assert "says nothing in 0.3 s" in refused(ask_for_jobs_api, f"http://{place}")


def test_a_web_server_is_named_for_what_it_is():
    with web_server(b'{"ray_version": "2.60.0"}') as place:
        assert f"Ray's dashboard listens there, http://{place}" in refused(ask_for_ray, place)
        assert f"by its whole address: http://{place}" in refused(ask_for_jobs_api, place)
        ask_for_jobs_api(f"http://{place}")
    with web_server(b"Unauthorized: Missing authentication token", 401) as place:
        assert "there is none here" in refused(ask_for_jobs_api, f"http://{place}")
        assert "Ray's dashboard listens there" in refused(ask_for_ray, place)
    with web_server(b"hello", 404) as place:
        assert "a web server listens there that is not Ray's dashboard" in refused(ask_for_ray, place)
        assert "expected http://HOST:8265" in refused(ask_for_jobs_api, f"http://{place}")


def test_a_head_and_ray_client_are_told_apart():
    with grpc_server(ports.GCS_METHOD) as place:
        ask_for_ray(place)
        assert f"a Ray head listens there, RAY_ADDRESS={place}" in refused(ask_for_ray, f"ray://{place}")
        assert "a Ray head listens there" in refused(ask_for_jobs_api, f"http://{place}")
    with grpc_server(ports.CLIENT_METHOD) as place:
        assert "Ray Client listens there" in refused(ask_for_ray, place)
        assert "corun-ray submit sends jobs" in refused(ask_for_ray, f"ray://{place}")
        ask_for_jobs_api(f"ray://{place}")
    with grpc_server("/other/Method") as place:
        assert "another gRPC service" in refused(ask_for_ray, place)


def test_a_token_that_is_missing_not_sent_or_another_is_told(monkeypatch):
    with grpc_server(ports.GCS_METHOD, token="right") as place:
        assert "there is none here" in refused(ask_for_ray, place)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert "set RAY_AUTH_MODE=token" in refused(ask_for_ray, place)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert "the token here is another" in refused(ask_for_ray, place)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        ask_for_ray(place)


def test_a_head_that_comes_late_is_waited_for_where_that_is_wanted(monkeypatch):
    monkeypatch.setenv(ports.PATIENCE_VARIABLE, "soon")
    assert "must be a number of seconds" in refused(ask_for_ray, "127.0.0.1:1")
    monkeypatch.setenv(ports.PATIENCE_VARIABLE, "30")
    answers = iter(["silent", "silent", "head"])

    def identify(host: str, port: int) -> str:
        answer = next(answers)
        if answer == "silent":
            raise ports._Silence("nobody")
        return answer

    monkeypatch.setattr(ports, "identify", identify)
    ask_for_ray("127.0.0.1:1")
    assert next(answers, None) is None


def test_local_stands_for_a_local_ray(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert read_ray_address() == ""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert read_ray_address() == "head:6379"
