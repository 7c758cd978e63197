"""Log lines for machines: JSON, one object a line, one file a process, beside Ray's own logs on every node.

Ray's formatter and its context (`job_id`, `node_id`, `worker_id`, `actor_id` ...) with fields of ours: `component`,
`job`, `kind`, `run`, `rank` or `shard`, and `step`. The output for people is `console`'s.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray._common.filters import CoreContextFilter
from ray._common.formatters import JSONFormatter

from corun_ray.config.credentials import mask_credentials

LOGGER = logging.getLogger("corun_ray")
FILE_PREFIX = "corun_ray-"
HIDDEN = "***"
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
"""Names of environment variables whose values are secrets."""
MIN_SECRET_LENGTH = 8
"""Shorter values of the environment are words rather than secrets."""


class Log:
    """Writes the events of one part of a job, in a process that is connected to Ray.

    `labels` are those of the job's metrics; `context` is added to every line. Every event of one kind has the same
    `message`; its fields vary.
    """

    def __init__(self, component: str, labels: Mapping[str, str], **context: Any) -> None:
        self._context = {"component": component, **labels, **context}
        # Prometheus keeps the label `job` for itself, so metrics say `job_name`. Log lines say `job`.
        if "job_name" in labels:
            self._context["job"] = self._context.pop("job_name")

        # One handler a process. Without `propagate`, a handler of the root logger would write to the console.
        if not LOGGER.handlers:
            LOGGER.addHandler(_SessionFile())
            LOGGER.setLevel(logging.INFO)
            LOGGER.propagate = False

    def info(self, event: str, **fields: Any) -> None:
        """Write an event of a normal run."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write an event that the run survives."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Write an event that ends this part of the run.

        Within an `except`, the line has the traceback.
        """
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: Mapping[str, Any]) -> None:
        """Write one line, without fields that are None."""
        extra = {}
        for name, value in {**self._context, **fields}.items():
            if value is not None:
                extra[name] = _make_writable(value)

        # `stacklevel` names the caller of `info`, `warning` or `error` as the line's place.
        has_traceback = level >= logging.ERROR and sys.exc_info()[0] is not None
        LOGGER.log(level, event, exc_info=has_traceback, extra=extra, stacklevel=3)


def redact(text: str) -> str:
    """Hide credentials in URIs, and the values of secret environment variables."""
    text = mask_credentials(text)
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and SECRET_NAME.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return text


def _make_writable(value: Any) -> Any:
    """Convert a value for JSON, which has no NaN and no infinity; hide secrets."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def get_log_folder() -> Path:
    """Return the folder of this node's logs in the Ray session."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


class _RedactingFormatter(JSONFormatter):
    """Ray's JSON lines, with redacted tracebacks."""

    def formatException(self, ei: Any) -> str:
        """Format a traceback without secrets."""
        return redact(super().formatException(ei))


class _SessionFile(logging.Handler):
    """Writes to this process's file in the log folder of the current Ray session."""

    def __init__(self) -> None:
        super().__init__()
        self._file: logging.FileHandler | None = None
        self.setFormatter(_RedactingFormatter())
        self.addFilter(CoreContextFilter())

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; open another file if the process has joined another session."""
        try:
            # A process may outlive its session (tests do).
            path = str(get_log_folder() / f"{FILE_PREFIX}{ray.get_runtime_context().get_worker_id()}.log")
            if self._file is None or self._file.baseFilename != path:
                if self._file is not None:
                    self._file.close()
                self._file = logging.FileHandler(path, encoding="utf-8")
                self._file.setFormatter(self.formatter)
            self._file.emit(record)
        except Exception:
            # The custom of `logging`: a log that fails does not fail the program.
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        super().close()
