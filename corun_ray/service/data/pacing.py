"""Ray Data's scheduler, kept from spinning.

Where the stream is ahead of the training, as it should be, Ray Data's executor (2.60) has nothing to do and looks again
and again whether that has changed, without a pause: a whole core, taken from decoding or training. While tasks run it
does wait for them. It tells a callback of every look, and that is where it can be made to wait in the other case, too.
"""

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

QUICK_S = 0.01
"""A look that took less did not wait for anything."""
QUICK_LOOKS = 20
"""So many in a row are not those in which the end of a task is dealt with and another begun."""
PAUSE_S = 0.05


class Pause(ExecutionCallback):
    """Makes a pause after each look while the executor does not wait by itself."""

    def __init__(self) -> None:
        self._quick_looks = 0
        self._since_s = time.monotonic()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data."""
        was_quick = time.monotonic() - self._since_s < QUICK_S
        self._quick_looks = self._quick_looks + 1 if was_quick else 0
        if self._quick_looks > QUICK_LOOKS:
            time.sleep(PAUSE_S)
        self._since_s = time.monotonic()
