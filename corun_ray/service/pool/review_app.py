"""The page on which a person looks at the labels of a saved pool and keeps or rejects them. Needs no Ray.

The app is for one person's browser on the same machine: it listens on loopback alone, answers to no other name, and
takes decisions from its own page only.
"""

import hashlib
import secrets
import signal
import socket
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from corun_ray.core.choices import Combine
from corun_ray.core.data.images import ImageU8, encode_png
from corun_ray.core.inference.pictures import apply_colour_map, encode_thumbnail
from corun_ray.core.training.labels import Label
from corun_ray.service.errors import format_reason
from corun_ray.service.pool.export import compute_trust_map, decode_scene, load_hazy_image
from corun_ray.service.pool.index import Head
from corun_ray.service.pool.review import Choice, Review
from corun_ray.service.pool.snapshots import CheckedModel, Index
from corun_ray.service.pool.source import SavedPool, find_saved_pool
from corun_ray.service.runs.record import read_record
from corun_ray.service.storage import StorageError

LOOPBACK = "127.0.0.1"
TOKEN_HEADER = "X-Corun-Token"
CACHED_LABELS = 32
"""Labels in memory: the three pictures of one label are asked for one by one."""
THUMBNAIL_PX = 96
ID_BYTES = 12
MAX_BODY_BYTES = 1000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
STATE_NOTES = {
    "running": "This run has not ended. If it still trains, the page shows its last checkpoint, and decisions count "
    "from the next start of its workers; a better label that has come by then stays.",
    "finished": "This run has ended. Rejected labels leave its pool when it is resumed with more train.steps.",
}


@dataclass(frozen=True)
class LabelImages:
    """What the page shows beside a label: where the hazy images lie, and how scores become trust."""

    combine: Combine
    hazy_root: str | None
    unknown: str = ""
    """Why there is no `hazy_root`."""


class DecisionRequest(CheckedModel):
    """The body of a decision: the label's id on the page, and what to do with it."""

    id: str
    choice: Choice


class ReviewApp:
    """The endpoints, of the labels in one run's pool."""

    def __init__(self, source: str, images: LabelImages) -> None:
        """Open the pool.

        `source` is one of `source.EXPECTED_SOURCES`. Each load of the page opens the newest checkpoint of a run.

        Raises `StorageError`.
        """
        self._source, self._images = source, images
        self._token = secrets.token_urlsafe(16)
        self._lock = threading.Lock()

        self.pool = find_saved_pool(source)
        self.review = Review(self.pool.pool)
        self._labels = identify_labels(self.pool.read_index())
        self._read_label = lru_cache(CACHED_LABELS)(self._find_label)

        environment = Environment(loader=PackageLoader("corun_ray.service.pool", "."), autoescape=True)
        self._template = environment.get_template("review.html.j2")

    def build(self) -> Starlette:
        """Build the ASGI app."""
        routes = [
            Route("/", self.show_page, methods=["GET"]),
            Route("/labels", self.list_labels, methods=["GET"]),
            Route("/labels/{id}", self.describe_label, methods=["GET"]),
            Route("/labels/{id}/{picture}", self.draw_picture, methods=["GET"]),
            Route("/decisions", self.decide, methods=["POST"]),
        ]

        # Another name may belong to a page elsewhere, whose name server points here.
        own_names = Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"], www_redirect=False)
        handlers: dict[Any, Any] = {HTTPException: _answer_http_error, StorageError: _answer_storage_error}
        return Starlette(routes=routes, middleware=[own_names], exception_handlers=handlers)

    def count_choices(self) -> Counter[Choice]:
        """Count the labels by what was decided about them."""
        return Counter(self.review.get_choice(head) for head, _ in self._labels.values())

    # --- Endpoints ---

    def show_page(self, request: Request) -> Response:
        """Answer with the page, which asks for the labels itself."""
        page = self._template.render(
            run=self.pool.pool.parent().name,
            token=self._token,
            token_header=TOKEN_HEADER,
            combine=self._images.combine,
            note=describe_run_state(self.pool),
        )
        return HTMLResponse(page, headers=HEADERS)

    def list_labels(self, request: Request) -> Response:
        """Answer with all labels and decisions, as of the run's newest checkpoint."""
        self._refresh()
        labels = []
        for label_id, (head, _) in self._labels.items():
            labels.append(
                {
                    "id": label_id,
                    "key": head.key,
                    "clarity": head.scores.clarity,
                    "quality": head.scores.quality,
                    "trust": self._combine_scores(head),
                    "step": head.step,
                    "choice": self.review.get_choice(head),
                }
            )
        content = {"snapshot": self.pool.uri, "step": self.pool.snapshot.step, "labels": labels}
        return JSONResponse(content, headers=HEADERS)

    def describe_label(self, request: Request) -> Response:
        """Answer with what only the label itself tells: its size and its mean trust."""
        label = self._get_label(request)
        _, height_px, width_px = label.scene.shape
        trust = compute_trust_map(label, self._images.combine)
        content = {"height_px": height_px, "width_px": width_px, "trust_mean": float(trust.mean())}
        return JSONResponse(content, headers=HEADERS)

    def draw_picture(self, request: Request) -> Response:
        """Answer with one picture of a label: `hazy`, `label`, `trust`, or the small JPEG `thumbnail`."""
        label, picture = self._get_label(request), request.path_params["picture"]
        if picture == "thumbnail":
            content = encode_thumbnail(decode_scene(label), THUMBNAIL_PX)
            return Response(content, media_type="image/jpeg", headers=HEADERS)
        return Response(encode_png(self._draw(label, picture)), media_type="image/png", headers=HEADERS)

    async def decide(self, request: Request) -> Response:
        """Save a decision, then answer with it."""
        # A page from elsewhere can send requests here, but cannot read the token.
        token, origin = request.headers.get(TOKEN_HEADER, ""), request.headers.get("Origin")
        own_origin = f"http://{request.headers.get('Host')}"
        if not secrets.compare_digest(token.encode(), self._token.encode()) or origin not in (None, own_origin):
            raise HTTPException(403, "this page is no longer the review's own; reload it")

        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"expected a decision of at most {MAX_BODY_BYTES} bytes")
        try:
            wanted = DecisionRequest.model_validate_json(body)
        except ValidationError:
            raise HTTPException(400, "expected JSON: an id, and a choice of keep, reject or undecided") from None

        head, _ = self._get_entry(wanted.id)
        await run_in_threadpool(self.review.decide, head, wanted.choice)
        return JSONResponse({"id": wanted.id, "choice": wanted.choice}, headers=HEADERS)

    # --- Labels ---

    def _refresh(self) -> None:
        """Open the newest checkpoint's snapshot, and read what others decided."""
        with self._lock:
            newest = find_saved_pool(self._source)
            if newest != self.pool:
                self._labels = identify_labels(newest.read_index())
                self.pool = newest
            self.review.refresh()

    def _get_entry(self, label_id: str) -> tuple[Head, Any]:
        """Return head and row of a label.

        Raises `HTTPException` for a label that is not in the pool.
        """
        if label_id not in self._labels:
            raise HTTPException(404, "this label is no longer in the run's last checkpoint; reload the page")
        return self._labels[label_id]

    def _get_label(self, request: Request) -> Label:
        label_id = request.path_params["id"]
        self._get_entry(label_id)
        return self._read_label(label_id)

    def _find_label(self, label_id: str) -> Label:
        head, segment_row = self._get_entry(label_id)
        return self.pool.read_label(head.key, segment_row)

    def _combine_scores(self, head: Head) -> float:
        """Combine a label's scores as its blocks' scores are combined to trust."""
        clarity, quality = head.scores
        return (clarity + quality) / 2 if self._images.combine == "addition" else clarity * quality

    def _draw(self, label: Label, picture: str) -> ImageU8:
        """Draw one picture of a label, at its own size.

        Raises `StorageError` for a hazy image that cannot be had, and `HTTPException` for another picture.
        """
        if picture == "label":
            return decode_scene(label)
        if picture == "trust":
            return apply_colour_map(compute_trust_map(label, self._images.combine))
        if picture != "hazy":
            raise HTTPException(404, "expected hazy, label, trust or thumbnail")

        if self._images.hazy_root is None:
            raise StorageError(f"{self._images.unknown}; name the folder of hazy images with --hazy ROOT")
        return load_hazy_image(self._images.hazy_root, label.key, *label.scene.shape[-2:])


def identify_labels(index: Index) -> dict[str, tuple[Head, Any]]:
    """Give every label of an index an id; a newer label of the same image has another."""
    labels = {}
    for head, segment_row in index.values():
        text = f"{head.step} {head.scores.clarity!r} {head.scores.quality!r} {head.key}"
        labels[hashlib.blake2b(text.encode(), digest_size=ID_BYTES).hexdigest()] = (head, segment_row)
    return labels


def describe_run_state(pool: SavedPool) -> str:
    """Describe what a decision waits for; empty where the run's record is not there."""
    try:
        return STATE_NOTES[read_record(pool.pool.parent()).state]
    except StorageError:
        return ""


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer with a reason in JSON."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, {**HEADERS, **(error.headers or {})})


async def _answer_storage_error(request: Request, error: Exception) -> Response:
    """Answer with what could not be read or written."""
    return JSONResponse({"error": str(error)}, 503, HEADERS)


# --- Serving ---


def listen(port: int) -> socket.socket:
    """Listen on loopback; port 0 takes a free one.

    Raises `StorageError` where the port cannot be had.
    """
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        door.close()
        raise StorageError(f"cannot listen at {LOOPBACK}:{port}: {format_reason(error)}") from None
    door.listen()
    return door


def serve(app: Starlette, door: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    # uvicorn ends what is under way, then raises the signal again.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])
