"""The front door: `corun-ray COMMAND`. Heavy imports happen in the command that needs them."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corun_ray.cli.bench_cli import add_bench_commands
from corun_ray.cli.common import DONE, FAILED, WRONG_REQUEST, using_ray
from corun_ray.cli.data import add_weights_commands
from corun_ray.cli.models import add_model_commands
from corun_ray.cli.pack_cli import add_pack_command
from corun_ray.cli.pool import add_pool_commands
from corun_ray.cli.run import add_doctor_command
from corun_ray.cli.serve_cli import add_serve_command
from corun_ray.cli.submit import add_submit_commands
from corun_ray.core.errors import UserError
from corun_ray.service.errors import JobFailed

if TYPE_CHECKING:
    from corun_ray.service.weights.folder import Wanted


EPILOG = """\
A job file says everything about a job; `corun-ray check --keys` lists what it may say.

  corun-ray demo demo                     make a small dataset
  corun-ray run jobs/quickstart.yaml      train on it: pretrain, colabator, evaluate
  corun-ray run JOB.yaml --resume         go on where its last run stopped
  corun-ray submit JOB.yaml               run it on a cluster by Ray's Jobs API
  corun-ray pool ls runs/RUN              look into the label pool of a run
  corun-ray evaluate PHOTOS               measure photographs, baselines and models
  corun-ray dehaze PHOTOS OUT --model models:/corun-demo@champion --tracking sqlite:///runs/mlflow.db

RAY_ADDRESS names the cluster to use; without it, a local Ray is started.
exit codes: 0 done, 1 the job failed, 2 the request is wrong"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, runs the command and exits with its code."""
    args = parser().parse_args(argv)
    try:
        sys.exit(args.command(args))
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(FAILED)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_REQUEST)
    except JobFailed as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "corun-ray",
        description="Train and use image dehazing models on Ray.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, text: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}. {text}", formatter_class=raw
        )
        sub.set_defaults(command=run)
        return sub

    run = command("run", _run, "run the jobs of a file", "A file of several YAML documents is a pipeline.")
    check = command("check", _check, "validate a job file and look at what it would use", "Starts nothing.")
    check.add_argument("--keys", action="store_true", help="list every key of a job file with its default")
    for sub in (run, check):
        sub.add_argument("job", type=Path, nargs="?" if sub is check else None, metavar="JOB.yaml")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="key.path=value",
            help="override a key in every job that has it (NAME:key.path=value: in one); may be repeated",
        )

    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run of each training job from its last checkpoint: same samples, labels and "
        "optimizer; jobs that had ended are passed over, jobs without a run begin",
    )

    demo = command(
        "demo", _demo, "write a small dataset of rendered scenes", "Folders: clear, depth, hazy, hazy_truth."
    )
    demo.add_argument("folder", type=Path, metavar="DIR")
    demo.add_argument("--seed", type=int, default=0, help="other scenes for another seed (default 0)")

    add_submit_commands(commands)
    add_doctor_command(commands)
    add_weights_commands(commands, _weights_of_jobs)
    add_pack_command(commands)
    add_pool_commands(commands)
    add_model_commands(commands)
    add_serve_command(commands)
    add_bench_commands(commands)
    return parser


def _weights_of_jobs(args: argparse.Namespace) -> "list[tuple[str | None, Wanted]]":
    from corun_ray.config.loading import load_jobs
    from corun_ray.config.trials import example
    from corun_ray.service.weights.needed import find_needed_files

    jobs = map(example, load_jobs(Path(args.where), args.set))
    return [folder for job in jobs for folder in find_needed_files(job).items()]


def _check(args: argparse.Namespace) -> int:
    if args.keys:
        from corun_ray.config.reference import reference

        print(reference())
        return DONE
    if args.job is None:
        raise UserError("check: expected a job file, or --keys")
    from corun_ray.config.loading import dump_job, load_jobs

    jobs = load_jobs(args.job, args.set)
    from corun_ray.service.check import check_job

    wrong = []
    for number, job in enumerate(jobs):
        print(dump_job(job))
        notes, mistakes = check_job(job, jobs[:number])
        print("".join(f"# {note}\n" for note in notes))
        wrong += [f"{job.name}: {mistake}" for mistake in mistakes]
    if wrong:
        raise UserError("\n".join(wrong))
    return DONE


def _run(args: argparse.Namespace) -> int:
    from corun_ray.config.loading import load_jobs

    jobs = load_jobs(args.job, args.set)
    from corun_ray.service.jobs import run_jobs
    from corun_ray.service.telemetry.console import Console

    with using_ray():
        run_jobs(jobs, Console(), args.job.parent.absolute(), args.resume)
    return DONE


def _demo(args: argparse.Namespace) -> int:
    from corun_ray.demo.dataset import write_demo
    from corun_ray.service.telemetry.console import Console

    console = Console()
    try:
        write_demo(args.folder, args.seed, progress=lambda done, total: console.progress(done, total, "scene"))
    except (OSError, ValueError) as error:
        raise UserError(f"demo: {error}") from None
    console.say(f"  {args.folder}: clear, depth, hazy, hazy_truth")
    return DONE
