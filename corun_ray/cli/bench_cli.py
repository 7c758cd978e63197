"""`corun-ray bench`. Heavy imports happen in the command that needs them."""

import argparse
import math
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from corun_ray.cli.bench import add_core_benches, at_least
from corun_ray.cli.bench_stream_cli import add_stream_bench
from corun_ray.cli.common import DONE, using_ray
from corun_ray.core.errors import UserError

if TYPE_CHECKING:
    from corun_ray.bench.label_pool.figures import PoolSettings
    from corun_ray.service.storage import Location

MIN_LABELS, MIN_SIDE_PX = 60, 8
MIN_IN_MEMORY = 200
"""Labels that memory must have room for, so that there is something to read from it."""

ABOUT = """\
Measures the label pool on this machine; no GPU, no data, no network.

A pool for each number of shards is filled with synthetic labels and measured: offers, reads of labels in memory and of
labels that only storage has, memory, snapshots, restoring, and how long the workers of a simulated job wait for it.
The table tells of the full pools; --json and --plot also show how costs grow on the way there.

With more labels than --memory-mib holds, storage has the others, as in a job with pool.memory_mib."""

EXAMPLES = """\
examples:
  corun-ray bench pool                                     about 5 minutes on 2 cores
  corun-ray bench pool --labels 600 --shards 1 2           a first look
  corun-ray bench pool --labels 100000 --storage /data --json pool.json --plot pool.png
                                                           33 GB on disk, an hour or more

What it writes below --storage is deleted at the end, and when Ctrl-C stops it."""


def add_bench_commands(commands: "argparse._SubParsersAction") -> None:
    """Adds the command `bench` to the parsers of `corun-ray`."""
    raw = argparse.RawDescriptionHelpFormatter
    group = commands.add_parser("bench", help="measure parts of the service on this machine")
    subs = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for parser in add_core_benches(subs, "corun-ray bench"):
        parser.set_defaults(command=_core)
    add_stream_bench(subs)
    pool = subs.add_parser(
        "pool", help="measure the label pool", description=ABOUT, epilog=EXAMPLES, formatter_class=raw
    )
    pool.add_argument(
        "--labels", type=at_least(MIN_LABELS), default=5000, metavar="N", help="labels in a pool (default 5000)"
    )
    pool.add_argument(
        "--side", type=at_least(MIN_SIDE_PX), default=288, metavar="PX", help="side of a label in pixels (default 288)"
    )
    pool.add_argument(
        "--shards",
        type=at_least(1),
        nargs="+",
        default=[1, 2, 4],
        metavar="S",
        help="numbers of shards to compare, one pool each (default 1 2 4)",
    )
    pool.add_argument(
        "--encoding", choices=("uint8", "float16", "float32"), default="uint8", help="of the labels (default uint8)"
    )
    pool.add_argument(
        "--storage",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="folder or URI, reached by all nodes, below which one pool at a time is saved (default the temp folder)",
    )
    pool.add_argument(
        "--memory-mib",
        type=at_least(1),
        default=4096,
        metavar="M",
        help="memory for labels in Ray's object store, of all shards together (default 4096)",
    )
    pool.add_argument("--workers", type=at_least(1), default=64, metavar="W", help="of the simulated job (default 64)")
    pool.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    pool.add_argument("--plot", type=Path, metavar="PNG", help="also draw how costs grow with the number of labels")
    pool.set_defaults(command=_pool)


def _core(args: argparse.Namespace) -> int:
    from corun_ray.bench.run import run

    try:
        run(args)
    except ValueError as error:
        raise UserError(f"bench: {error}") from None
    return DONE


def _pool(args: argparse.Namespace) -> int:
    from corun_ray.bench.label_pool.figures import PoolSettings

    settings = PoolSettings(args.labels, args.side, tuple(args.shards), args.encoding, args.memory_mib, args.workers)
    if mistakes := [*_mistakes(args, settings)]:
        raise UserError("\n".join(mistakes))
    with using_ray():
        _measure(args, settings)
    return DONE


def _mistakes(args: argparse.Namespace, settings: "PoolSettings") -> Iterator[str]:
    least_mib = math.ceil(MIN_IN_MEMORY * settings.label_bytes / 2**20)
    if settings.memory_mib < least_mib:
        yield f"--memory-mib: {settings.memory_mib} is too few for such labels (at least {least_mib})"
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file is not None and not file.absolute().parent.is_dir():
            yield f"{option}: there is no folder {file.absolute().parent}"
    if "://" in args.storage:
        return
    if not Path(args.storage).is_dir():
        yield f"--storage: there is no folder {args.storage}"
        return
    needed, free = settings.labels * settings.label_bytes, shutil.disk_usage(args.storage).free
    if free < needed:
        yield f"--storage: {args.storage} has {free / 1e9:.1f} GB free, the labels may take {needed / 1e9:.1f} GB"


def _measure(args: argparse.Namespace, settings: "PoolSettings") -> None:
    from corun_ray.bench.label_pool.report import as_json, plot, table
    from corun_ray.bench.label_pool.trial import bench_pool
    from corun_ray.service.cluster import connect as cluster
    from corun_ray.service.errors import JobFailed
    from corun_ray.service.pool.client import PoolError
    from corun_ray.service.storage import locate
    from corun_ray.service.telemetry.console import Console

    console, total = Console(), settings.labels * len(settings.shards)
    with _scratch(locate(args.storage)) as folder:
        place = cluster.connect()
        labels = f"{settings.labels} of {settings.side_px} px in {settings.encoding}"
        console.header("bench pool", {"labels": labels, "on": place, "storage": folder.uri})
        try:
            for report in bench_pool(
                settings, folder, lambda done, what: console.progress(done, total, "label", [what])
            ):
                # What is known already should outlast whatever ends a long run.
                if args.json:
                    args.json.write_text(as_json(report))
                if args.plot:
                    args.plot.write_bytes(plot(report))
        except PoolError as error:
            raise JobFailed(f"bench pool: {error}") from None
    console.say(f"\n{table(report)}")


@contextmanager
def _scratch(storage: "Location") -> Iterator["Location"]:
    """A folder of our own; gone afterwards, when Ray's processes, which might still write there, are gone too."""
    import ray

    folder = storage.child(f"corun-bench-{uuid.uuid4().hex[:12]}")
    try:
        yield folder
    finally:
        ray.shutdown()
        folder.delete()
