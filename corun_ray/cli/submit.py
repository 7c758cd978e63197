"""`corun-ray submit`, `jobs` and `schema`. Heavy imports happen in the command that needs them."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from corun_ray.cli.common import DONE, FAILED, WRONG_REQUEST

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

    from corun_ray.service.cluster.jobs_api import JobsClient
    from corun_ray.service.cluster.submission import Submission

LAST_LINES = 5
ADDRESS_HELP = "of the cluster's dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS)"

SUBMIT = """\
Runs a job file on a cluster through Ray's Jobs API and follows what it prints. The file is validated here first. This
checkout goes along as its working directory (of a job file elsewhere, its folder), and so do the values of the
environment variables that the file names. Folders must be URIs, or absolute paths that the cluster's nodes reach; the
job is run by the python3 of the cluster's PATH, which must have the packages of this one.

Ctrl-C asks whether to stop the job; without a terminal it leaves the job alone. The exit code is the job's.
The cluster's token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""

SUBMIT_EXAMPLES = """\
examples:
  corun-ray submit jobs/colabator.yaml --address http://127.0.0.1:8265 --set storage=s3://haze/runs --set ...
  corun-ray submit jobs/colabator.yaml --no-wait --env AWS_PROFILE
  corun-ray submit jobs/colabator.yaml --resume           goes on where the job's last run stopped
  corun-ray submit jobs/colabator.yaml --dry-run          shows what would be sent
  corun-ray jobs status colabator"""

JOBS = """\
Looks at submitted jobs. NAME is that of the job file's job, then the last one submitted, or the id of one."""

SCHEMA = """\
Prints a JSON schema of job files, by which editors complete and check them. The job files of this project name the one
beside them in a line that the YAML servers of editors know:

  # yaml-language-server: $schema=schema.json"""


def add_submit_commands(commands: "argparse._SubParsersAction") -> None:
    """Adds `submit`, `jobs` and `schema` to the parsers of `corun-ray`."""
    raw = argparse.RawDescriptionHelpFormatter
    submit = commands.add_parser(
        "submit",
        help="run a job file on a cluster by Ray's Jobs API",
        description=SUBMIT,
        epilog=SUBMIT_EXAMPLES,
        formatter_class=raw,
    )
    submit.add_argument("job", type=Path, metavar="JOB.yaml")
    submit.add_argument("--set", action="append", default=[], metavar="key.path=value", help="as for run")
    submit.add_argument("--resume", action="store_true", help="as for run")
    submit.add_argument("--name", help="what to call it (default: the name of the file's job, else the file's)")
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="also pass this variable; the cluster's dashboard shows it to those with the token; may be repeated",
    )
    submit.add_argument("--no-wait", action="store_true", help="return once it is submitted")
    submit.add_argument("--dry-run", action="store_true", help="show what would be sent, ask no cluster")
    _add_address(submit)
    submit.set_defaults(command=_submit)

    group = commands.add_parser("jobs", help="look at submitted jobs, follow and stop them", description=JOBS)
    subs = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, help, action in (
        ("ls", "list all, the last first", _ls),
        ("status", "how one stands, and its last lines", _status),
        ("follow", "what one prints, from its beginning", _follow),
        ("stop", "stop one; --resume goes on with it later", _stop),
    ):
        sub = subs.add_parser(name, help=help, description=JOBS)
        if name != "ls":
            sub.add_argument("name", metavar="NAME")
        _add_address(sub)
        sub.set_defaults(command=functools.partial(_with_jobs, action))

    schema = commands.add_parser(
        "schema", help="print a JSON schema of job files", description=SCHEMA, formatter_class=raw
    )
    schema.set_defaults(command=_schema)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help=ADDRESS_HELP)


def _schema(args: argparse.Namespace) -> int:
    from corun_ray.config.json_schema import schema_text

    print(schema_text(), end="")
    return DONE


def _submit(args: argparse.Namespace) -> int:
    from corun_ray.service.cluster.submission import prepare_submission

    submission = prepare_submission(args.job, args.set, args.resume, args.name, more_env=args.env)
    if args.dry_run:
        print(_description(submission))
        return DONE
    return _with_jobs(functools.partial(_submit_to, submission), args)


def _submit_to(submission: "Submission", jobs: "JobsClient", args: argparse.Namespace) -> int:
    submission_id = jobs.submit(submission)
    print(f"submitted as {submission_id} to {jobs.address}", flush=True)
    if args.no_wait:
        print(_ways_on(submission.name))
        return DONE
    return _followed(jobs, submission_id, submission.name)


def _description(submission: "Submission") -> str:
    facts = {
        "name": submission.name,
        "command": submission.entrypoint,
        "folder": f"{submission.working_dir} (without what its .gitignore names)",
        "also": ", ".join(map(str, submission.py_modules)) or "nothing",
        "env": ", ".join(submission.env) or "nothing",
        "metadata": ", ".join(f"{key}={value}" for key, value in submission.metadata.items()),
    }
    return "\n".join(f"{label:<9} {text}" for label, text in facts.items())


def _ways_on(name: str) -> str:
    return "\n".join(f"  corun-ray jobs {verb:<6} {name}" for verb in ("follow", "status", "stop"))


def _followed(jobs: "JobsClient", submission_id: str, name: str) -> int:
    """Copies the log to the job's end, or until a person wants no more of it; returns the exit code."""
    from corun_ray.service.cluster.jobs_api import LogCopy

    copy = LogCopy(lambda text: print(text, end="", flush=True))
    while True:
        try:
            return _code_of(jobs.follow(submission_id, copy))
        except KeyboardInterrupt:
            if not _wants_to_stop(name):
                print(f"left alone, it goes on:\n{_ways_on(name)}")
                return DONE
            print("stopping", flush=True)
            jobs.stop(submission_id)


def _wants_to_stop(name: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop {name} as well? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _code_of(job: "JobDetails") -> int:
    print(f"{job.submission_id}: {job.status.value.lower()}", flush=True)
    if job.status.value == "SUCCEEDED":
        return DONE
    if job.driver_exit_code == WRONG_REQUEST:
        return WRONG_REQUEST
    if job.driver_exit_code is None and job.message:  # it never began: Ray says why, around a traceback
        first, *_, last = [line for line in job.message.splitlines() if line.strip()] * 2
        print(first if first == last else f"{first} {last}", file=sys.stderr)
    return FAILED


def _with_jobs(action: "Callable[[JobsClient, argparse.Namespace], int]", args: argparse.Namespace) -> int:
    from corun_ray.service.cluster.jobs_api import JobsClient

    return action(JobsClient(args.address), args)


def _ls(jobs: "JobsClient", args: argparse.Namespace) -> int:
    rows = [(str(job.submission_id), job.status.value.lower(), *_times(job)) for job in jobs.all()]
    print(_table([("JOB", "STATUS", "STARTED", "TOOK"), *rows]) if rows else "no job was submitted to this cluster")
    return DONE


def _status(jobs: "JobsClient", args: argparse.Namespace) -> int:
    job = jobs.find(args.name)
    started, took = _times(job)
    facts = {"status": job.status.value.lower(), "started": started, "took": took, "command": job.entrypoint}
    print("\n".join([str(job.submission_id), *(f"  {label:<9} {text}" for label, text in facts.items())]))
    for line in jobs.log(str(job.submission_id)).splitlines()[-LAST_LINES:]:
        print(f"  | {line}")
    return DONE


def _follow(jobs: "JobsClient", args: argparse.Namespace) -> int:
    job = jobs.find(args.name)
    return _followed(jobs, str(job.submission_id), args.name)


def _stop(jobs: "JobsClient", args: argparse.Namespace) -> int:
    from corun_ray.service.cluster.jobs_api import RUNNING, LogCopy

    job = jobs.find(args.name)
    if job.status in RUNNING:
        jobs.stop(str(job.submission_id))
        job = jobs.follow(str(job.submission_id), LogCopy(lambda text: None))
    print(f"{job.submission_id}: {job.status.value.lower()}")
    return DONE


def _times(job: "JobDetails") -> tuple[str, str]:
    """When it was started, and how long it has taken."""
    from corun_ray.service.telemetry.console import duration

    if not job.start_time:
        return "-", "-"
    until_s = job.end_time / 1000 if job.end_time else datetime.now().timestamp()
    return f"{datetime.fromtimestamp(job.start_time / 1000):%Y-%m-%d %H:%M:%S}", duration(
        until_s - job.start_time / 1000
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
