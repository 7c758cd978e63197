"""A local Ray without the processes that serve a cluster alone.

Each of these takes half a second to a second of a processor, and `ray.init` waits for some. It has no option for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import ray._private.node
from ray._private.node import Node


class LocalNode(Node):
    """A head node without autoscaler, web server and collector of log lines."""

    def start_monitor(self) -> None:
        """Start no autoscaler: a local Ray stays one node."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Start no web server. Without a dashboard, Ray's own would only send usage statistics."""
        self._webui_url = ""

    def start_log_monitor(self) -> None:
        """Start no collector, which sends lines of the workers' logs to drivers that ask for them; ours does not."""


@contextmanager
def starting_few_processes() -> Iterator[None]:
    """Have `ray.init` start a `LocalNode` within the context."""
    ray._private.node.Node = LocalNode  # type: ignore[misc]
    try:
        yield
    finally:
        ray._private.node.Node = Node  # type: ignore[misc]
