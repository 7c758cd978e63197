"""Following a training job from the driver: the board's news, passed on to the console, MLflow and the run's folder.

Steps that stay away: when the person who watches is told, and what the cluster knows of its nodes then.

A worker, a link, the data or the storage may be slow or gone for a while, and a run that waits for them looks like one
that hangs.

The metrics of a run as its driver knows them: the values that go to MLflow, and what went wrong."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.errors import find_root_cause
from corun_ray.service.models.tracking import Tracker
from corun_ray.service.runs.held_out import (
    EXAMPLES,
    HAZY_PICTURE,
    VALIDATION_FILE,
    MeasuredImage,
    ValidationLog,
    name_picture,
)
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.console import Console
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import Metric, MetricRecorder
from corun_ray.service.train.board import Attempt, Events

FIRST_PATIENCE_S = 15.0
PATIENCE_GROWS = 2.0
Clock = Callable[[], float]


class NodeWatch:
    """The cluster's nodes, by what Ray says of them, against those that it had at first."""

    def __init__(self) -> None:
        self._at_first = {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def __call__(self) -> str:
        """How many there are, and which are lost."""
        nodes = ray.nodes()
        alive = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
        dead = (node["NodeManagerAddress"] for node in nodes if not node["Alive"] and node["NodeID"] in self._at_first)
        lost = sorted(address for address in dead if address not in alive)
        text = f"{len(alive)} node{'s' * (len(alive) != 1)} in the cluster"
        return f"{text}, lost: {', '.join(lost)}" if lost else text


class StallDetector:
    """Pauses between two steps. Told of are those twice as long as any before, from `FIRST_PATIENCE_S` on: a job whose
    steps or validations take long says so once. While one lasts, it is told of again when it is twice as long, and
    when there is news of the nodes.
    """

    def __init__(self, nodes: Callable[[], str], clock: Clock = time.monotonic) -> None:
        self._nodes, self._clock = nodes, clock
        self._step, self._since_s = 0, clock()
        self._patience_s = FIRST_PATIENCE_S
        self._next_s = FIRST_PATIENCE_S
        self._told: str | None = None
        """What was said of the nodes last, in this pause."""

    def look(self, step: int) -> str | None:
        """What there is to say now that so many steps are done; before the first one, nothing."""
        paused_s = self._clock() - self._since_s
        if step != self._step:
            text = f"steps go on after {paused_s:.0f} s" if self._told else None
            if self._step:
                self._patience_s = max(self._patience_s, PATIENCE_GROWS * paused_s)
            self._step, self._since_s = step, self._clock()
            self._next_s, self._told = self._patience_s, None
            return text
        is_due = paused_s >= self._next_s
        if step == 0 or not (is_due or self._told):
            return None
        nodes = self._nodes()
        if not is_due and nodes == self._told:
            return None
        if is_due:
            self._next_s = PATIENCE_GROWS * paused_s
        self._told = nodes
        return f"no step for {paused_s:.0f} s after step {step} ({nodes})"


Held = dict[tuple[Metric, tuple[tuple[str, str], ...]], float]
"""Values by metric and labels."""
OF_METRICS = {
    "optim/lr": telemetry.LEARNING_RATE,
    "pool/win_rate": telemetry.WIN_RATIO,
    "pool/trust": telemetry.TRUST_RATIO,
}
"""MLflow's names of metrics that are gauges of their own here."""


class RunTelemetry:
    """Gauges that keep their last value as long as `refresh` is called now and then."""

    def __init__(self, labels: Mapping[str, str], steps: int) -> None:
        self._recorder = MetricRecorder(labels)
        self._held: Held = {}
        self.hold(telemetry.STEPS_PLANNED, steps)
        for metric in (telemetry.RESTARTS, telemetry.FAILED_WRITES):
            self.hold(metric, 0)

    def hold(self, metric: Metric, value: float, /, **labels: str) -> None:
        """The value of a gauge from now on."""
        self._held[metric, tuple(labels.items())] = value

    def hold_metrics(self, metrics: Mapping[str, float]) -> None:
        """Those of metrics under MLflow's names that have gauges."""
        for name, value in metrics.items():
            first, _, last = name.rpartition("/")
            if name in OF_METRICS:
                self.hold(OF_METRICS[name], value)
            elif first == "loss":
                self.hold(telemetry.LOSS, value, term=last)
            elif first == "val" or first.startswith("val/"):
                self.hold(telemetry.VALIDATION, value, set=first, metric=last)

    def refresh(self) -> None:
        """Sets all gauges again."""
        for (metric, labels), value in self._held.items():
            self._recorder.set(metric, value, **dict(labels))


POLL_S = 0.5
Listener = Callable[[int, Mapping[str, float]], None]
"""Hears of metrics after so many steps."""


def _earlier(run: Location) -> ValidationLog:
    """What a run that goes on has measured before."""
    place = run.child(VALIDATION_FILE)
    return ValidationLog.from_csv(place.read()) if place.exists() else ValidationLog()


class Follower:
    """A thread of the driver that carries the board's news to the console, MLflow and the run's folder."""

    def __init__(
        self,
        job: TrainingJob,
        board: Any,
        tracker: Tracker,
        console: Console,
        run: Location,
        listen: Listener | None = None,
    ) -> None:
        self._job, self._board, self._tracker, self._console, self._run = job, board, tracker, console, run
        self._listen = listen
        labels = telemetry.make_job_labels(job, run.name)
        self._log, self._gauges = Log("driver", labels), RunTelemetry(labels, job.train.steps)
        self._num_failed_writes = 0
        self._latest: dict[str, float] = {}
        self.validation = _earlier(run)
        """Every held-out image's values, those of an earlier start of the run included."""
        self._num_attempts = 0
        self._errors = ""
        self._stalls = StallDetector(NodeWatch())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> "Follower":
        self._log.info("training started", steps=self._job.train.steps, workers=self._job.cluster.workers_text)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._stopping.set()
        self._thread.join()
        if error is None:
            self._log.info("training ended")
        else:
            self._log.error("training failed", error=str(error))
        if self._failure is not None and error is None:
            raise self._failure

    def summary(self) -> dict[str, str]:
        """What was last heard, for the footer."""
        facts = {}
        if "pool/labels" in self._latest:
            labels, wins = (int(self._latest[f"pool/{name}"]) for name in ("labels", "wins"))
            facts["pool"] = f"{labels} labels; {wins} candidates won"
        if self._num_attempts > 1:
            facts["restarts"] = str(self._num_attempts - 1)
        validation = {name: value for name, value in self._latest.items() if name.startswith("val/")}
        if validation:
            facts["validated"] = ", ".join(f"{name[4:]} {value:.3f}" for name, value in validation.items())
        return facts

    def _follow(self) -> None:
        try:
            while not self._stopping.wait(POLL_S):
                news = ray.get(self._board.take_events.remote())
                self._pass_on(news)
                self._tell_of_stalls(news.step)
            self._pass_on(ray.get(self._board.take_events.remote()))
        except Exception as error:
            self._failure = error

    def _tell_of_stalls(self, step: int) -> None:
        # After the last step there is still a checkpoint to be written.
        if step < self._job.train.steps and (text := self._stalls.look(step)):
            self._console.say(f"  {text}")

    def _pass_on(self, news: Events) -> None:
        for rank, text in news.errors:
            self._console.say(f"  worker {rank} failed: {find_root_cause(text)}")
            self._log.warning("worker failed", rank=rank, error=find_root_cause(text))
            self._errors += f"worker {rank}, {time.strftime('%H:%M:%S')}\n{text}\n"
            self._keep("errors.log", self._errors.encode())
        for attempt in news.attempts:
            self._begin(attempt)
        for text in news.notes:
            self._console.say(f"  {text}")
            self._log.warning("note", text=text)
        for uri, reason in news.bad_files.items():
            self._log.warning("image set aside", image=uri, reason=reason)
        for step, metrics in news.metrics:
            self._latest |= metrics
            self._gauges.hold_metrics(metrics)
            if values := {name: value for name, value in metrics.items() if name.startswith("val/")}:
                self._log.info("validated", step=step, **values)
            self._tracker.log_metrics(step, metrics)
            if self._listen is not None:
                self._listen(step, metrics)
        for step, measured in news.measured:
            self._keep_measured(step, measured)
        for step, name, png in news.pictures:
            path = f"pictures/{name}_{step:08d}.png"
            self._keep(path, png)
            self._tracker.log_file(path, png)
        if news.saved_step is not None:
            self._gauges.hold(telemetry.CHECKPOINT_STEP, news.saved_step)
        self._gauges.hold(telemetry.BAD_IMAGES, news.num_bad_files)
        if news.step:
            self._gauges.hold(telemetry.STEP, news.step)
            self._console.progress(news.step, self._job.train.steps, "step", self._details(news))
        self._gauges.refresh()

    def _begin(self, attempt: Attempt) -> None:
        """The workers have started, for the first time or again."""
        self._num_attempts += 1
        event = "workers started"
        if self._num_attempts > 1:
            event = "workers restarted"
            self._console.say(f"  workers restarted: going on from step {attempt.first_step} with {attempt.workers}")
        self._log.info(event, step=attempt.first_step, workers=attempt.workers)
        self._gauges.hold(telemetry.RESTARTS, self._num_attempts - 1)
        self._gauges.hold(telemetry.WORKERS, attempt.workers)
        self._gauges.hold(telemetry.CHECKPOINT_STEP, attempt.first_step)

    def _keep_measured(self, step: int, measured: list[MeasuredImage]) -> None:
        self.validation.add(step, measured)
        self._keep(VALIDATION_FILE, self.validation.to_csv())
        for one in measured:
            if one.pictures is not None:
                folder = f"{EXAMPLES}/{one.prefix}/{one.image}"
                self._keep(f"{folder}/{HAZY_PICTURE}", one.pictures.hazy)
                self._keep(f"{folder}/{name_picture(step)}", one.pictures.output)

    def _keep(self, name: str, content: bytes) -> None:
        """Writes a file of the run that people look at; the training does not fail for want of it."""
        try:
            self._run.child(name).write(content)
        except StorageError as error:
            self._console.say(f"  not kept: {error}")
            self._log.warning("not kept", file=name, error=str(error))
            self._num_failed_writes += 1
            self._gauges.hold(telemetry.FAILED_WRITES, self._num_failed_writes)

    def _details(self, news: Events) -> list[str]:
        details = []
        if "loss/total" in self._latest:
            details.append(f"loss {self._latest['loss/total']:.4f}")
        if "val/psnr" in self._latest:
            details.append(f"val {self._latest['val/psnr']:.2f} dB")
        if "pool/labels" in self._latest:
            details.append(f"pool {self._latest['pool/labels']:.0f}, {100 * self._latest['pool/win_rate']:.0f}% new")
        if news.num_bad_files:
            details.append(f"{news.num_bad_files} bad files")
        return details
