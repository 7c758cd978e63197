"""What the commands share: exit codes, options, and the use of Ray."""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corun_ray.cli.command import parse_number, parse_whole_number
from corun_ray.cli.output import LossyFile, wrap_stream
from corun_ray.cli.signals import StopSignals
from corun_ray.service.environment import drop_variables, name_variables
from corun_ray.service.errors import JobFailed

if TYPE_CHECKING:
    from corun_ray.config.jobs import Job

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
"""Exit codes."""

MAX_PORT = 65535
DEFAULT_TRACKING = "sqlite:///runs/mlflow.db"
SOURCE_HELP = "corun-small (shipped), models:/NAME@ALIAS, runs:/…, a checkpoint folder or a .pth"
WRITE_JSON = "also write every figure to a file"

# --- Arguments and options of several commands ---

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="a job file")]
PerhapsJobFile = Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="a job file")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="key.path=value",
        default_factory=list,
        help="override a key in every job that has it (NAME:key.path=value: in one); may be repeated",
    ),
]
Tracking = Annotated[
    str,
    typer.Option(
        "--tracking",
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        show_default=False,
        help="MLflow server of models:/ and runs:/ (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)",
    ),
]


# --- Converters from a word to an option's value; their ValueErrors say what was expected ---


def at_least(least: int) -> Callable[[str], int]:
    """Return a converter to whole numbers of `least` or more."""

    def convert(text: str) -> int:
        value = parse_whole_number(text)
        if value < least:
            raise ValueError(f"{text} is too few (at least {least})")
        return value

    return convert


def parse_port(text: str) -> int:
    """Convert a word to the number of a port; 0 stands for a free one."""
    value = parse_whole_number(text)
    if not 0 <= value <= MAX_PORT:
        raise ValueError(f"expected a port from 0 to {MAX_PORT}, got {text}")
    return value


def multiple_of(divisor: int) -> Callable[[str], int]:
    """Return a converter to multiples of `divisor` above 0."""

    def convert(text: str) -> int:
        value = parse_whole_number(text)
        if value <= 0 or value % divisor:
            raise ValueError(f"expected a multiple of {divisor}, got {text}")
        return value

    return convert


def parse_share(text: str) -> float:
    """Convert a word to a share from 0 to 1."""
    value = parse_number(text)
    if not 0 <= value <= 1:
        raise ValueError(f"expected a share from 0 to 1, got {text}")
    return value


def parse_positive(text: str) -> float:
    """Convert a word to a finite number above 0."""
    value = parse_number(text)
    if not 0 < value < math.inf:
        raise ValueError(f"expected a number above 0, got {text}")
    return value


# --- Ray ---


def ask_for_cluster() -> None:
    """Ask whether a Ray answers at RAY_ADDRESS, if that is set, before the imports that take seconds.

    Raises `UserError` where none does.
    """
    from corun_ray.service.cluster.ports import ask_for_ray, read_ray_address

    address = read_ray_address()
    if address:
        ask_for_ray(address)


def run_with_ray(
    jobs: "Sequence[Job]", folder: Path = Path(), resume: bool = False, profile_start: bool = False
) -> None:
    """Run jobs from a job file in `folder`, or of the command line.

    With `profile_start`, the first training tells what took how long until its first step.

    Raises the errors of `run_jobs`.
    """
    from corun_ray.config.jobs import TrainingJob
    from corun_ray.service.start_times import timing_phase
    from corun_ray.service.telemetry.console import Console

    with using_ray(), Console(profile_start) as console:
        # A training says early what it is at; others are soon there.
        if any(isinstance(job, TrainingJob) for job in jobs):
            console.say("  looking at the data")

        with timing_phase("imports: Ray"):
            from corun_ray.service.jobs import run_jobs

        run_jobs(jobs, console, folder, resume)


@contextmanager
def using_ray() -> Iterator[None]:
    """Run a command that uses Ray.

    A stop by SIGTERM closes what is open, as Ctrl-C does. Ray's own messages go into a file, which a `JobFailed` names;
    a file without any is deleted.
    """
    # Stopped by the Jobs API or an operator, a job closes what it has opened, as at Ctrl-C.
    StopSignals(FAILED).install()
    log = divert_stderr()

    # Ray and torch read their variables when they are imported.
    for line in [*drop_variables(), *name_variables()]:
        print(line, file=sys.stderr)

    try:
        yield
    except JobFailed as error:
        if not _has_text(log):
            raise
        raise JobFailed(f"{error}\nRay's own messages: {log}") from None
    finally:
        if not _has_text(log):
            log.unlink(missing_ok=True)


def _has_text(file: Path) -> bool:
    """Return whether a file is there and not empty."""
    return file.exists() and file.stat().st_size > 0


def divert_stderr() -> Path:
    """Send what Ray's C++ side writes to stderr into a file.

    Python's own stderr stays where it was.
    """
    log = Path(tempfile.gettempdir()) / f"corun-ray-{os.getpid()}.log"
    terminal = os.dup(2)

    # C++ writes to file descriptor 2; Python's stderr gets the terminal under another number.
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = wrap_stream(LossyFile(terminal))
    return log
