"""The job of kind `tune`: Ray Tune over keys of a Colabator job. Each trial is a whole Ray Train run of its own."""

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from corun_ray.config.jobs import ClusterSection, TuneJob
from corun_ray.config.loading import dump_job
from corun_ray.config.tasks import Choice, RangeSection
from corun_ray.config.trials import build_trial_job, list_example_trials
from corun_ray.core.data.samples import SAMPLES_VERSION
from corun_ray.core.errors import explain_stop
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.cluster.room import RoomWatch, find_waiting_workers
from corun_ray.service.errors import JobFailed, format_reason
from corun_ray.service.models.registry import has_model, register_model
from corun_ray.service.models.sources import load_starting_model
from corun_ray.service.models.tracking import Tracker, TrackingError, get_tracking_uri
from corun_ray.service.models.user_code import collect_code
from corun_ray.service.report.page import REPORT_FILE
from corun_ray.service.runs.lease import Lease, RunTaken
from corun_ray.service.runs.record import (
    JOB_FILE,
    DataDigest,
    ResumeError,
    RunRecord,
    create_run_folder,
    describe_moved_data,
    find_last_run,
    find_run_to_resume,
    read_record,
    write_record,
)
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.train.coherence import check_scoring
from corun_ray.service.train.driver import prepare
from corun_ray.service.tune.report import VALIDATION_PREFIX, TrialResult, rank_trials, summarise_search
from corun_ray.service.tune.trial import TrialPlan, build_overrides, run_trial

MIB = 2**20
SEARCH_FOLDER = "search"
"""The folder of a search's run that holds Tune's own state."""
MAX_TRIAL_NAME_CHARACTERS = 100
ENVIRONMENT = {
    # Our own lines and MLflow tell about the trials.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C ends the search; Tune's own handler would only end its loop, and the results would seem to be all.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A crash must not lose which trials have ended: store Tune's state every second.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Read by Tune when a search starts. A user's own values have precedence."""

for _variable, _value in ENVIRONMENT.items():
    os.environ.setdefault(_variable, _value)


@dataclass(frozen=True)
class SearchSession:
    """A search that has begun: its job, its run's folder, its MLflow run and its console."""

    job: TuneJob
    run: Location
    tracker: Tracker
    console: Console


def run_search(job: TuneJob, console: Console, folder: Path, resume: bool = False) -> str:
    """Run all trials; return the URI of the best model.

    `folder` is the job file's. With `resume`, the job's last search continues: trials that have ended do not run again,
    the others resume from their checkpoints. Raises the errors of `run_training`.
    """
    started = time.monotonic()

    # 1. Check everything that can be checked without a cluster.
    data = _check_trials(job, folder)

    # 2. Find the search to resume, and stop if it has ended.
    earlier = find_run_to_resume(job, data) if resume else None
    if earlier is not None and earlier[1].model is not None and has_model(get_tracking_uri(job), earlier[1].model):
        console.say(f"\ntune {job.name}: has ended before ({earlier[1].model}, {earlier[0].uri})")
        return earlier[1].model

    # 3. Connect to Ray, and become the search's driver until its end.
    cluster = join_cluster(job, console.say)
    if earlier is None:
        run = create_run_folder(locate(job.storage), job.name)
        lease = Lease.begin(run)
    else:
        run = earlier[0]
        lease = Lease.take(run)
    lease.call_on_loss(partial(_end_process, console))

    with lease:
        # 4. Connect to MLflow, and show the job's facts.
        trials_at_once = job.tune.trials_at_once or min(job.tune.num_trials, _count_fitting_trials(job.cluster))
        try:
            tracker = Tracker(job, run.name, earlier[1].mlflow_run if earlier else None, None, run, console.say)
        except BaseException:
            # Nothing has begun.
            if earlier is None:
                run.delete()
            raise
        session = SearchSession(job, run, tracker, console)
        facts = _describe_search(session, trials_at_once, cluster)
        if resume:
            facts["resume"] = "no earlier search: begins" if earlier is None else "resumes this search"
        if earlier is not None and (moved := describe_moved_data(job, *earlier)):
            facts["data"] = moved
        console.header(f"tune {job.name}", facts)

        # 5. Search. However the search ends, MLflow's run is closed.
        succeeded = False
        try:
            with explain_stop(lambda: f"the search: {run.uri}; --resume continues it"):
                model = _search(session, data, folder, trials_at_once)
            succeeded = True
        except TrackingError as error:
            lines = [str(error), *tracker.list_missing(), f"the run: {run.uri}; --resume sends all of it"]
            raise JobFailed("\n".join(lines)) from None
        finally:
            session.tracker.finish(succeeded)

    took = format_duration(time.monotonic() - started)
    console.footer("done", {"best": model, "run": run.uri, "report": run.child(REPORT_FILE).uri, "took": took})
    return model


def _end_process(console: Console, reason: RunTaken) -> None:
    """End this process, and with it all trials, where another driver has taken the search over."""
    console.say(str(reason))
    # Tune and MLflow would write to their records on the way out; these belong to the other driver now.
    os._exit(1)


def _check_trials(job: TuneJob, folder: Path) -> DataDigest:
    """Check data, weights and every network before any trial starts.

    Returns the digest of the data. Raises the errors of `prepare`.
    """
    first, *others = list_example_trials(job, "data", but="patch_px")
    manifest, _ = prepare(first, folder)

    # Every combination of the lists and of the ranges' two ends: what many trials share is tried only once.
    for trial in others:
        prepare(trial, folder)
    for trial in list_example_trials(job, "coherence", "loss", "data")[1:]:
        check_scoring(trial)
    for trial in list_example_trials(job, "network", "data")[1:]:
        load_starting_model(trial, folder)
    return DataDigest(manifest.compute_digest(), manifest.files)


def _count_fitting_trials(cluster: ClusterSection) -> int:
    """Count the trials that fit into Ray's cluster."""
    total = ray.cluster_resources()
    needs = {
        "CPU": cluster.max_workers * cluster.cpus_per_worker + cluster.data_cpus,
        "GPU": cluster.max_workers * cluster.gpus_per_worker,
    }

    # The scarcest resource decides. A resource that no trial needs does not.
    fitting = []
    for kind, need in needs.items():
        if need:
            fitting.append(math.floor(total.get(kind, 0) / need))
    return max(1, min(fitting))


def _describe_search(session: SearchSession, trials_at_once: int, cluster: str) -> dict[str, str]:
    """Return the facts of the search's header."""
    job, section = session.job, session.job.tune
    choices = [f"{key}: {_describe_choice(choice)}" for key, choice in section.search.items()]
    return {
        "search": "; ".join(choices),
        "trials": f"{section.num_trials} of {job.train.steps} steps, {trials_at_once} at once",
        "best": f"{section.mode} {section.metric}",
        "each": f"{job.cluster.workers_text} workers on {cluster}",
        "run": session.run.uri,
        "mlflow": f"{session.tracker.uri} (experiment {job.tracking.experiment})",
    }


def _describe_choice(choice: Choice) -> str:
    """Describe a range by its ends, a list by its items."""
    if isinstance(choice, RangeSection):
        return f"{choice.low:g} to {choice.high:g}{', log' if choice.log else ''}"
    return ", ".join(map(str, choice))


def _search(session: SearchSession, data: DataDigest, folder: Path, trials_at_once: int) -> str:
    """Run the trials; return the best model's URI.

    Raises `StorageError`, `TrackingError` and `JobFailed`.
    """
    job, run, tracker = session.job, session.run, session.tracker

    # The record lets `--resume` find the search.
    record = RunRecord(
        state="running", mlflow_run=tracker.run_id, data=data.names, files=data.files, samples=SAMPLES_VERSION
    )
    run.child(JOB_FILE).write(dump_job(job).encode())
    write_record(run, record)
    tracker.log_file(JOB_FILE, dump_job(job).encode())

    plan = TrialPlan(job, run.uri, tracker.run_id, collect_code(job.network.type, folder))
    trials = _run_trials(plan, run, trials_at_once, session.console)
    _close_stopped_runs(session, trials)

    # Only the best model is registered.
    model = _store_results(session, trials)
    if job.tracking.register is not None:
        model = register_model(tracker.uri, model, job.tracking.register)
    write_record(run, record.model_copy(update={"state": "finished", "model": model}))
    return model


# --- Ray Tune ---


def _run_trials(plan: TrialPlan, run: Location, trials_at_once: int, console: Console) -> list[TrialResult]:
    """Run all trials, or continue an interrupted search.

    Raises `ResumeError` where another version of this package began the search.
    """
    section = plan.job.tune
    space = {key: _make_domain(choice) for key, choice in section.search.items()}

    # A trial's actor only waits for its workers, and the workers ask for their own resources. Tune needs a request of
    # at least something.
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"memory": MIB})

    place = run.child(SEARCH_FOLDER)
    if tune.Tuner.can_restore(place.path, storage_filesystem=place.filesystem):
        try:
            tuner = tune.Tuner.restore(
                place.path, trainable, param_space=space, restart_errored=True, storage_filesystem=place.filesystem
            )
        except (AttributeError, ImportError) as error:
            # Tune keeps a search as a pickle, which names our functions by their modules.
            reason = format_reason(error)
            raise ResumeError(
                f"--resume: {place.uri} was begun by another version of corun_ray and cannot resume ({reason}); "
                "its finished trials stay, begin a new search without --resume"
            ) from None
    else:
        callback = ProgressCallback(console, section.metric, section.num_trials, plan.job.train.steps)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=section.metric,
                mode=section.mode,
                scheduler=_make_scheduler(plan.job),
                num_samples=section.samples,
                max_concurrent_trials=trials_at_once,
                trial_name_creator=_name_trial,
                trial_dirname_creator=_name_trial,
            ),
            run_config=tune.RunConfig(
                name=SEARCH_FOLDER,
                storage_path=run.path,
                storage_filesystem=run.filesystem,
                callbacks=[callback],
                verbose=0,
            ),
        )

    results = tuner.fit()
    return [TrialResult.from_ray(results[number]) for number in range(len(results))]


def _make_domain(choice: Choice) -> Any:
    """Return Tune's search space of one key."""
    if not isinstance(choice, RangeSection):
        return tune.grid_search(list(choice))

    # Tune's ranges of whole numbers end before their upper bound.
    if choice.is_whole:
        sample_whole = tune.lograndint if choice.log else tune.randint
        return sample_whole(int(choice.low), int(choice.high) + 1)
    sample = tune.loguniform if choice.log else tune.uniform
    return sample(choice.low, choice.high)


def _make_scheduler(job: TuneJob) -> TrialScheduler:
    """Return the scheduler that the job asks for.

    Either all trials run to their end, or ASHA stops those that fall behind.
    """
    section = job.tune
    if section.scheduler == "all":
        return FIFOScheduler()

    grace_steps = section.grace_steps or max(1, job.train.steps // 4)
    return ASHAScheduler(
        time_attr="step", max_t=job.train.steps, grace_period=grace_steps, reduction_factor=section.reduction
    )


def _name_trial(trial: Trial) -> str:
    """Name a trial by number and values: `00003_stages-4_lr-0.0002`."""
    values = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in trial.config.items())
    name = f"{trial.trial_id.rpartition('_')[2]}_{values}"

    # The name is that of a folder, too.
    return re.sub(r"[^0-9A-Za-z._-]+", "-", name)[:MAX_TRIAL_NAME_CHARACTERS]


class ProgressCallback(Callback):
    """Shows one live line of progress over all trials, and a line for each trial that starts or ends."""

    def __init__(self, console: Console, metric: str, num_trials: int, steps: int) -> None:
        self._console, self._metric, self._num_trials, self._steps = console, metric, num_trials, steps
        self._room = RoomWatch()

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        """Tell that trials wait for room on the cluster."""
        text = self._room.update(find_waiting_workers())
        if text is not None:
            self._console.say(f"  {text}")

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """Tell that a trial begins, or resumes."""
        verb = "resumes" if trial.last_result else "begins"
        self._console.say(f"  trial {trial} {verb}")

    def on_trial_result(self, iteration: int, trials: Sequence[Trial], trial: Trial, result: dict, **info: Any) -> None:
        """Show the progress after a trial's validation."""
        self._show_progress(trials)

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """Tell that a trial has ended or fallen behind."""
        last = trial.last_result
        outcome = "ended" if "model" in last else f"stopped at step {last.get('step', 0)}"
        score = f", {self._metric} {last[self._metric]:.4g}" if self._metric in last else ""
        self._console.say(f"  trial {trial} {outcome}{score}")
        self._show_progress(trials)

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """Tell that a trial has failed; the others continue."""
        self._console.say(f"  trial {trial} failed")
        self._show_progress(trials)

    def _show_progress(self, trials: Sequence[Trial]) -> None:
        """Show the steps done by all trials."""
        num_ended, num_running, running_steps = 0, 0, 0
        for trial in trials:
            if trial.status in (Trial.TERMINATED, Trial.ERROR):
                num_ended += 1
            elif trial.status == Trial.RUNNING:
                num_running += 1
                running_steps += trial.last_result.get("step", 0)

        # A trial that was stopped early counts with all its steps: the line ends at the total.
        done = num_ended * self._steps + running_steps
        details = [f"{num_ended} of {self._num_trials} trials ended", f"{num_running} running"]
        self._console.progress(done, self._num_trials * self._steps, "step", details)


# --- The results ---


def _close_stopped_runs(session: SearchSession, trials: Sequence[TrialResult]) -> None:
    """Close the MLflow runs of trials without a model.

    Where a trial falls behind, Tune kills its process, which cannot close the run. A trial with an error has failed.
    """
    for trial in trials:
        if trial.model is not None:
            continue
        overrides = build_overrides(session.job, session.run, trial.name)
        run = find_last_run(build_trial_job(session.job, {**trial.values, **overrides}))
        if run is not None:
            status = "KILLED" if trial.error is None else "FAILED"
            session.tracker.end_run(read_record(run).mlflow_run, status)


def _store_results(session: SearchSession, trials: Sequence[TrialResult]) -> str:
    """Show and store the results; return the best model.

    Raises `StorageError`, and `JobFailed` where no trial has ended with a value of the metric.
    """
    job, run, tracker, console = session.job, session.run, session.tracker, session.console

    # Name the failed trials, which the table omits.
    for trial in trials:
        if trial.error is not None:
            console.say(f"  {trial.name} failed: {trial.error}")

    # Trials without a model come last: if the first has none, none has.
    ranking = rank_trials(trials, job.tune.metric, job.tune.mode)
    model = ranking[0].model if ranking else None
    if model is None:
        raise JobFailed(f"tune {job.name}: none of the {len(trials)} trials has ended\nthe run: {run.uri}")
    if math.isnan(ranking[0].metrics[job.tune.metric]):
        raise JobFailed(
            f"tune {job.name}: {job.tune.metric} has no value for any image in any trial that ended, so none is the "
            f"best\nthe run: {run.uri}"
        )

    summary = summarise_search(job, ranking)
    for line in summary.lines:
        console.say(f"  {line}")

    files = {"trials.csv": summary.csv, "trials.png": summary.png, REPORT_FILE: summary.render_page(job, run.name)}
    for name, content in files.items():
        run.child(name).write(content)
        tracker.log_file(name, content)

    # The search's own MLflow run shows the best trial.
    best = ranking[0]
    best_metrics = {}
    for name, value in best.validation.items():
        best_metrics[f"best/{name.removeprefix(VALIDATION_PREFIX)}"] = value
    tracker.log_metrics(0, best_metrics)
    tracker.set_tags({"corun_ray.best_trial": best.name})
    return model
