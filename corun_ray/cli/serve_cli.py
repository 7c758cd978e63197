"""`corun-ray serve`. Heavy imports happen in the command."""

import argparse
from typing import Any

from corun_ray.cli.models import SOURCE_HELP, add_command, run_described

SERVE = """\
Answers POST /dehaze with the restored image, and gives people a page to drop photographs on, on Ray Serve: on the
cluster of RAY_ADDRESS or here. It runs until Ctrl-C, which takes it away again.

There is no authentication: by default it listens at this machine's loopback address alone. The keys of a job of kind
serve (`corun-ray check --keys`) are these options."""

EXAMPLES = """\
examples:
  corun-ray serve models:/corun@champion
  corun-ray serve net.pth --port 8080 --replicas 2
  corun-ray serve models:/corun/3 --replicas 1,4 --gpus-per-replica 0.5 --max-batch 8
  curl --data-binary @hazy.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/dehaze -o clear.jpg"""


def replicas(text: str) -> Any:
    """`2`, or `1,4` for as many as are needed."""
    numbers = tuple(int(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


OPTIONS = (
    ("host", str, "ADDRESS", "where to listen (default 127.0.0.1: this machine alone)"),
    ("port", int, "N", "port (default 8000)"),
    ("path", str, "PATH", "path below which it answers (default /)"),
    ("replicas", replicas, "N|LOW,HIGH", "copies of the model, or as many of LOW to HIGH as are needed (default 1)"),
    ("gpus_per_replica", float, "N", "GPUs of a copy, also 0.5 (default 0: CPU)"),
    ("cpus_per_replica", float, "N", "CPUs of a copy, and its threads (default 1)"),
    ("max_batch", int, "N", "images of equal size that are restored together (default 4)"),
    ("batch_wait_s", float, "S", "how long an image waits for others (default 0.01)"),
    ("max_upload_mib", int, "N", "largest file (default 32)"),
    ("max_megapixels", float, "N", "largest image (default 25)"),
    ("max_queued", int, "N", "requests that may wait, more get 503 (default 32)"),
    ("timeout_s", float, "S", "when a request is given up (default 300)"),
    ("memory_mib", int, "N", "memory of a batch at work, larger images are cut (default 2816, or 3/4 of a GPU's)"),
)


def add_serve_command(commands: "argparse._SubParsersAction") -> None:
    """Adds the command to the parsers of `corun-ray`."""
    parser = add_command(commands, "serve", "serve a model over HTTP", SERVE, EXAMPLES)
    parser.add_argument("model", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--name", default="dehazing", metavar="NAME", help="of the application (default dehazing)")
    for key, kind, metavar, help in OPTIONS:
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    parser.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> int:
    given = {key: getattr(args, key) for key, *_ in OPTIONS}
    section = {"model": args.model} | {key: value for key, value in given.items() if value is not None}
    return run_described({"kind": "serve", "name": args.name, "serve": section}, args.tracking)
