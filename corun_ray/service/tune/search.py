"""The job of kind `tune`: Ray Tune over keys of a Colabator job, each trial a whole Ray Train run of its own.

What a person sees of a search while it runs."""

import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback

from corun_ray.config.jobs import ClusterSection, TuneJob
from corun_ray.config.loading import dump_job
from corun_ray.config.tasks import Choice, RangeSection
from corun_ray.config.trials import corners, trial_job
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.registry import register_model
from corun_ray.service.models.sources import load_starting_model
from corun_ray.service.models.tracking import Tracker
from corun_ray.service.models.user_code import collect_code
from corun_ray.service.report.page import REPORT_FILE
from corun_ray.service.runs.record import (
    JOB_FILE,
    RunRecord,
    find_last_run,
    find_run_to_resume,
    locate_new_run,
    read_record,
    write_record,
)
from corun_ray.service.storage import Location
from corun_ray.service.telemetry.console import Console, duration
from corun_ray.service.train.driver import prepare
from corun_ray.service.tune.report import TrialResult, rank_trials, summarise_search
from corun_ray.service.tune.trial import TrialPlan, build_overrides, run_trial


class TrialLines(Callback):
    """One live line of progress over all trials, and a line for each trial that ends."""

    def __init__(self, console: Console, metric: str, num_trials: int, steps: int) -> None:
        self._console, self._metric, self._num_trials, self._steps = console, metric, num_trials, steps

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or goes on with what it did before."""
        self._console.say(f"  trial {trial} begins" if not trial.last_result else f"  trial {trial} goes on")

    def on_trial_result(self, iteration: int, trials: Sequence[Any], trial: Any, result: dict, **info: Any) -> None:
        """A trial has validated."""
        self._progress(trials)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or because it fell behind."""
        last = trial.last_result
        how = "ended" if "model" in last else f"stopped at step {last.get('step', 0)}"
        score = f", {self._metric} {last[self._metric]:.4g}" if self._metric in last else ""
        self._console.say(f"  trial {trial} {how}{score}")
        self._progress(trials)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial has failed; the others go on."""
        self._console.say(f"  trial {trial} failed")
        self._progress(trials)

    def _progress(self, trials: Sequence[Any]) -> None:
        over = [trial for trial in trials if trial.status in ("TERMINATED", "ERROR")]
        running = [trial for trial in trials if trial.status == "RUNNING"]
        done = len(over) * self._steps + sum(trial.last_result.get("step", 0) for trial in running if trial not in over)
        details = [f"{len(over)} of {self._num_trials} trials over", f"{len(running)} running"]
        self._console.progress(done, self._num_trials * self._steps, "step", details)


# Read by Tune at import: our own lines and MLflow tell of the trials, and a crash must not lose which have ended.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


MIB = 2**20
SEARCH = "search"
"""The folder of a search's run that holds what Tune knows of it."""


def run_search(job: TuneJob, console: Console, folder: Path, resume: bool = False) -> str:
    """Runs the trials to their end and returns the URI of the best one's model; `folder` is the job file's.

    With `resume`, goes on with the job's last search: trials that have ended are not run again, the others go on
    from their checkpoints. Raises the errors of `run_training`.
    """
    started = time.monotonic()
    digest = _look_at_all(job, folder)
    earlier = find_run_to_resume(job, digest) if resume else None
    if earlier is not None and earlier[1].model is not None:
        console.say(f"\ntune {job.name}: has ended before ({earlier[1].model}, {earlier[0].uri})")
        return earlier[1].model
    place = cluster.connect(job.whole_cluster)
    at_once = job.tune.trials_at_once or min(job.tune.num_trials, _room_for(job.cluster))
    run = locate_new_run(job) if earlier is None else earlier[0]
    tracker = Tracker(job, run.name, None if earlier is None else earlier[1].mlflow_run)
    console.header(f"tune {job.name}", _facts(job, at_once, place, run, tracker, resume, earlier is not None))
    record = RunRecord(state="running", mlflow_run=tracker.run_id, data=digest)
    succeeded = False
    try:
        run.child(JOB_FILE).write(dump_job(job).encode())
        write_record(run, record)
        tracker.log_file(JOB_FILE, dump_job(job).encode())
        plan = TrialPlan(job, run.uri, tracker.run_id, collect_code(job.network.type, folder))
        trials = _fit(plan, run, at_once, console)
        _end_stopped(job, run, trials, tracker)
        best = _keep(job, trials, run, tracker, console)
        model = best if job.tracking.register is None else register_model(tracker.uri, best, job.tracking.register)
        write_record(run, record.model_copy(update={"state": "finished", "model": model}))
        succeeded = True
    finally:
        tracker.finish(succeeded)
    console.footer(
        "done",
        {
            "best": model,
            "run": run.uri,
            "report": run.child(REPORT_FILE).uri,
            "took": duration(time.monotonic() - started),
        },
    )
    return model


def _look_at_all(job: TuneJob, folder: Path) -> str:
    """Checks data, weights and every network before any trial starts; returns the digest of the data."""
    trials = [trial_job(job, values) for values in corners(job)]
    manifest, _ = prepare(trials[0], folder)
    networks = {trial.network.model_dump_json(): trial for trial in trials}
    for trial in networks.values():
        load_starting_model(trial, folder)
    return manifest.compute_digest()


def _fit(plan: TrialPlan, run: Location, at_once: int, console: Console) -> list[TrialResult]:
    """The trials when all have ended, those of an interrupted search included."""
    section, steps = plan.job.tune, plan.job.train.steps
    # A trial's own actor only waits for its workers, which ask for theirs; Tune must have something to ask for.
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"memory": MIB})
    space = {key: _domain(choice) for key, choice in section.search.items()}
    place = run.child(SEARCH)
    if tune.Tuner.can_restore(place.path, storage_filesystem=place.filesystem):
        tuner = tune.Tuner.restore(
            place.path, trainable, param_space=space, restart_errored=True, storage_filesystem=place.filesystem
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=section.metric,
                mode=section.mode,
                scheduler=_scheduler(plan.job),
                num_samples=section.samples,
                max_concurrent_trials=at_once,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=SEARCH,
                storage_path=run.path,
                storage_filesystem=run.filesystem,
                callbacks=[TrialLines(console, section.metric, section.num_trials, steps)],
                verbose=0,
            ),
        )
    results = tuner.fit()
    return [TrialResult.of(results[number]) for number in range(len(results))]


def _domain(choice: Choice) -> Any:
    if not isinstance(choice, RangeSection):
        return tune.grid_search(list(choice))
    if choice.is_whole:
        return (tune.lograndint if choice.log else tune.randint)(int(choice.low), int(choice.high) + 1)
    return (tune.loguniform if choice.log else tune.uniform)(choice.low, choice.high)


def _scheduler(job: TuneJob) -> Any:
    section = job.tune
    if section.scheduler == "all":
        return tune.schedulers.FIFOScheduler()
    grace_steps = section.grace_steps or max(1, job.train.steps // 4)
    return tune.schedulers.ASHAScheduler(
        time_attr="step", max_t=job.train.steps, grace_period=grace_steps, reduction_factor=section.reduction
    )


def _name(trial: Any) -> str:
    """`00003_stages-4_lr-0.0002`: the trial's number and what it has been given."""
    values = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in trial.config.items())
    return re.sub(r"[^0-9A-Za-z._-]+", "-", f"{trial.trial_id.rpartition('_')[2]}_{values}")[:100]


def _end_stopped(job: TuneJob, run: Location, trials: Sequence[TrialResult], tracker: Tracker) -> None:
    """Closes the MLflow runs of trials whose processes were ended from outside."""
    for trial in trials:
        if trial.model is None:
            own = find_last_run(trial_job(job, {**trial.values, **build_overrides(job, run, trial.name)}))
            if own is not None:
                tracker.end_run(read_record(own).mlflow_run)


def _keep(job: TuneJob, trials: Sequence[TrialResult], run: Location, tracker: Tracker, console: Console) -> str:
    """Shows and keeps what the trials came to; returns the best one's model; raises `JobFailed` where none ended."""
    found = rank_trials(trials, job.tune.metric, job.tune.mode)
    for trial in trials:
        if trial.error is not None:
            console.say(f"  {trial.name} failed: {trial.error}")
    best = found[0].model if found else None
    if best is None:
        raise JobFailed(f"tune {job.name}: not one of {len(trials)} trials has come to an end\nthe run: {run.uri}")
    report = summarise_search(job, found)
    for line in report.lines:
        console.say(f"  {line}")
    files = {"trials.csv": report.csv, "trials.png": report.png, REPORT_FILE: report.report(job, run.name)}
    for name, content in files.items():
        run.child(name).write(content)
        tracker.log_file(name, content)
    tracker.log_metrics(0, {f"best/{name.removeprefix('val/')}": value for name, value in found[0].validation.items()})
    tracker.set_tags({"corun_ray.best_trial": found[0].name})
    return best


def _facts(
    job: TuneJob, at_once: int, place: str, run: Location, tracker: Tracker, resume: bool, goes_on: bool
) -> dict[str, str]:
    section = job.tune
    facts = {
        "search": "; ".join(f"{key}: {_shown(choice)}" for key, choice in section.search.items()),
        "trials": f"{section.num_trials} of {job.train.steps} steps, {at_once} at once",
        "best": f"{section.mode} {section.metric}",
        "each": f"{job.cluster.workers_text} workers on {place}",
        "run": run.uri,
        "mlflow": f"{tracker.uri} (experiment {job.tracking.experiment})",
    }
    if resume:
        facts["resume"] = "goes on with this search" if goes_on else "no earlier search: begins"
    return facts


def _shown(choice: Choice) -> str:
    if isinstance(choice, RangeSection):
        return f"{choice.low:g} to {choice.high:g}{', log' if choice.log else ''}"
    return ", ".join(map(str, choice))


def _room_for(one: ClusterSection) -> int:
    """How many trials fit into the cluster, at least one."""
    total = ray.cluster_resources()
    needs = {
        "CPU": one.max_workers * one.cpus_per_worker + one.data_cpus,
        "GPU": one.max_workers * one.gpus_per_worker,
    }
    return max(1, min(math.floor(total.get(kind, 0) / need) for kind, need in needs.items() if need))
