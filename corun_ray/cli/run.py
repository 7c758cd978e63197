"""`corun-ray run | check | demo | doctor`: job files, here or on a cluster."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from corun_ray.cli.command import App
from corun_ray.cli.common import (
    DEFAULT_TRACKING,
    DONE,
    FAILED,
    JobFile,
    Overrides,
    PerhapsJobFile,
    ask_for_cluster,
    run_with_ray,
    using_ray,
)
from corun_ray.core.errors import UserError

app = App()

TRAINING_KINDS = ("pretrain", "colabator")
"""Kinds of jobs whose first step is the end of a start; a search has many."""
OPENED_LINE_EVERY_S = 4.0
"""Seconds between two lines of `check` on the images opened."""

DOCTOR_EXAMPLES = """\
examples:
  corun-ray doctor jobs/colabator.yaml --set storage=s3://haze/runs
  corun-ray doctor --storage s3://haze/runs --tracking http://mlflow:5000"""


@app.command()
def run(
    job: JobFile,
    overrides: Overrides,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="resume the last run of each training job from its last checkpoint: same samples, labels and "
            "optimizer; jobs that had ended are skipped, jobs without a run begin",
        ),
    ] = False,
    profile_start: Annotated[
        bool,
        typer.Option("--profile-start", help="at the first step, show what took how long until then"),
    ] = False,
) -> int:
    """Run the jobs of a file.

    A file of several YAML documents is a pipeline.
    """
    from corun_ray.config.loading import load_jobs
    from corun_ray.service.start_times import note_python, timing_phase

    # Report mistakes in the file before the imports of the service, which take seconds.
    note_python()
    with timing_phase("job file"):
        jobs = load_jobs(job, overrides)
    if profile_start and not any(one.kind in TRAINING_KINDS for one in jobs):
        raise UserError("--profile-start: no job of the file trains")
    ask_for_cluster()

    run_with_ray(jobs, job.parent.absolute(), resume, profile_start)
    return DONE


class OpenedLines:
    """Tells every few seconds how many images have been opened, by a comment among the notes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def __call__(self, key: str, done: int, total: int) -> None:
        """Tell that `done` of `total` images of a key are opened, if it is time to."""
        if self._clock() - self._last_s >= OPENED_LINE_EVERY_S:
            print(f"# opening   {key}: {done} of {total}", flush=True)
            self._last_s = self._clock()


@app.command()
def check(
    overrides: Overrides,
    job: PerhapsJobFile = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="list every key of a job file with its default, and check nothing")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="open every image, not a sample of 32 of each kind; tells how far it is")
    ] = False,
) -> int:
    """Validate a job file and look at what it would use.

    Prints each job with all of its keys, and notes on what it would use: it opens images, with their truths and depth
    maps, and loads checkpoints. Starts nothing. Exits with 2 where a job could not run.
    """
    if keys:
        from corun_ray.config.reference import format_reference

        print(format_reference())
        return DONE
    if job is None:
        raise UserError("check: expected a job file, or --keys")

    from corun_ray.config.loading import dump_job, load_jobs

    # Report mistakes in the file before the imports of the service, which take seconds.
    jobs = load_jobs(job, overrides)

    from corun_ray.service.check import check_job
    from corun_ray.service.data.inspection import SAMPLED_IMAGES, Inspector

    inspector = Inspector(None if every else SAMPLED_IMAGES, OpenedLines())
    folder = job.parent.absolute()
    mistakes: list[str] = []
    for number, one in enumerate(jobs):
        print(dump_job(one))
        # A later job of a pipeline may use what an earlier one makes.
        notes, found = check_job(one, jobs[:number], folder, inspector)
        print("".join(f"# {note}\n" for note in notes))
        mistakes += [f"{one.name}: {mistake}" for mistake in found]

    if mistakes:
        raise UserError("\n".join(mistakes))
    return DONE


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to write it: new, empty, or of an earlier call")],
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="other scenes for another seed")] = 0,
    clear: Annotated[int, typer.Option("--clear", metavar="N", min=0, help="clear outdoor scenes, with depth")] = 80,
    hazy: Annotated[int, typer.Option("--hazy", metavar="N", min=0, help="hazy scenes, with truth")] = 24,
    rooms: Annotated[int, typer.Option("--rooms", metavar="N", min=0, help="clear rooms, with depth")] = 0,
) -> int:
    """Write a small dataset of rendered scenes.

    Folders: clear, depth, hazy, hazy_truth, hazy_transmission.
    """
    from corun_ray.demo.dataset import DemoSize, write_demo
    from corun_ray.service.telemetry.console import Console

    size = DemoSize(clear_images=clear, hazy_images=hazy, room_images=rooms)
    with Console() as console:
        try:
            write_demo(folder, seed, size, lambda done, total: console.progress(done, total, "scene"))
        except (OSError, ValueError) as error:
            raise UserError(f"demo: {error}") from None
        console.say(f"  {folder}: clear, depth, hazy, hazy_truth, hazy_transmission")
    return DONE


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(
    overrides: Overrides,
    job: PerhapsJobFile = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="DIR", help="folder or URI (default: the job's, else runs)"),
    ] = None,
    tracking: Annotated[
        str | None,
        typer.Option(
            "--tracking",
            metavar="URI",
            help="MLflow (default: the job's, else MLFLOW_TRACKING_URI, else runs/mlflow.db)",
        ),
    ] = None,
) -> int:
    """Try everything that a job would use.

    On the cluster of RAY_ADDRESS or on a Ray started here, in under a minute: Python, torch and the GPU driver; Ray,
    its nodes and its token; the GPUs as Ray and as torch see them; a sum over workers, as their gradients need it;
    storage from every node (16 MiB written, read, listed, deleted); MLflow (a run, a metric, an artifact, deleted
    again; its experiment corun-doctor stays); files of weights; clocks.

    Prints a line for each: ok, BAD with what to do, or - for what is not needed. Exits with 1 if anything is bad.
    With a job file it tries what the file's jobs would use.
    """
    from corun_ray.config.loading import load_jobs
    from corun_ray.service.doctor.doctor import Doctor, Needs, collect_needs
    from corun_ray.service.doctor.places import shorten_patience

    # A place that does not answer is a finding; nobody waits minutes for it.
    shorten_patience()
    is_well = True
    with using_ray():
        # What to try: the places of the file's jobs, unless the options name others.
        if job is None:
            needs = Needs("runs", os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING)
        else:
            needs = collect_needs(load_jobs(job, overrides))

        for finding in Doctor(needs.replace_places(storage, tracking)).examine():
            print(finding, flush=True)
            is_well = is_well and finding.is_ok is not False
    return DONE if is_well else FAILED
