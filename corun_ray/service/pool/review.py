"""Decisions of people about labels: kept or rejected, in the folder `review/` of a saved pool.

Every reviewing process writes a file of its own there, so that no two reviewers overwrite each other. Of several
decisions about the label of an image, the latest is right. A decision names scores and step of the label that was
looked at: a newer label of the same image is undecided. Rejected labels leave the pool when it is restored.
"""

import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime

from corun_ray.core.training.labels import Scores
from corun_ray.service.pool.index import Head, Rejections
from corun_ray.service.pool.snapshots import CheckedModel, Number, Score, read_model
from corun_ray.service.pool.source import list_entries
from corun_ray.service.storage import Location

REVIEW_FOLDER = "review"
FILE_SUFFIX = ".json"
TICK = timedelta(microseconds=1)
"""Between a decision and the one that it replaces, where the clock of another machine is ahead."""

Choice = Literal["keep", "reject", "undecided"]


class Decision(CheckedModel):
    """What a person decided about one label, and when. `undecided` takes an earlier decision back."""

    key: str
    clarity: Score
    quality: Score
    step: Number
    choice: Choice
    time: AwareDatetime

    def is_about(self, head: Head) -> bool:
        """Tell whether this very label was decided about."""
        return (self.key, self.clarity, self.quality, self.step) == (head.key, *head.scores, head.step)


class ReviewFile(CheckedModel):
    """The content of one reviewing process's file."""

    format: Literal[1] = 1
    decisions: tuple[Decision, ...]


def read_decisions(pool: Location) -> dict[str, Decision]:
    """Read the latest decision about each image's label, by key.

    Raises `StorageError`.
    """
    folder = pool.child(REVIEW_FOLDER)
    latest: dict[str, Decision] = {}
    for info in list_entries(folder):
        # Files that a killed writer left begin with a dot.
        if info.base_name.startswith(".") or not info.base_name.endswith(FILE_SUFFIX):
            continue

        file: ReviewFile = read_model(folder.child(info.base_name), ReviewFile, "review of a label pool")
        for decision in file.decisions:
            known = latest.get(decision.key)
            if known is None or decision.time > known.time:
                latest[decision.key] = decision
    return latest


def find_rejections(decisions: Mapping[str, Decision]) -> Rejections:
    """Find the rejected labels among decisions."""
    rejections = {}
    for key, decision in decisions.items():
        if decision.choice == "reject":
            rejections[key] = Scores(decision.clarity, decision.quality)
    return rejections


class Review:
    """The decisions of one reviewing process, beside those of all others. Threads may share it."""

    def __init__(self, pool: Location) -> None:
        """Read the decisions made so far.

        Raises `StorageError`.
        """
        self._pool = pool
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}Z-{uuid.uuid4().hex[:8]}{FILE_SUFFIX}"
        self.place = pool.child(REVIEW_FOLDER).child(name)
        """The file of this process; it appears with the first decision."""
        self._lock = threading.Lock()
        self._own: dict[str, Decision] = {}
        self._latest = read_decisions(pool)

    def refresh(self) -> None:
        """Read what other reviewers have decided meanwhile.

        Raises `StorageError`.
        """
        with self._lock:
            self._latest = read_decisions(self._pool)

    def get_choice(self, head: Head) -> Choice:
        """Return what was decided about a label."""
        decision = self._latest.get(head.key)
        return decision.choice if decision is not None and decision.is_about(head) else "undecided"

    def decide(self, head: Head, choice: Choice) -> None:
        """Save a decision about a label at once.

        Raises `StorageError`; the decision then counts as not made.
        """
        with self._lock:
            # It must be later than what it replaces, also by a clock that is behind.
            now, known = datetime.now(UTC), self._latest.get(head.key)
            if known is not None and known.time >= now:
                now = known.time + TICK

            decision = Decision(key=head.key, **head.scores._asdict(), step=head.step, choice=choice, time=now)
            own = {**self._own, head.key: decision}
            content = ReviewFile(decisions=tuple(own.values()))
            self.place.write(content.model_dump_json(indent=1).encode())
            self._own, self._latest[head.key] = own, decision
