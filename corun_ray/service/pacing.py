"""Ray Data's scheduler, kept from spinning.

Where the stream is ahead of the training, as it should be, Ray Data's executor (2.60) has nothing to do and looks again
and again whether that has changed, without a pause: half a core, taken from decoding or training. It tells a callback
of every look, and that is where it can be made to wait.
"""

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

LOOK_EVERY_S = 0.05
"""A block of the stream lasts for many steps, so that its end may well be noticed so much later."""


class Pause(ExecutionCallback):
    """Makes a pause in each round of the executor's loop."""

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data."""
        time.sleep(LOOK_EVERY_S)
