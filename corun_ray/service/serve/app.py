"""The door of a served model: HTTP's side, thin. It judges uploads and counts; replicas do the work.

There is one door, so that one look at its metrics shows all requests, and one count bounds how many wait.
"""

import asyncio
import logging
import time
from typing import Any

from jinja2 import Environment, PackageLoader
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from corun_ray.service.serve.messages import DehazedImage, ReplicaHealth, ServedModel
from corun_ray.service.serve.prometheus import CONTENT_TYPE, ServeMetrics
from corun_ray.service.serve.uploads import (
    FORMATS,
    MEDIA_TYPES,
    Refusal,
    UploadLimits,
    check_headers,
    check_image,
    parse_format,
    read_body,
)

log = logging.getLogger(__name__)
LOST = RayActorError, TaskCancelledError, DeploymentUnavailableError, ReplicaUnavailableError
"""What is raised where a replica ends under a request."""
UPLOAD_S = 60.0
ALIVE_S, ALIVE_AGAIN_S = 5.0, 0.2
RETRY_AFTER_S = 2
CLIENT_GONE = 499
"""Nobody sees this status; it is nginx's for a client that went away."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
}


class HttpApp:
    """The endpoints; an ASGI app made by `__serve_build_asgi_app__`, which Ray Serve looks for."""

    def __init__(
        self,
        restorer: DeploymentHandle,
        model: ServedModel,
        limits: UploadLimits,
        max_in_flight: int,
        timeout_s: float,
        owner: str = "",
    ) -> None:
        self._owner = owner
        self._restorer, self._model, self._limits, self._timeout_s = restorer, model, limits, timeout_s
        self._max_in_flight, self._in_flight = max_in_flight, 0
        self._metrics = ServeMetrics(model)
        environment = Environment(loader=PackageLoader("corun_ray.service.serve", "."), autoescape=True)
        self._page = environment.get_template("page.html.j2").render(
            model=str(model), limits=limits, accept=",".join(MEDIA_TYPES.values()), formats=FORMATS
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        routes = [
            Route("/", self.page, methods=["GET"]),
            Route("/dehaze", self.dehaze, methods=["POST"]),
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _own_error})

    async def owned_by(self) -> str:
        """Which deployment this door belongs to: names of applications may be taken over."""
        return self._owner

    async def page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(self._page, headers=PAGE_HEADERS)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, request: Request) -> Response:
        """200 where a replica answers, which it can only do with its model loaded."""
        facts = {"model": self._model.name, "version": self._model.version}
        try:
            async with asyncio.timeout(ALIVE_S):
                alive = await self._alive()
        except TimeoutError:
            return _refusal(Refusal(503, "no replica answers"), **facts)
        return JSONResponse({"status": "ok", **facts, "device": alive.device})

    async def _alive(self) -> ReplicaHealth:
        """The answer of any replica; one that is lost while it is asked is not the last word."""
        while True:
            try:
                alive: ReplicaHealth = await self._restorer.alive.remote()
                return alive
            except LOST:
                await asyncio.sleep(ALIVE_AGAIN_S)

    async def dehaze(self, request: Request) -> Response:
        """An image in, the restored one out; what is wrong with a request is told in a line of JSON."""
        started, status = time.monotonic(), CLIENT_GONE
        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            response = self._answer(await self._restored(request), started)
            status = response.status_code
            return response
        except Refusal as refused:
            status = refused.status
            return _refusal(refused)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._metrics.answered(status, time.monotonic() - started)

    async def _restored(self, request: Request) -> tuple[DehazedImage, str]:
        """The answer of a replica and the suffix of its format; raises `Refusal`."""
        suffix = parse_format(request.query_params)
        check_headers(request.headers, self._limits)
        if self._in_flight > self._max_in_flight:
            raise Refusal(503, f"{self._max_in_flight} requests are being served or wait, try again later")
        data = await read_body(request.stream(), self._limits, UPLOAD_S)
        header = await asyncio.to_thread(check_image, data, self._limits)
        suffix = suffix or header.suffix
        outcome = await self._by_a_replica(data, suffix)
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome, suffix

    async def _by_a_replica(self, data: bytes, suffix: str) -> DehazedImage | Refusal:
        waiting: Any = self._restorer.dehaze.remote(data, suffix)
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome: DehazedImage | Refusal = await waiting
                return outcome
        except TimeoutError:
            waiting.cancel()
            return Refusal(504, f"not restored within {self._timeout_s:g} s, perhaps too large an image")
        except LOST:
            log.exception("a replica was lost under a request")
            return Refusal(503, "the replica that worked on it was lost, try again")

    def _answer(self, restored: tuple[DehazedImage, str], started: float) -> Response:
        image, suffix = restored
        self._metrics.restored(image)
        total_ms, restore_ms = 1e3 * (time.monotonic() - started), 1e3 * image.restore_s
        headers = {
            "Content-Type": MEDIA_TYPES[suffix],
            "X-Corun-Model": str(self._model).encode("ascii", "replace").decode(),
            "X-Corun-Batch": str(image.batch),
            "Server-Timing": f"total;dur={total_ms:.0f}, restore;dur={restore_ms:.0f}",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return Response(image.file, headers=headers)


def _refusal(refused: Refusal, **facts: str | None) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if refused.status == 503 else {}
    return JSONResponse({"error": refused.reason, **facts}, refused.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        reason = "nothing here, expected POST /dehaze, or GET /, /healthz or /metrics"
    elif error.status_code == 405:
        reason = f"{request.method} is not taken here, expected {(error.headers or {}).get('Allow')}"
    else:
        reason = str(error.detail)
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def _own_error(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed at this, its log says more"}, 500)
