"""The run's notice board: what workers and decoding tasks tell the driver, in one small actor.

It carries progress, metrics and pictures to the driver (which alone talks to MLflow and to the terminal), and the
list of unusable files, which every decoding task adds to.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:  # it brings torch, which would triple the time that the board's process takes to start
    from corun_ray.service.runs.held_out import Measured


@dataclass
class Attempt:
    """One start of the worker group: at the beginning, and after every failure."""

    first_step: int
    first_sample: int
    """The position in the run's stream at which it began, counted per kind of image."""
    workers: int


@dataclass
class Events:
    """What has come since the last look."""

    step: int = 0
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pictures: list[tuple[int, str, bytes]] = field(default_factory=list)
    """Step, name and PNG."""
    measured: "list[tuple[int, list[Measured]]]" = field(default_factory=list)
    """Step, and some of its held-out images: each rank tells of its own."""
    errors: list[tuple[int, str]] = field(default_factory=list)
    """Rank and traceback of workers that raised; one that was killed says nothing."""
    notes: list[str] = field(default_factory=list)
    """Lines for the console."""
    attempts: list[Attempt] = field(default_factory=list)
    saved_step: int | None = None
    """The step of the last checkpoint that was written."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Path → reason of files that were set aside."""
    num_bad_files: int = 0
    """How many that makes in all."""


class BoardState:
    """The board's content, without the actor around it."""

    def __init__(self) -> None:
        self.bad_files: dict[str, str] = {}
        self._news = Events()

    def report_bad(self, bad_files: dict[str, str]) -> None:
        """Adds unusable files (path → reason); one named before stays as it was."""
        new = {path: reason for path, reason in bad_files.items() if path not in self.bad_files}
        self.bad_files |= new
        self._news.bad_files |= new

    def num_bad_files(self) -> int:
        """How many files have been set aside so far."""
        return len(self.bad_files)

    def all_bad_files(self) -> dict[str, str]:
        """Path → reason of every file set aside."""
        return self.bad_files

    def post_step(self, step: int) -> None:
        """The number of steps done."""
        self._news.step = step

    def post_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `step` steps."""
        self._news.metrics.append((step, metrics))

    def post_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture made after `step` steps."""
        self._news.pictures.append((step, name, png))

    def post_measured(self, step: int, measured: "list[Measured]") -> None:
        """Held-out images, measured after `step` steps."""
        self._news.measured.append((step, measured))

    def post_attempt(self, attempt: Attempt) -> None:
        """The worker group has started."""
        self._news.attempts.append(attempt)

    def post_saved(self, step: int) -> None:
        """A checkpoint of `step` has been written."""
        self._news.saved_step = step

    def post_error(self, rank: int, traceback: str) -> None:
        """A worker is about to fail."""
        self._news.errors.append((rank, traceback))

    def post_note(self, text: str) -> None:
        """Something that a person who watches should know."""
        self._news.notes.append(text)

    def take_news(self) -> Events:
        """What has come since the last call."""
        news, self._news = self._news, Events(step=self._news.step)
        news.num_bad_files = len(self.bad_files)
        return news


def start_board() -> Any:
    """The board as an actor on the driver's node, alive as long as the driver holds the handle."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(BoardState).remote()
