"""`corun-ray doctor`. Heavy imports happen in the command."""

import argparse
import os
from pathlib import Path

from corun_ray.cli.common import DONE, FAILED, using_ray

DOCTOR = """\
Tries everything that a job would use, on the cluster of RAY_ADDRESS or on a Ray started here, in under a minute:
Python, torch and the GPU driver; Ray, its nodes and its token; the GPUs as Ray and as torch see them; a sum over
workers, as their gradients need it; storage from every node (16 MiB written, read, listed, deleted); MLflow (a run, a
metric, an artifact, deleted again; its experiment corun-doctor stays); files of weights; clocks.

A line each: ok, BAD with what to do, or - for what is not needed. Exit code 1 if anything is bad.
With a job file it tries what the file's jobs would use."""

EXAMPLES = """\
examples:
  corun-ray doctor jobs/colabator.yaml --set storage=s3://haze/runs
  corun-ray doctor --storage s3://haze/runs --tracking http://mlflow:5000"""


def add_doctor_command(commands: "argparse._SubParsersAction") -> None:
    """Adds `doctor` to the parsers of `corun-ray`."""
    raw = argparse.RawDescriptionHelpFormatter
    doctor = commands.add_parser(
        "doctor", help="try everything that a job would use", description=DOCTOR, epilog=EXAMPLES, formatter_class=raw
    )
    doctor.add_argument("job", type=Path, nargs="?", metavar="JOB.yaml")
    doctor.add_argument("--set", action="append", default=[], metavar="key.path=value", help="as for run")
    doctor.add_argument("--storage", metavar="DIR", help="folder or URI (default: the job's, else runs)")
    doctor.add_argument(
        "--tracking", metavar="URI", help="MLflow (default: the job's, else MLFLOW_TRACKING_URI, else runs/mlflow.db)"
    )
    doctor.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from corun_ray.config.loading import load_jobs
    from corun_ray.service.doctor.doctor import Doctor, Needs, collect_needs
    from corun_ray.service.doctor.places import shorten_patience

    shorten_patience()
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    is_well = True
    with using_ray():
        needs = collect_needs(load_jobs(args.job, args.set)) if args.job else Needs("runs", tracking)
        for finding in Doctor(needs.at(args.storage, args.tracking)).examine():
            print(finding, flush=True)
            is_well = is_well and finding.is_ok is not False
    return DONE if is_well else FAILED
