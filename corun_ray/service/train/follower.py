"""Follows a training from the driver: passes the board's events on to console, log, MLflow and the run's folder."""

import threading
import time
from collections.abc import Callable, Mapping

import ray
from ray.actor import ActorProxy

from corun_ray.service.cluster.room import RoomWatch, describe_free, find_waiting_workers, free_left_room, read_nodes
from corun_ray.service.errors import JobFailed, describe_error
from corun_ray.service.runs.held_out import (
    EXAMPLES,
    HAZY_PICTURE,
    VALIDATION_FILE,
    MeasuredImage,
    ValidationLog,
    name_picture,
)
from corun_ray.service.runs.lease import RunTaken, refuse_taken
from corun_ray.service.runs.record import RUN_FILE
from corun_ray.service.start_times import StartPhase
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.telemetry import prometheus
from corun_ray.service.telemetry.console import Console
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import Metric, MetricRecorder
from corun_ray.service.train.board import Attempt, BoardState, Events
from corun_ray.service.train.session import Session
from corun_ray.service.train.stopping import TrainingStop

POLL_S = 0.5
FIRST_PATIENCE_S = 15.0
"""The shortest pause between steps that is reported."""
FIRST_STEP_PATIENCE_S = 30.0
"""How long the first step may take after the workers have started: it opens files, and may compile."""
PATIENCE_FACTOR = 2.0
"""A pause is reported when it is this many times as long as the longest before it, or as when last reported."""

ERRORS_FILE = "errors.log"
BAD_FILES = "bad_files.tsv"
SHOWN_BAD_FILES = 10
"""Unusable files that the console names."""
GAUGES = {
    "optim/lr": prometheus.LEARNING_RATE,
    "pool/win_rate": prometheus.WIN_RATIO,
    "pool/trust": prometheus.TRUST_RATIO,
}
"""MLflow's name of a metric → its gauge. Losses and validations have one gauge each, with labels."""

Listener = Callable[[int, Mapping[str, float]], None]
"""Called with a step and the metrics after it."""
Clock = Callable[[], float]
LabelItems = tuple[tuple[str, str], ...]


class Follower:
    """A thread of the driver that passes the board's events on while the workers train.

    Used as a context manager. A failure of the thread ends the training by `stop`: what nobody follows leaves no
    metrics and no errors.
    """

    def __init__(
        self,
        session: Session,
        board: ActorProxy[BoardState],
        console: Console,
        listen: Listener | None,
        stop: TrainingStop,
    ) -> None:
        self._stop = stop
        self._session, self._board = session, board
        self._num_steps = session.job.train.steps

        # The places to which events go.
        self._console, self._listen = console, listen
        self._log = Log("driver", session.labels)
        self._gauges = RunGauges(session.labels, self._num_steps)

        # The content of the files that are written again with each addition.
        self.validation = _read_validation(session.run)
        """Values of every validation image, those of earlier attempts of the run included."""
        self.precision = session.record.precision
        """The arithmetic that the workers last chose, and why; None as long as that is not known."""
        self._errors = ""
        self._has_unsaved_values = False
        self._saved_inputs: set[str] = set()
        """Folders of the examples whose hazy picture is written."""

        # The state that lines and gauges are made of.
        self._latest: dict[str, float] = {}
        self._since_s = time.monotonic()
        self._start: list[StartPhase] = []
        """Phases of the workers' start, until the first step."""
        self._num_attempts = 0
        self._num_failed_writes = 0
        self._num_bad_files = 0
        self._stalls = StallDetector(NodeWatch())
        self._room = RoomWatch()
        self._first_step = FirstStepWatch(lambda: describe_free(("CPU",), read_nodes()))

        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._failure: JobFailed | None = None

    def __enter__(self) -> "Follower":
        job = self._session.job
        self._log.info("training started", steps=job.train.steps, workers=job.cluster.workers_text)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # The thread passes on the last events before it ends.
        self._stopping.set()
        self._thread.join()

        if error is None:
            self._log.info("training ended")
        else:
            self._log.error("training failed", error=str(error))
        if self._failure is not None and error is None:
            raise self._failure

    def summarise(self) -> dict[str, str]:
        """Return the footer's lines on label pool, restarts and validation."""
        facts = {}
        if "pool/labels" in self._latest:
            labels, wins = int(self._latest["pool/labels"]), int(self._latest["pool/wins"])
            facts["pool"] = f"{labels} labels; {wins} candidates won"

        if self._num_attempts > 1:
            facts["restarts"] = str(self._num_attempts - 1)

        validation = select_validation(self._latest)
        if validation:
            values = [f"{name.removeprefix('val/')} {value:.3f}" for name, value in validation.items()]
            facts["validated"] = ", ".join(values)
        return facts

    def _follow(self) -> None:
        """Pass events on until training ends (the thread's function)."""
        try:
            while not self._stopping.wait(POLL_S):
                events = ray.get(self._board.take_events.remote())
                self._pass_on(events)
                self._report_stall(events.step)
                self._report_waiting(events.step)
            self._pass_on(ray.get(self._board.take_events.remote()))
        except BaseException as error:  # SystemExit, too, would end this thread alone, and without a word.
            self._log.error("following failed")
            self._failure = JobFailed(f"the training cannot be followed any more: {describe_error(error)}")
            self._stop.stop(self._failure)
        finally:
            self._save_values()

    def _pass_on(self, events: Events) -> None:
        """Pass all events of one poll on, each kind to its places."""
        # Failures come before the restart that follows from them.
        for rank, cause, traceback in events.errors:
            self._pass_on_error(rank, cause, traceback)
        if events.errors:
            self._save(ERRORS_FILE, self._errors.encode())
        for attempt in events.attempts:
            self._pass_on_attempt(attempt)

        # Notes and bad files: for the log, and notes for the person who watches.
        for text in events.notes:
            self._console.say(f"  {text}")
            self._log.warning("note", text=text)
        for uri, reason in events.bad_files.items():
            self._pass_on_bad_file(uri, reason)

        # Numbers and pictures: for MLflow and the run's folder.
        for step, metrics in events.metrics:
            self._pass_on_metrics(step, metrics)
        for step, measured in events.measured:
            self._save_measured(step, measured)
        for step, name, png in events.pictures:
            path = f"pictures/{name}_{step:08d}.png"
            self._save(path, png)
            self._session.tracker.log_file(path, png)

        # Progress: for Prometheus and the console's live line.
        if events.saved_step is not None:
            self._save_values()
            self._gauges.hold(prometheus.CHECKPOINT_STEP, events.saved_step)
        self._gauges.hold(prometheus.BAD_IMAGES, events.num_bad_files)
        self._start += events.start
        if events.step:
            self._console.show_start(self._start)
            self._gauges.hold(prometheus.STEP, events.step)
            details = self._list_details(events.num_bad_files)
            self._console.progress(events.step, self._num_steps, "step", details)
        else:
            waited_s = time.monotonic() - self._since_s
            self._console.wait(f"step 0/{self._num_steps}  the workers start: {waited_s:.0f} s", self._num_steps)
        self._gauges.refresh()

    def _pass_on_error(self, rank: int, cause: str, traceback: str) -> None:
        """Report the cause, and note the traceback for the run's file."""
        self._console.say(f"  worker {rank} failed: {cause}")
        self._log.warning("worker failed", rank=rank, error=cause)

        self._errors += f"worker {rank}, {time.strftime('%H:%M:%S')}\n{traceback}\n"

    def _pass_on_bad_file(self, uri: str, reason: str) -> None:
        """Report a file that is skipped; the console shows the first ones."""
        self._log.warning("image set aside", image=uri, reason=reason)

        self._num_bad_files += 1
        if self._num_bad_files <= SHOWN_BAD_FILES:
            self._console.say(f"  skipped: {uri}: {reason}")
        elif self._num_bad_files == SHOWN_BAD_FILES + 1:
            self._console.say(f"  more files are skipped; all are listed in {BAD_FILES} at the end")

    def _pass_on_attempt(self, attempt: Attempt) -> None:
        """Report a start of the workers; the console shows restarts alone."""
        self._num_attempts += 1
        event = "workers started"
        if self._num_attempts > 1:
            event = "workers restarted"
            self._console.say(f"  workers restarted: resuming from step {attempt.first_step} with {attempt.workers}")
        self._log.info(event, step=attempt.first_step, workers=attempt.workers, precision=attempt.precision)
        self._pass_on_precision(attempt.precision)

        self._gauges.hold(prometheus.RESTARTS, self._num_attempts - 1)
        self._gauges.hold(prometheus.WORKERS, attempt.workers)
        self._gauges.hold(prometheus.CHECKPOINT_STEP, attempt.first_step)

    def _pass_on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Pass metrics on to Prometheus, the log, MLflow and the listener."""
        self._latest |= metrics
        self._gauges.hold_metrics(metrics)

        validation = select_validation(metrics)
        if validation:
            self._log.info("validated", step=step, **validation)

        self._session.tracker.log_metrics(step, metrics)
        if self._listen is not None:
            self._listen(step, metrics)

    def _pass_on_precision(self, precision: str) -> None:
        """Report the precision that the workers have chosen, and note it with the run, where it is news."""
        line = describe_precision(precision, self._session.job.optim.precision, self.precision, self._num_attempts == 1)
        if line is not None:
            self._console.say(f"  {line}")
        if precision == self.precision:
            return

        self.precision = precision
        self._save(RUN_FILE, self._session.record.model_copy(update={"precision": precision}).encode())
        self._session.tracker.set_tags({"corun_ray.precision": precision})

    def _save_measured(self, step: int, measured: list[MeasuredImage]) -> None:
        """Note values of validation images, and save their pictures."""
        self.validation.add(step, measured)
        self._has_unsaved_values = True

        for one in measured:
            if one.pictures is not None:
                folder = f"{EXAMPLES}/{one.prefix}/{one.image}"
                self._save(f"{folder}/{name_picture(step)}", one.pictures.output)

                # The input is the same at every validation.
                if folder not in self._saved_inputs:
                    self._save(f"{folder}/{HAZY_PICTURE}", one.pictures.hazy)
                    self._saved_inputs.add(folder)

    def _save_values(self) -> None:
        """Write the values of all validations, with a checkpoint and at the end.

        The file grows with every validation, and a bucket with versioning keeps each of its versions. A run resumes
        from its last checkpoint, and repeats the validations after it.
        """
        if self._has_unsaved_values:
            self._save(VALIDATION_FILE, self.validation.to_csv())
            self._has_unsaved_values = False

    def _save(self, name: str, content: bytes) -> None:
        """Write a file to the run's folder, or report the failed write.

        The file is for people: the training does not end for lack of it. A run that another driver has taken is left
        as it is.
        """
        try:
            refuse_taken(self._session.lease.place)
            self._session.run.child(name).write(content)
        except RunTaken:
            return
        except StorageError as error:
            self._console.say(f"  not saved: {error}")
            self._log.warning("not kept", file=name, error=str(error))
            self._num_failed_writes += 1
            self._gauges.hold(prometheus.FAILED_WRITES, self._num_failed_writes)

    def _report_stall(self, step: int) -> None:
        """Report that steps have stopped, or that they continue."""
        # After the last step the workers still write a checkpoint: no stall.
        if step >= self._num_steps:
            return
        text = self._stalls.update(step)
        if text is not None:
            self._console.say(f"  {text}")

    def _report_waiting(self, step: int) -> None:
        """Report that the workers wait for room on the cluster, or for their first batch."""
        # In a search, the controller of a trial that was stopped has left its room.
        free_left_room()
        for text in (self._room.update(find_waiting_workers()), self._first_step.update(step, self._num_attempts)):
            if text is not None:
                self._console.say(f"  {text}")

    def _list_details(self, num_bad_files: int) -> list[str]:
        """List the details of the live line."""
        latest, details = self._latest, []
        if "loss/total" in latest:
            details.append(f"loss {latest['loss/total']:.4f}")
        if "val/psnr" in latest:
            details.append(f"val {latest['val/psnr']:.2f} dB")
        if "pool/labels" in latest:
            details.append(f"pool {latest['pool/labels']:.0f}, {100 * latest['pool/win_rate']:.0f}% new")
        if num_bad_files:
            details.append(f"{num_bad_files} bad files")
        return details


def describe_precision(chosen: str, asked: str, before: str | None, is_first: bool) -> str | None:
    """Return the line on the workers' precision, such as `precision bf16 (auto: AVX512-BF16)`.

    `before` is what the run had before this start of the workers, if known; `is_first` tells whether this driver has
    not shown one yet. None where there is nothing to tell: the header has what was asked for.
    """
    if chosen == asked or (chosen == before and not is_first):
        return None
    changed = before is not None and before.split()[0] != chosen.split()[0]
    return f"precision {chosen}; so far {before}" if changed else f"precision {chosen}"


def select_validation(metrics: Mapping[str, float]) -> dict[str, float]:
    """Select the metrics of validation sets."""
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def _read_validation(run: Location) -> ValidationLog:
    """Read the values that earlier attempts of the run have measured."""
    place = run.child(VALIDATION_FILE)
    return ValidationLog.from_csv(place.read()) if place.exists() else ValidationLog()


# --- Gauges of the run ---


class RunGauges:
    """Gauges that keep their last value; `refresh` must be called every few seconds (see `prometheus`)."""

    def __init__(self, labels: Mapping[str, str], num_steps: int) -> None:
        self._recorder = MetricRecorder(labels)
        self._held: dict[tuple[Metric, LabelItems], float] = {}
        self.hold(prometheus.STEPS_PLANNED, num_steps)
        self.hold(prometheus.RESTARTS, 0)
        self.hold(prometheus.FAILED_WRITES, 0)

    def hold(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Set the value of a gauge from the next `refresh` on."""
        self._held[metric, tuple(labels.items())] = value

    def hold_metrics(self, metrics: Mapping[str, float]) -> None:
        """Hold the metrics (under MLflow's names) that have gauges."""
        for name, value in metrics.items():
            group, _, last = name.rpartition("/")
            if name in GAUGES:
                self.hold(GAUGES[name], value)
            elif group == "loss":
                self.hold(prometheus.LOSS, value, term=last)
            elif group == "val" or group.startswith("val/"):
                self.hold(prometheus.VALIDATION, value, set=group, metric=last)

    def refresh(self) -> None:
        """Set all gauges again."""
        for (metric, labels), value in self._held.items():
            self._recorder.set(metric, value, **dict(labels))


# --- Stalls ---


class NodeWatch:
    """Compares the cluster's live nodes with those at the start."""

    def __init__(self) -> None:
        self._first_ids = {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def __call__(self) -> str:
        """Describe the cluster: `3 nodes in the cluster, lost: 10.0.0.2`."""
        alive, dead = [], []
        for node in ray.nodes():
            if node["Alive"]:
                alive.append(node["NodeManagerAddress"])
            elif node["NodeID"] in self._first_ids:
                dead.append(node["NodeManagerAddress"])

        # A node that was started again has another id and the same address.
        lost = sorted(address for address in dead if address not in alive)
        nodes = "1 node" if len(alive) == 1 else f"{len(alive)} nodes"
        text = f"{nodes} in the cluster"
        return f"{text}, lost: {', '.join(lost)}" if lost else text


class FirstStepWatch:
    """Reports that the first step is long in coming: images may be slow, or no CPU free to decode them."""

    def __init__(self, describe_free: Callable[[], str], clock: Clock = time.monotonic) -> None:
        self._describe_free, self._clock = describe_free, clock
        self._since_s: float | None = None
        """When the workers started; None: they have not, as far as is known."""
        self._next_report_s = FIRST_STEP_PATIENCE_S

    def update(self, step: int, num_attempts: int) -> str | None:
        """Return the line to show now that `step` steps are done and the workers have started so often, if any."""
        if step or not num_attempts:
            return None
        if self._since_s is None:
            self._since_s = self._clock()

        waited_s = self._clock() - self._since_s
        if waited_s < self._next_report_s:
            return None
        self._next_report_s = PATIENCE_FACTOR * waited_s
        return f"no step yet, {waited_s:.0f} s after the workers started ({self._describe_free()})"


class StallDetector:
    """Reports pauses between steps: a worker, a link, the data or the storage may be slow or gone for a while.

    A pause is reported once it is twice as long as every pause before it, and at least `FIRST_PATIENCE_S` long. So a
    job whose steps or validations take long is reported only once. A pause that lasts is reported again whenever its
    length has doubled, and when the nodes have changed.
    """

    def __init__(self, describe_nodes: Callable[[], str], clock: Clock = time.monotonic) -> None:
        self._describe_nodes, self._clock = describe_nodes, clock
        self._step, self._since_s = 0, clock()
        self._patience_s = FIRST_PATIENCE_S
        """The length from which a pause is reported."""
        self._next_report_s = FIRST_PATIENCE_S
        """The length of this pause at its next report."""
        self._reported_nodes: str | None = None
        """The nodes in this pause's last report; None before the first."""

    def update(self, step: int) -> str | None:
        """Return the line to show now that `step` steps are done, if any.

        Nothing is reported before the first step.
        """
        paused_s = self._clock() - self._since_s
        if step != self._step:
            return self._end_pause(step, paused_s)
        if step == 0:
            return None

        # A report is due by time, or, once the pause has been reported, by a change of the nodes.
        is_due = paused_s >= self._next_report_s
        if not is_due and self._reported_nodes is None:
            return None
        nodes = self._describe_nodes()
        if not is_due and nodes == self._reported_nodes:
            return None

        if is_due:
            self._next_report_s = PATIENCE_FACTOR * paused_s
        self._reported_nodes = nodes
        return f"no step for {paused_s:.0f} s after step {step} ({nodes})"

    def _end_pause(self, step: int, paused_s: float) -> str | None:
        """Start a new pause; return a line if the last one was reported."""
        text = None if self._reported_nodes is None else f"steps continue after {paused_s:.0f} s"

        # The wait for the first step is no pause: starting takes longer than any step.
        if self._step:
            self._patience_s = max(self._patience_s, PATIENCE_FACTOR * paused_s)
        self._step, self._since_s = step, self._clock()
        self._next_report_s, self._reported_nodes = self._patience_s, None
        return text
