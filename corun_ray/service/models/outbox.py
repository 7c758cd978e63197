"""What is on its way to MLflow: sent by a thread, and kept in the run's folder while MLflow does not take it."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from corun_ray.service.models.mlflow_errors import explain_error, is_passing
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.waiting import FIRST_WORD_S, WORD_EVERY_S, Say

UNSENT_FOLDER = "mlflow_unsent"
"""The folder of a run that keeps what MLflow has not taken: JSON lines, in parts."""
RETRY_EVERY_S = 15.0
HURRIED_RETRY_S = 3.0
"""Between two tries while somebody waits for them."""
SAVE_EVERY_S = 10.0
MAX_METRICS_A_CALL = 500
"""MLflow takes up to 1000 metrics in one request."""
CLOSING_S = 5.0
"""How long the end of a run waits for a request under way."""


@dataclass(frozen=True)
class Entry:
    """One thing to log: metrics of a step, tags, or a file of the run's folder."""

    time_ms: int
    step: int = 0
    metrics: dict[str, float] | None = None
    tags: dict[str, str] | None = None
    file: str | None = None
    content: bytes | None = None
    """Of the file; None: it is read from the run's folder."""

    def to_json(self) -> str:
        """Return a line of text without the file's content."""
        return json.dumps(asdict(replace(self, content=None)))


Send = Callable[[Sequence[Entry]], None]
"""Sends entries to MLflow, or raises."""


class Outbox:
    """Entries in their order, and the thread that sends them. Its methods never raise for MLflow's sake."""

    def __init__(self, uri: str, run: Location | None, send: Send, say: Say) -> None:
        """Begin to send. `run` is the run's folder; without one, entries are kept in memory alone."""
        self._uri, self._run, self._send, self._say = uri, run, send, say
        self._entries: list[Entry] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._num_waiting, self._is_given_up = 0, False

        # The state of a failure that lasts.
        self._failure: Exception | None = None
        self._told: str | None = None
        """The last reason that a person was told."""
        self._num_saved, self._num_parts = 0, 0
        """Entries that are in the folder, and the files that hold them."""
        self._saved_s = -SAVE_EVERY_S

        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    # --- For the run ---

    def put(self, entry: Entry) -> None:
        """Add an entry, from any thread."""
        with self._changed:
            self._entries.append(entry)
            self._changed.notify_all()

    def load(self) -> int:
        """Take in what an earlier start of the run has kept; return the number of entries.

        Raises `StorageError`.
        """
        if self._run is None:
            return 0
        folder = self._run.child(UNSENT_FOLDER)
        names = sorted(folder.list_files()) if folder.is_folder() else []
        kept = []
        for name in names:
            kept += [Entry(**json.loads(line)) for line in folder.child(name).read().decode().splitlines()]

        with self._changed:
            self._entries = kept + self._entries
            self._num_saved, self._num_parts = len(kept), len(names)
            self._changed.notify_all()
        return len(kept)

    def wait(self, patience_s: float) -> bool:
        """Wait until all is sent; return whether it is.

        A person is told. Only where MLflow is away there is something to wait for: a refusal ends the wait. After a
        wait in vain, the next ones are short.
        """
        started_s = time.monotonic()
        patience_s = min(patience_s, FIRST_WORD_S) if self._is_given_up else patience_s
        due_s = FIRST_WORD_S
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                while self._entries and self._is_worth_waiting() and time.monotonic() - started_s < patience_s:
                    self._changed.wait(min(1.0, patience_s))
                    if due_s <= time.monotonic() - started_s < patience_s:
                        self._say(f"  waiting for MLflow at {self._uri}: {due_s:.0f} s of at most {patience_s:.0f} s")
                        due_s = due_s + WORD_EVERY_S if due_s > FIRST_WORD_S else WORD_EVERY_S
                self._is_given_up = bool(self._entries)
                return not self._entries
            finally:
                self._num_waiting -= 1

    def close(self) -> None:
        """End the thread; what is left is kept in the run's folder."""
        started_s = time.monotonic()
        with self._changed:
            while self._entries and self._failure is None and time.monotonic() - started_s < CLOSING_S:
                self._changed.wait(0.1)
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(CLOSING_S)
        self._save()

    def abandon(self) -> None:
        """End the thread, and leave the run's folder as it is from now on, also at the end of a request under way."""
        with self._changed:
            self._run, self._is_closing = None, True
            self._changed.notify_all()

    def describe(self) -> str:
        """Describe what MLflow lacks: `12 metrics, 3 files`; nothing where it has all."""
        with self._changed:
            return _count(self._entries)

    @property
    def failure(self) -> str | None:
        """Why MLflow does not take the entries, None while it does."""
        return None if self._failure is None else explain_error(self._failure, self._uri)

    def _is_worth_waiting(self) -> bool:
        """Tell whether MLflow may take the entries soon."""
        return self._failure is None or is_passing(self._failure)

    # --- The thread ---

    def _work(self) -> None:
        """Send entries until the outbox is closed (the thread's function)."""
        while True:
            with self._changed:
                while not self._entries and not self._is_closing:
                    self._changed.wait()
                if self._is_closing:
                    return
                batch = _take_batch(self._entries)

            try:
                self._send(batch)
            except Exception as error:
                self._note_failure(error)
                self._rest()
            else:
                self._remove(len(batch))

    def _rest(self) -> None:
        """Wait for the next try; keep what has come on disk meanwhile."""
        started_s = time.monotonic()
        while True:
            self._save_now_and_then()
            with self._changed:
                pause_s = HURRIED_RETRY_S if self._num_waiting else RETRY_EVERY_S
                left_s = started_s + pause_s - time.monotonic()
                if left_s <= 0 or self._is_closing:
                    return
                self._changed.wait(min(left_s, 1.0))

    def _note_failure(self, error: Exception) -> None:
        """Tell a person the reason, once for each."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        reason = explain_error(error, self._uri)
        if reason != self._told:
            self._told = reason
            run = self._run
            where = "" if run is None else f" in {run.child(UNSENT_FOLDER).uri}"
            self._say(f"  MLflow at {self._uri} takes nothing now: {reason}; it is kept{where} and sent later")

    def _remove(self, count: int) -> None:
        """Forget entries that were sent."""
        with self._changed:
            sent, self._entries = self._entries[:count], self._entries[count:]
            self._num_saved = max(0, self._num_saved - len(sent))
            was_failing, self._failure, self._told = self._failure is not None, None, None
            num_left = len(self._entries)
            self._changed.notify_all()

        if was_failing:
            self._say(f"  MLflow at {self._uri} answers again: what was kept is sent")
        run = self._run
        if not num_left and self._num_parts and run is not None:
            self._try_storage(run.child(UNSENT_FOLDER).delete)
            self._num_saved, self._num_parts = 0, 0

    def _save_now_and_then(self) -> None:
        """Save what is not in the folder yet, unless that was done just now."""
        if time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            self._save()
            self._saved_s = time.monotonic()

    def _save(self) -> None:
        """Write the entries that are not in the run's folder yet as one more part."""
        with self._changed:
            fresh, run = self._entries[self._num_saved :], self._run
        if run is None or not fresh:
            return

        text = "".join(f"{entry.to_json()}\n" for entry in fresh)
        place = run.child(UNSENT_FOLDER).child(f"{self._num_parts + 1:06d}.jsonl")
        if not self._try_storage(lambda: place.write(text.encode())):
            return
        with self._changed:
            # Files are read from the run's folder when they are sent: memory need not hold them.
            first = self._num_saved
            self._entries[first : first + len(fresh)] = [replace(entry, content=None) for entry in fresh]
            self._num_saved, self._num_parts = first + len(fresh), self._num_parts + 1

    def _try_storage(self, action: Callable[[], None]) -> bool:
        """Do something in the run's folder; tell a person where it fails."""
        try:
            action()
        except StorageError as error:
            self._say(f"  what MLflow lacks is in memory alone: {error}")
            return False
        return True


def _take_batch(entries: Sequence[Entry]) -> list[Entry]:
    """Take the first entries that one request can carry: metrics of several steps, or one other entry."""
    batch, num_metrics = [entries[0]], len(entries[0].metrics or ())
    if entries[0].metrics is None:
        return batch
    for entry in entries[1:]:
        num_metrics += len(entry.metrics or ())
        if entry.metrics is None or num_metrics > MAX_METRICS_A_CALL:
            break
        batch.append(entry)
    return batch


def _count(entries: Sequence[Entry]) -> str:
    """Count entries by kind."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts["metric"] += len(entry.metrics or ())
        counts["tag"] += len(entry.tags or ())
        counts["file"] += entry.file is not None
    return ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count)
