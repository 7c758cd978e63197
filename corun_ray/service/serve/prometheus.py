"""The metrics of a served model, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from corun_ray.service.serve.messages import DehazedImage, ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)


class ServeMetrics:
    """The metrics of all replicas together: every request passes the one HTTP app that holds these."""

    def __init__(self, model: ServedModel) -> None:
        # A registry of our own: the process's default one has Python's metrics too.
        self._registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self._registry}

        # Requests.
        self._requests = Counter(
            "corun_serve_requests",
            "Requests to dehaze an image, by HTTP status; 499: the client went away.",
            ["status"],
            **here,
        )
        self.in_flight = Gauge("corun_serve_in_flight", "Requests that are read, wait or are being restored.", **here)
        self._seconds = Histogram(
            "corun_serve_seconds",
            "From the first byte of a request to its answer, refused ones included.",
            **here,
            buckets=SECONDS_BUCKETS,
        )

        # The network's work.
        self._restore_seconds = Histogram(
            "corun_serve_restore_seconds",
            "The network's work on the batch of an image.",
            **here,
            buckets=SECONDS_BUCKETS,
        )
        self._batch = Histogram(
            "corun_serve_batch_images",
            "Images restored together with an image, itself included.",
            **here,
            buckets=BATCH_BUCKETS,
        )
        self._pixels = Counter("corun_serve_megapixels", "Megapixels restored.", **here)

        # The model, as the labels of a constant.
        info = Gauge("corun_serve_model_info", "1; its labels name the model.", ["model", "version"], **here)
        info.labels(model.name, model.version or "").set(1)

    def count_answer(self, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def count_image(self, image: DehazedImage) -> None:
        """Count a restored image."""
        self._restore_seconds.observe(image.restore_s)
        self._batch.observe(image.batch)
        self._pixels.inc(image.num_pixels / 1e6)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
