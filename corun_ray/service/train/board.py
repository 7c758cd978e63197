"""The run's notice board: an actor by which workers and decoding tasks report to the driver.

Workers post progress, metrics and pictures, which only the driver sends to MLflow and to the terminal. Decoding tasks
add to the list of unusable files.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorProxy

from corun_ray.service.start_times import StartPhase

if TYPE_CHECKING:  # Importing it at run time would triple the start-up time of the board's process.
    from corun_ray.service.runs.held_out import MeasuredImage


@dataclass
class Attempt:
    """One start of the worker group: the first, or one after a failure."""

    first_step: int
    first_sample: int
    """Position in the run's sample stream where the attempt begins, counted per kind of image."""
    workers: int
    precision: str
    """The arithmetic of the workers, and why, such as `bf16 (auto: AVX512-BF16)`."""


@dataclass
class Events:
    """Everything posted since the last call of `take_events`."""

    step: int = 0
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Step, and values by metric."""
    pictures: list[tuple[int, str, bytes]] = field(default_factory=list)
    """Step, name and PNG."""
    measured: "list[tuple[int, list[MeasuredImage]]]" = field(default_factory=list)
    """Step, and the validation images that one rank measured."""
    errors: list[tuple[int, str, str]] = field(default_factory=list)
    """Rank, cause on one line and traceback of each worker that raised. A worker that was killed posts nothing."""
    notes: list[str] = field(default_factory=list)
    """Lines for the console."""
    attempts: list[Attempt] = field(default_factory=list)
    saved_step: int | None = None
    """Step of the last checkpoint that was written."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Path → reason of newly skipped files."""
    num_bad_files: int = 0
    """Number of all files skipped so far."""
    start: list[StartPhase] = field(default_factory=list)
    """Phases of the start of controller and workers."""


class BoardState:
    """The code of the board actor. `ray.method` gives each method's `.remote` its types."""

    def __init__(self) -> None:
        self._bad_files: dict[str, str] = {}
        self._events = Events()

    @ray.method
    def report_bad(self, bad_files: dict[str, str]) -> None:
        """Add unusable files (path → reason); the first reason of a path stays."""
        for path, reason in bad_files.items():
            if path not in self._bad_files:
                self._bad_files[path] = self._events.bad_files[path] = reason

    @ray.method
    def count_bad_files(self) -> int:
        """Return the number of files skipped so far."""
        return len(self._bad_files)

    @ray.method
    def list_bad_files(self) -> dict[str, str]:
        """Return path → reason of every skipped file."""
        return self._bad_files

    @ray.method
    def post_step(self, step: int) -> None:
        """Post the number of optimizer steps done."""
        self._events.step = step

    @ray.method
    def post_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Post metrics after `step` steps."""
        self._events.metrics.append((step, metrics))

    @ray.method
    def post_picture(self, step: int, name: str, png: bytes) -> None:
        """Post a picture made after `step` steps."""
        self._events.pictures.append((step, name, png))

    @ray.method
    def post_measured(self, step: int, measured: "list[MeasuredImage]") -> None:
        """Post validation images measured after `step` steps."""
        self._events.measured.append((step, measured))

    @ray.method
    def post_attempt(self, attempt: Attempt) -> None:
        """Post a start of the worker group."""
        self._events.attempts.append(attempt)

    @ray.method
    def post_saved(self, step: int) -> None:
        """Post that the checkpoint of `step` has been written."""
        self._events.saved_step = step

    @ray.method
    def post_error(self, rank: int, cause: str, traceback: str) -> None:
        """Post the cause and the traceback of a worker that is about to fail."""
        self._events.errors.append((rank, cause, traceback))

    @ray.method
    def post_note(self, text: str) -> None:
        """Post a line for the console."""
        self._events.notes.append(text)

    @ray.method
    def post_start(self, phases: list[StartPhase]) -> None:
        """Post phases of the start."""
        self._events.start += phases

    @ray.method
    def take_events(self) -> Events:
        """Return everything posted since the last call; the step is carried over."""
        events, self._events = self._events, Events(step=self._events.step)
        events.num_bad_files = len(self._bad_files)
        return events


def start_board() -> ActorProxy[BoardState]:
    """Start the board on the driver's node.

    The actor lives as long as the driver holds the handle.
    """
    driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=driver_node)(BoardState).remote()
