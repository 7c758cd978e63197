"""`corun-ray submit | jobs | schema`: job files for Ray's Jobs API."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from corun_ray.cli.command import App
from corun_ray.cli.common import DONE, FAILED, WRONG_REQUEST, JobFile, Overrides
from corun_ray.cli.output import OutputLost
from corun_ray.service.errors import join_lines

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

    from corun_ray.service.cluster.jobs_api import JobsClient
    from corun_ray.service.cluster.submission import Submission

LAST_LINES = 5
"""Lines of a job's log that `jobs status` shows."""

SUBMIT_EXAMPLES = """\
examples:
  corun-ray submit jobs/colabator.yaml --address http://127.0.0.1:8265 \\
      --set storage=s3://haze/runs --set ...
  corun-ray submit jobs/colabator.yaml --no-wait --env AWS_PROFILE
  corun-ray submit jobs/colabator.yaml --resume    resumes the job's last run
  corun-ray submit jobs/colabator.yaml --dry-run   shows what would be sent
  corun-ray jobs status colabator"""

SCHEMA_EXAMPLES = """\
The job files of this project name the schema beside them in a line that the YAML servers of editors know:

  # yaml-language-server: $schema=schema.json"""

app = App()
jobs = App(
    help="Look at submitted jobs, follow and stop them.\n\n"
    "NAME is that of the job file's job, then the last one submitted, or the id of one."
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="of the cluster's dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS)",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="of a job, or the id of a submission")]


@app.command(epilog=SUBMIT_EXAMPLES)
def submit(
    job: JobFile,
    overrides: Overrides,
    resume: Annotated[bool, typer.Option("--resume", help="as for run")] = False,
    # What the cluster receives beside the file.
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="what to call it (default: the name of the file's job, else the file's)"
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="also pass this variable; the cluster's dashboard shows it to those with the token; may be repeated",
        ),
    ] = None,
    # How this command ends.
    no_wait: Annotated[bool, typer.Option("--no-wait", help="return once it is submitted")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be sent, ask no cluster")] = False,
    address: Address = None,
) -> int:
    """Run a job file on a cluster by Ray's Jobs API.

    Follows what the job prints. The file is validated here first. This checkout goes along as the job's working
    directory (of a job file elsewhere, its folder), and so do the values of the environment variables that the file
    names. Folders must be URIs, or absolute paths that the cluster's nodes reach; the job is run by the python3 of the
    cluster's PATH, which must have the packages of this one.

    Ctrl-C asks whether to stop the job; without a terminal it leaves the job alone. The exit code is the job's.

    The cluster's token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    from corun_ray.service.cluster.submission import prepare_submission

    # The file is validated here; nothing was asked of the cluster yet.
    submission = prepare_submission(job, overrides, resume, name, more_env=env or [])
    if dry_run:
        print(_describe(submission))
        return DONE

    # From here on the job runs, whatever becomes of this process.
    cluster = _connect(address)
    submission_id = cluster.submit(submission)
    print(f"submitted as {submission_id} to {cluster.address}", flush=True)
    if no_wait:
        print(_list_next_commands(submission.name))
        return DONE
    return _follow_log(cluster, submission_id, submission.name)


@app.command(epilog=SCHEMA_EXAMPLES)
def schema() -> int:
    """Print a JSON schema of job files.

    Editors complete and check job files by it.
    """
    from corun_ray.config.json_schema import format_schema

    print(format_schema(), end="")
    return DONE


app.add_typer(jobs, name="jobs")


@jobs.command("ls")
def list_jobs(address: Address = None) -> int:
    """List all jobs, the last first."""
    from corun_ray.service.telemetry.tables import format_table

    # What Ray knows of each submission, in columns.
    rows: list[tuple[str, ...]] = []
    for job in _connect(address).list_jobs():
        rows.append((str(job.submission_id), job.status.value.lower(), *_format_times(job)))

    print(format_table(rows, ("JOB", "STATUS", "STARTED", "TOOK")) if rows else "no job was submitted to this cluster")
    return DONE


@jobs.command("status")
def show_status(name: Name, address: Address = None) -> int:
    """Show a job's state and the last lines of its log."""
    from corun_ray.service.telemetry.tables import format_table

    # Raises an error of the user where no job has the name.
    cluster = _connect(address)
    job = cluster.find(name)
    started, took = _format_times(job)
    rows = [("status", job.status.value.lower()), ("started", started), ("took", took), ("command", job.entrypoint)]

    print(job.submission_id)
    print(format_table(rows, indent="  "))
    for line in cluster.read_log(str(job.submission_id)).splitlines()[-LAST_LINES:]:
        print(f"  | {line}")
    return DONE


@jobs.command("follow")
def follow(name: Name, address: Address = None) -> int:
    """Print a job's log from its beginning to its end."""
    cluster = _connect(address)
    job = cluster.find(name)
    return _follow_log(cluster, str(job.submission_id), name)


@jobs.command("stop")
def stop(name: Name, address: Address = None) -> int:
    """Stop a job; --resume resumes it later."""
    from corun_ray.service.cluster.jobs_api import RUNNING, LogCopy

    cluster = _connect(address)
    job = cluster.find(name)
    if job.status in RUNNING:
        cluster.stop(str(job.submission_id))
        # Wait for the end of the job; nobody reads its log.
        job = cluster.follow(str(job.submission_id), LogCopy(lambda text: None))
    print(f"{job.submission_id}: {job.status.value.lower()}")
    return DONE


def _connect(address: str | None) -> "JobsClient":
    """Return a client of the cluster's Jobs API."""
    from corun_ray.service.cluster.ports import ask_for_jobs_api, find_jobs_address
    from corun_ray.service.cluster.tokens import send_token

    # Nobody waits for the imports of Ray to hear that the address is wrong.
    place = find_jobs_address(address)
    if place:
        send_token()
        ask_for_jobs_api(place)

    from corun_ray.service.cluster.jobs_api import JobsClient

    return JobsClient(address)


def _describe(submission: "Submission") -> str:
    """Return the parts of a submission, a line each."""
    from corun_ray.service.telemetry.tables import format_table

    metadata = [f"{key}={value}" for key, value in submission.metadata.items()]
    return format_table(
        [
            ("name", submission.name),
            ("command", submission.entrypoint),
            ("folder", f"{submission.working_dir} (without what its .gitignore names)"),
            ("also", ", ".join(map(str, submission.py_modules)) or "nothing"),
            ("env", ", ".join(submission.env) or "nothing"),
            ("metadata", ", ".join(metadata)),
        ]
    )


def _list_next_commands(name: str) -> str:
    """Return the commands for a job that nobody follows."""
    lines = [f"  corun-ray jobs {verb:<6} {name}" for verb in ("follow", "status", "stop")]
    return "\n".join(lines)


def _follow_log(cluster: "JobsClient", submission_id: str, name: str) -> int:
    """Print the log to the job's end; return the exit code.

    Ctrl-C asks whether to stop the job, and else leaves it alone.
    """
    from corun_ray.service.cluster.jobs_api import LogCopy

    copy = LogCopy(lambda text: print(text, end="", flush=True))
    while True:
        try:
            return _tell_end(cluster.follow(submission_id, copy))
        except KeyboardInterrupt:
            # Ctrl-C reaches this process alone: the job runs on, unless the person wants it to stop.
            if not _wants_to_stop(name):
                print(f"the job keeps running:\n{_list_next_commands(name)}")
                return DONE

            # Follow the job until it has stopped.
            print("stopping", flush=True)
            cluster.stop(submission_id)
        except OutputLost as error:
            raise OutputLost(f"{error}; the job goes on:\n{_list_next_commands(name)}") from None


def _wants_to_stop(name: str) -> bool:
    """Ask whether to stop the job as well; without a terminal, no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop {name} as well? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _tell_end(job: "JobDetails") -> int:
    """Print how a job ended; return the exit code."""
    print(f"{job.submission_id}: {job.status.value.lower()}", flush=True)
    if job.status.value == "SUCCEEDED":
        return DONE
    if job.driver_exit_code == WRONG_REQUEST:
        return WRONG_REQUEST

    # The job never began: Ray says why, around a traceback.
    if job.driver_exit_code is None and job.message:
        print(join_lines(job.message), file=sys.stderr)
    return FAILED


def _format_times(job: "JobDetails") -> tuple[str, str]:
    """Return a job's start, and how long it has taken."""
    from corun_ray.service.telemetry.console import format_duration

    # Ray counts in milliseconds; a job that waits has no start, one that runs no end.
    if not job.start_time:
        return "-", "-"
    started_s = job.start_time / 1000
    until_s = job.end_time / 1000 if job.end_time else datetime.now().timestamp()
    return f"{datetime.fromtimestamp(started_s):%Y-%m-%d %H:%M:%S}", format_duration(until_s - started_s)
