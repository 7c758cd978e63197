"""The HTTP app of a served model: it checks uploads and counts requests; replicas do the work.

There is one app for all replicas. One look at its metrics shows all requests, and one count limits how many wait.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from corun_ray.service.serve.replica import Replica  # imports torch, which the app has no need of

log = logging.getLogger(__name__)

UPLOAD_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 5.0
HEALTH_RETRY_S = 0.2
RETRY_AFTER_S = 2
"""Sent with status 503: when a client should try again."""
CLIENT_GONE = 499
"""nginx's status for a client that went away. Only the metrics show it."""
LOST_REPLICA = RayActorError, TaskCancelledError, DeploymentUnavailableError, ReplicaUnavailableError
"""Errors of a request whose replica ends."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class RequestLimits:
    """The bounds within which requests are served."""

    upload: UploadLimits
    max_in_flight: int
    """Requests that are read, wait or are being restored."""
    timeout_s: float
    """Time of the replicas for one request."""


class HttpApp:
    """The endpoints. Ray Serve calls `__serve_build_asgi_app__` for the ASGI app."""

    def __init__(
        self, replicas: "DeploymentHandle[Replica]", model: ServedModel, limits: RequestLimits, owner: str = ""
    ) -> None:
        """Prepare the page and the metrics.

        `owner` is the deployment that this app belongs to.
        """
        self._replicas, self._model, self._limits, self._owner = replicas, model, limits, owner
        self._in_flight = 0
        self._metrics = ServeMetrics(model)

        environment = Environment(loader=PackageLoader("corun_ray.service.serve", "."), autoescape=True)
        self._page = environment.get_template("page.html.j2").render(
            model=str(model), limits=limits.upload, accept=",".join(MEDIA_TYPES.values()), formats=FORMATS
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        routes = [
            Route("/", self.show_page, methods=["GET"]),
            Route("/dehaze", self.dehaze, methods=["POST"]),
            Route("/healthz", self.report_health, methods=["GET"]),
            Route("/metrics", self.report_metrics, methods=["GET"]),
        ]

        # Errors are answered in JSON, as refusals are.
        handlers = {HTTPException: _answer_http_error, Exception: _answer_internal_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def get_owner(self) -> str:
        """Return the deployment that this app belongs to.

        Another deployment may take over the name of a Serve application.
        """
        return self._owner

    async def show_page(self, request: Request) -> Response:
        """Answer with the page for people."""
        return HTMLResponse(self._page, headers=PAGE_HEADERS)

    async def report_metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' text format."""
        return Response(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def report_health(self, request: Request) -> Response:
        """Answer 200 where a replica answers, else 503.

        A replica answers only once its model is loaded.
        """
        facts = {"model": self._model.name, "version": self._model.version}

        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                health = await self._ask_for_health()
        except TimeoutError:
            return _answer_refusal(Refusal(503, "no replica answers"), **facts)

        return JSONResponse({"status": "ok", **facts, "device": health.device})

    async def _ask_for_health(self) -> ReplicaHealth:
        """Ask until any replica answers.

        After a replica is lost, another may answer.
        """
        while True:
            try:
                health: ReplicaHealth = await self._replicas.report_health.remote()
                return health
            except LOST_REPLICA:
                await asyncio.sleep(HEALTH_RETRY_S)

    async def dehaze(self, request: Request) -> Response:
        """Answer an uploaded image with the restored image.

        A refused request is answered with its reason in JSON.
        """
        started = time.monotonic()
        status = CLIENT_GONE

        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            image, suffix = await self._restore(request)
            self._metrics.count_image(image)
            response = self._answer_image(image, suffix, started)
            status = response.status_code
            return response
        except Refusal as refusal:
            status = refusal.status
            return _answer_refusal(refusal)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:
            # The client went away while a replica worked.
            raise
        except Exception:
            status = 500
            raise
        finally:
            # Every request is counted, however it ends.
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._metrics.count_answer(status, time.monotonic() - started)

    async def _restore(self, request: Request) -> tuple[DehazedImage, str]:
        """Return the restored image and the suffix of its format.

        Raises `Refusal`.
        """
        # Refuse as early as possible: before the body is read, before a pixel is decoded.
        suffix = parse_format(request.query_params)
        check_headers(request.headers, self._limits.upload)
        max_in_flight = self._limits.max_in_flight
        if self._in_flight > max_in_flight:
            raise Refusal(503, f"{max_in_flight} requests are being served or wait, try again later")

        # Reading a header may take a while: in a thread, it does not stop other requests.
        data = await read_body(request.stream(), self._limits.upload, UPLOAD_TIMEOUT_S)
        header = await asyncio.to_thread(check_image, data, self._limits.upload)

        suffix = suffix or header.suffix
        outcome = await self._ask_replica(data, suffix)
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome, suffix

    async def _ask_replica(self, data: bytes, suffix: str) -> DehazedImage | Refusal:
        """Let any replica restore an image file."""
        waiting: Any = self._replicas.dehaze.remote(data, suffix)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                outcome: DehazedImage | Refusal = await waiting
                return outcome
        except TimeoutError:
            waiting.cancel()
            return Refusal(504, f"not restored within {self._limits.timeout_s:g} s, perhaps too large an image")
        except LOST_REPLICA:
            log.exception("a replica was lost under a request")
            return Refusal(503, "the replica that worked on it was lost, try again")

    def _answer_image(self, image: DehazedImage, suffix: str, started: float) -> Response:
        """Answer with a restored image.

        Headers tell model, batch and time.
        """
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


def _answer_refusal(refusal: Refusal, **facts: str | None) -> Response:
    """Answer with a reason; a 503 also tells when to retry."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if refusal.status == 503 else {}
    return JSONResponse({"error": refusal.reason, **facts}, refusal.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method with a reason."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        reason = "nothing here, expected POST /dehaze, or GET /, /healthz or /metrics"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow")
        reason = f"{request.method} is not accepted here, expected {allowed}"
    else:
        reason = str(error.detail)
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def _answer_internal_error(request: Request, error: Exception) -> Response:
    """Answer 500, without anything of the error's text."""
    log.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed on this request, its log says more"}, 500)
