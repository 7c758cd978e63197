"""A loopback proxy before an S3 endpoint which fails on command, as object stores and the ways to them do.

    with FaultyS3("http://127.0.0.1:5000") as s3:
        client = ... s3.url ...
        s3.fault("503")                 # until further notice
        s3.fault("cut", requests=2)     # the next two uploads only
        s3.fault("outage", seconds=20)  # over by itself
        s3.fault(None)                  # healthy again
        assert s3.failed["503"] > 0

Requests and responses pass byte for byte but for the headers about the connection itself: one request each.
"""

import socket
import socketserver
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

ANY = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})
FAULTS = {
    "outage": ANY,  # the port refuses connections
    "500": ANY,
    "503": ANY,
    "reset": ANY,  # the connection is reset in place of an answer
    "slow": ANY,  # the right answer, after `slow_s`
    "read-only": frozenset({"PUT", "POST", "DELETE"}),
    "cut": frozenset({"PUT", "POST"}),  # reset when half of the request's body has arrived
    "cut-read": frozenset({"GET"}),  # reset when half of the response is sent
}
"""Fault → the methods that suffer it by default."""
ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "read-only": (403, "AccessDenied", "Access Denied"),
}
SOCKET_TIMEOUT_S = 60.0


class FaultyS3:
    """The proxy; a context manager. `fault` may be called at any time, from any thread."""

    url: str
    failed: Counter[str]
    """Fault → requests that met it since the start; connections refused by an outage cannot be counted."""

    def __init__(self, upstream_url: str, slow_s: float = 5.0, tls: ssl.SSLContext | None = None) -> None:
        """With `tls`, the proxy itself speaks https."""
        parts = urlsplit(upstream_url)
        assert parts.hostname is not None and parts.port is not None
        self.upstream, self.slow_s, self.tls = (parts.hostname, parts.port), slow_s, tls
        self.failed = Counter()
        self._lock = threading.RLock()
        self._kind: str | None = None
        self._methods: Collection[str] = ANY
        self._left: int | None = None
        self._timer: threading.Timer | None = None
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        # Bound, never listening: an outage frees the port for nobody else.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._reserved.getsockname()[1]}"
        self.fault(None)
        return self

    def __exit__(self, *exception: object) -> None:
        self.fault("outage")
        self._reserved.close()

    def fault(
        self,
        kind: str | None,
        *,
        requests: int | None = None,
        seconds: float | None = None,
        methods: Collection[str] | None = None,
    ) -> None:
        """Sets what is wrong from now on (a key of `FAULTS`, or None: nothing), in place of what was.

        It ends by itself after so many `requests` that met it, or after `seconds`. `methods`: only requests of these
        meet it. An outage spares nobody.
        """
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._kind, self._left = kind, requests
            self._methods = (FAULTS[kind] if methods is None else methods) if kind else ()
            if kind == "outage":
                self._close()
            elif self._server is None:
                self._open()
            if seconds is not None:
                self._timer = threading.Timer(seconds, self.fault, [None])
                self._timer.daemon = True
                self._timer.start()

    def meets(self, method: str) -> str | None:
        """The fault that a request of `method` is to suffer now; counts it."""
        with self._lock:
            kind = self._kind
            if kind is None or method not in self._methods or self._left == 0:
                return None
            if self._left is not None:
                self._left -= 1
            self.failed[kind] += 1
            return kind

    def denies(self, method: str, target: str, body: bytes) -> bool:
        """Whether a policy forbids a request; nothing is forbidden here."""
        return False

    def _open(self) -> None:
        self._server = _Server(self._reserved.getsockname(), self)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultyS3) -> None:
        self.proxy = proxy
        super().__init__(address, _Exchange)


class _Exchange(socketserver.StreamRequestHandler):
    """One request and its answer."""

    server: _Server
    timeout = SOCKET_TIMEOUT_S

    def handle(self) -> None:
        # Clients go away in the middle too.
        with suppress(OSError):
            self._answer()

    def _answer(self) -> None:
        request_line = self.rfile.readline()
        if not request_line:
            return
        self.method, target = request_line.decode().split()[:2]
        headers = self._headers()
        fault = self.server.proxy.meets(self.method)
        if fault in ("reset", "outage"):
            return self._reset()
        if b"expect" in headers:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault == "cut":
            self.rfile.read(self._length(headers) // 2)
            return self._reset()
        body = self._chunks() if b"transfer-encoding" in headers else self.rfile.read(self._length(headers))
        if self.server.proxy.denies(self.method, target, body):
            return self._refuse(403, "AccessDenied", "Access Denied")
        if fault in ANSWERS:
            return self._refuse(*ANSWERS[fault])
        if fault == "slow":
            time.sleep(self.server.proxy.slow_s)
        kept = [line for name, line in headers.items() if name not in (b"connection", b"expect")]
        head = request_line + b"".join(kept) + b"Connection: close\r\n\r\n"
        self._forward(head + body, cut=fault == "cut-read")

    def _headers(self) -> dict[bytes, bytes]:
        """Lower-case name → the whole line."""
        lines = iter(self.rfile.readline, b"\r\n")
        return {line.partition(b":")[0].lower(): line for line in lines if line}

    def _length(self, headers: dict[bytes, bytes]) -> int:
        return int(headers.get(b"content-length", b":0").partition(b":")[2])

    def _chunks(self) -> bytes:
        """A chunked body as it stands on the wire, sizes and trailers included."""
        raw, size = b"", -1
        while size != 0:
            line = self.rfile.readline()
            size = int(line.partition(b";")[0], 16)
            raw += line
            if size:
                raw += self.rfile.read(size + 2)
        trailers = iter(self.rfile.readline, b"\r\n")
        return raw + b"".join(trailers) + b"\r\n"

    def _forward(self, request: bytes, cut: bool) -> None:
        with socket.create_connection(self.server.proxy.upstream, timeout=SOCKET_TIMEOUT_S) as upstream:
            upstream.sendall(request)
            if cut:
                with upstream.makefile("rb") as response:
                    whole = response.read()
                self.wfile.write(whole[: len(whole) // 2])
                self._reset()
            else:
                while piece := upstream.recv(1 << 16):
                    self.wfile.write(piece)

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        head = (
            f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n"
        )
        self.wfile.write((head if self.method == "HEAD" else head + text).encode())

    def _reset(self) -> None:
        # Closing without lingering sends a reset, where a plain close would end the stream in good order.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()
