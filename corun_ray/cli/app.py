"""The front door: from the words of `corun-ray` to its exit code.

Heavy imports happen in the command that needs them, so that `--help` and mistakes answer at once.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from typer.main import get_command

from corun_ray.cli import bench, data, models, pool, run, submit
from corun_ray.cli.command import App, Group, describe_mistake
from corun_ray.cli.common import DONE, FAILED, WRONG_REQUEST
from corun_ray.cli.output import Output, protect_output
from corun_ray.core.errors import UserError
from corun_ray.service.errors import JobFailed
from corun_ray.service.proxies import reach_loopback_directly
from corun_ray.service.trust import share_ca_file

if TYPE_CHECKING:
    from typer._click import Context

PROGRAM = "corun-ray"
NO_TEMP = "No usable temporary directory"

EPILOG = """\
A job file says everything about a job; `corun-ray check --keys` lists its keys.

examples:
  corun-ray demo demo                 make a small dataset
  corun-ray run jobs/quickstart.yaml  train on it: colabator, control, evaluate
  corun-ray run JOB.yaml --resume     resume its last run
  corun-ray submit JOB.yaml           run it on a cluster by Ray's Jobs API
  corun-ray pool ls runs/RUN          look into the label pool of a run
  corun-ray pool review runs/RUN      keep or reject its labels by eye
  corun-ray evaluate PHOTOS           measure photographs, baselines and models
  corun-ray dehaze PHOTOS OUT --model corun-small

RAY_ADDRESS names the cluster to use; without it, a local Ray is started.
CORUN_CONNECT_PATIENCE_S=600 waits ten minutes for a cluster to answer.

exit codes: 0 done, 1 the job failed, 2 the request is wrong"""

app = App(help="Train and use image dehazing models on Ray.", epilog=EPILOG)
for commands in (run, submit, data, pool, models, bench):
    app.add_typer(commands.app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code.

    `argv` are the words behind the program's name; by default those of this process.
    """
    output = protect_output()
    reach_loopback_directly()
    sys.exit(output.settle(_run(sys.argv[1:] if argv is None else argv, output)))


def _run(argv: Sequence[str], output: Output) -> int:
    """Run a command line; return its exit code, and print its errors."""
    try:
        context = parse(argv)
        output.expect(context.command_path.partition(" ")[2], can_wait=not context.params.get("no_wait", False))

        # Every client of the command, and the processes that it starts, trust one company's CA.
        share_ca_file()
        return context.command.invoke(context) or DONE

    except typer.Exit as end:
        # --help was shown.
        return end.exit_code
    except FileNotFoundError as error:
        # Python looks for a folder for temporary files when one is first needed.
        if NO_TEMP not in str(error):
            raise
        print(f"TMPDIR: {error.strerror}; expected a folder that can be written", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt as stop:
        print(f"\nstopped: {stop}" if str(stop) else "\nstopped", file=sys.stderr)
        return FAILED
    except UserError as error:
        print(error, file=sys.stderr)
        return WRONG_REQUEST
    except JobFailed as error:
        print(error, file=sys.stderr)
        return FAILED


def parse(argv: Sequence[str]) -> "Context":
    """Parse a command line; run nothing.

    The context that is returned holds the command and the values of its parameters.

    Raises `UserError` where a command, an option or a value is wrong, and `typer.Exit` where `--help` was shown.
    """
    command, context = get_command(app), None
    name, path, words = PROGRAM, PROGRAM, list(argv)

    # Each group names its command by its first word and leaves the others to it.
    while True:
        try:
            # The parser takes words out of the list that it is given.
            context = command.make_context(name, list(words), parent=context)
            if not isinstance(command, Group):
                return context
            name, command, words = command.resolve_command(context, words)
        except typer.TyperException as error:
            raise UserError(f"{path}: {describe_mistake(error)}") from None
        path = f"{path} {name}"
