"""Reading the Prometheus page of this machine's Ray node over HTTP, and the log lines of its session."""

import json
import threading
import time
import urllib.request
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from corun_ray.service.telemetry.logs import FILE_PREFIX, get_log_folder

EVERY_S = 0.4
REPORTED_S = 2.5
"""After so long, what a process has counted is served (see `RAY_metrics_report_interval_ms` in tests/conftest.py)."""
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
"""Metric as exported → labels → the last value seen."""


def scrape() -> str:
    """The page as it is now."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        return page.read().decode()


class Scraper:
    """Keeps what the page has shown while it was open: gauges leave soon after their process."""

    def __init__(self) -> None:
        self.samples: Samples = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._failure: Exception | None = None

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        time.sleep(REPORTED_S)
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def look(self) -> None:
        """Reads the page once."""
        for family in text_string_to_metric_families(scrape()):
            for sample in family.samples:
                self.samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value

    def of_job(self, metric: str, job_name: str) -> list[tuple[dict[str, str], float]]:
        """The samples of a metric of ours that a job has left."""
        found = [(dict(labels), value) for labels, value in self.samples.get(metric, {}).items()]
        return [(labels, value) for labels, value in found if labels.get("job_name") == job_name]

    def _watch(self) -> None:
        try:
            while not self._stopping.wait(EVERY_S):
                self.look()
        except Exception as error:
            self._failure = error


def log_lines(**fields: Any) -> list[dict[str, Any]]:
    """Every log line of this Ray session that has these values, in order of time."""
    lines = [
        json.loads(line)
        for path in get_log_folder().glob(f"{FILE_PREFIX}*.log")
        for line in path.read_text().splitlines()
    ]
    found = [line for line in lines if all(line.get(name) == value for name, value in fields.items())]
    return sorted(found, key=lambda line: line["timestamp_ns"])
