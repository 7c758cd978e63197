"""Log lines for machines: one JSON object a line, beside Ray's own logs on every node, a file a process.

Ray's formatter and its context (`job_id`, `node_id`, `worker_id`, `actor_id` ...) with ours: `component`, `job`,
`kind`, `run`, `rank` or `shard`, and `step`. What a person sees on the console is `console`'s.
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

from corun_ray.config.credentials import without_credentials

LOGGER = logging.getLogger("corun_ray")
FILE_PREFIX = "corun_ray-"
HIDDEN = "***"
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
MIN_SECRET_LENGTH = 8
"""Shorter values of the environment are words rather than secrets."""


def redact(text: str) -> str:
    """The text without credentials in URIs, and without any value of the environment whose name says secret."""
    text = without_credentials(text)
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return text


class _Lines(JSONFormatter):
    def formatException(self, ei: Any) -> str:
        return redact(super().formatException(ei))


class _SessionFile(logging.Handler):
    """Writes to this process's file in the log folder of the Ray session that it belongs to at the time."""

    def __init__(self) -> None:
        super().__init__()
        self._file: logging.FileHandler | None = None
        self.setFormatter(_Lines())
        self.addFilter(CoreContextFilter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            path = str(log_folder() / f"{FILE_PREFIX}{ray.get_runtime_context().get_worker_id()}.log")
            if self._file is None or self._file.baseFilename != path:
                if self._file is not None:
                    self._file.close()
                self._file = logging.FileHandler(path, encoding="utf-8")
                self._file.setFormatter(self.formatter)
            self._file.emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def log_folder() -> Path:
    """The folder of this node's logs in the Ray session that this process is part of."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


class Log:
    """The events of one part of a job, in a process that is connected to Ray.

    `labels` are those of the job's metrics; `context` is written with every line. A line's `message` is always the
    same for the same kind of event; what varies are its fields.
    """

    def __init__(self, component: str, labels: Mapping[str, str], **context: Any) -> None:
        named = {"job" if name == "job_name" else name: value for name, value in labels.items()}
        self._context = {"component": component, **named, **context}
        if not LOGGER.handlers:
            LOGGER.addHandler(_SessionFile())
            LOGGER.setLevel(logging.INFO)
            LOGGER.propagate = False  # or what others have hung on the root logger would put it on the console

    def info(self, event: str, **fields: Any) -> None:
        """Something that belongs to a good run."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something that a run gets over."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something that ends this part of the run; within an `except`, with its traceback."""
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: Mapping[str, Any]) -> None:
        extra = {name: _plain(value) for name, value in {**self._context, **fields}.items() if value is not None}
        is_raised = level >= logging.ERROR and sys.exc_info()[0] is not None
        LOGGER.log(level, event, exc_info=is_raised, extra=extra, stacklevel=3)


def _plain(value: Any) -> Any:
    """A value as a line may have it: JSON has no NaN and no infinity, and secrets stay out."""
    if isinstance(value, str):
        return redact(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
