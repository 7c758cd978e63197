"""`corun-ray pool ls | show | export | diff`. Heavy imports happen in the command that needs them."""

import argparse
import difflib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from corun_ray.cli.common import DONE, FAILED

if TYPE_CHECKING:
    from corun_ray.config.jobs import ColabatorJob
    from corun_ray.core.data.images import ImageU8
    from corun_ray.service.pool.source import SavedPool

SOURCE_HELP = "a run, checkpoint, pool folder or snapshot: see corun-ray pool --help"
CLOSEST_KEYS = 3
CLOSEST_LIKENESS = 0.4

ABOUT = """\
Looks into a saved label pool. Reads storage only, starts no Ray.

SOURCE is a folder or URI:
  RUN                              a run's folder: the snapshot of its last checkpoint
  RUN/checkpoint_00000500          the snapshot of that checkpoint
  RUN/pool                         the newest snapshot
  RUN/pool/step_00000500.json      that snapshot"""

EXAMPLES = """\
examples:
  corun-ray pool ls runs/demo-colabator-20260101-120000
  corun-ray pool show runs/demo-colabator-20260101-120000 photo_3.png
  corun-ray pool export s3://my-bucket/runs/corun-20260101-120000 labels --trust
  corun-ray pool diff RUN/pool/step_00000500.json RUN/pool/step_00001000.json"""


def add_pool_commands(commands: "argparse._SubParsersAction") -> None:
    """Adds the command `pool` to the parsers of `corun-ray`."""
    raw = argparse.RawDescriptionHelpFormatter
    group = commands.add_parser(
        "pool", help="look into a saved label pool", description=ABOUT, epilog=EXAMPLES, formatter_class=raw
    )
    subs = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ls = subs.add_parser("ls", help="count labels; show their scores, age and size")
    ls.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    ls.add_argument("--json", metavar="FILE", help="also write the numbers to a file")
    ls.set_defaults(command=_ls)

    show = subs.add_parser("show", help="picture one label beside its hazy image")
    show.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    show.add_argument("key", metavar="KEY", help="the hazy image's path below its folder")
    show.add_argument("--hazy", metavar="ROOT", help="folder or URI of the hazy images (default: the run's data.hazy)")
    show.add_argument("--output", metavar="PNG", help="file to write (default: KEY.png in this folder, without its /)")
    show.set_defaults(command=_show)

    text = "Every label as DIR/KEY with .png as its suffix, 8 bit, and a list of them, DIR/labels.csv."
    ends = "Exits with 1 where keys were left out: they and the reasons are listed at the end."
    export = subs.add_parser("export", help="write all labels as PNG files", description=text, epilog=ends)
    export.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    export.add_argument("folder", metavar="DIR", help="a new or empty folder")
    export.add_argument("--transmission", action="store_true", help="also KEY.transmission.png, grey, 255 is clear air")
    export.add_argument("--trust", action="store_true", help="also KEY.trust.png, grey, 255 is full trust")
    export.set_defaults(command=_export)

    diff = subs.add_parser("diff", help="what changed from one snapshot to another, by scores and steps")
    diff.add_argument("a", metavar="A", help="the earlier SOURCE, see corun-ray pool --help")
    diff.add_argument("b", metavar="B", help="the later SOURCE")
    diff.add_argument("--all", action="store_true", help="list every change instead, as tab-separated lines")
    diff.set_defaults(command=_diff)


def _ls(args: argparse.Namespace) -> int:
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import describe_summary, summarise
    from corun_ray.service.storage import locate

    source = find_saved_pool(args.source)
    summary = summarise(source, source.read_index())
    print("\n".join(describe_summary(summary)))
    if args.json:
        locate(args.json).write(json.dumps(asdict(summary), indent=1).encode())
    return DONE


def _show(args: argparse.Namespace) -> int:
    from corun_ray.service.pool.export import draw_label
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError, locate

    source = find_saved_pool(args.source)
    index = source.read_index()
    if args.key not in index:
        raise StorageError(f"{source.uri}: no label of {make_printable(args.key)}{_closest(args.key, index)}")
    label = source.read_label(args.key, index[args.key][1])
    job, unknown = _job_of(source)
    hazy = _hazy_image(args, job, unknown, *label.scene.shape[-2:])
    combine = job.coherence.combine if job else "addition"
    place = locate(args.output or _file_name(args.key))
    place.write(draw_label(label, hazy, combine))
    clarity, quality = label.scores
    print(f"{make_printable(args.key)}: clarity {clarity:.4f}, quality {quality:.4f}, made at step {label.step}")
    print(f"  trust map by {combine}{f' (not known: {unknown})' if unknown else ''}\n  {place.uri}")
    return DONE


def _export(args: argparse.Namespace) -> int:
    from corun_ray.service.pool.export import export_labels
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError
    from corun_ray.service.telemetry.console import Console

    if "://" in args.folder:
        raise StorageError(f"{args.folder}: export fills a local folder; copy it to the bucket afterwards")
    source = find_saved_pool(args.source)
    console = Console()
    console.header("pool export", {"snapshot": source.uri, "output": args.folder})
    job, unknown = _job_of(source) if args.trust else (None, "")
    combine = (job.coherence.combine if job else "addition") if args.trust else None
    if unknown:
        console.say(f"  trust maps by addition (not known: {unknown})")
    done = export_labels(
        source,
        Path(args.folder),
        args.transmission,
        combine,
        lambda number, total: console.progress(number, total, "label"),
    )
    console.footer(f"done: {len(done.files)} labels written, {len(done.refused)} left out", {})
    for key, reason in done.refused.items():
        console.say(f"  left out: {make_printable(key)}: {make_printable(reason)}")
    return FAILED if done.refused else DONE


def _diff(args: argparse.Namespace) -> int:
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import describe_changes, find_changes, format_change_lines

    a, b = find_saved_pool(args.a), find_saved_pool(args.b)
    before, after = ({key: head for key, (head, _) in source.read_index().items()} for source in (a, b))
    found = find_changes(before, after)
    print("\n".join(format_change_lines(found) if args.all else describe_changes(a, b, found, len(after))))
    return DONE


def _job_of(source: "SavedPool") -> "tuple[ColabatorJob | None, str]":
    """The job of the pool's run, or None and why it is not known."""
    from corun_ray.service.storage import StorageError

    try:
        return source.read_job(), ""
    except StorageError as error:
        return None, str(error)


def _hazy_image(
    args: argparse.Namespace, job: "ColabatorJob | None", unknown: str, height_px: int, width_px: int
) -> "ImageU8":
    from corun_ray.service.pool.export import load_hazy_image
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError

    try:
        root = args.hazy or (job and job.data.hazy)
        if not root:
            raise StorageError(unknown)
        return load_hazy_image(root, args.key, height_px, width_px)
    except StorageError as error:
        raise StorageError(
            f"no hazy image of {make_printable(args.key)}: {error}; name its folder with --hazy ROOT"
        ) from None


def _file_name(key: str) -> str:
    """The key and `.png`, as the name of one file here."""
    return "".join(c if c.isprintable() and c not in "/\\:" else "_" for c in key) + ".png"


def _closest(key: str, keys: Collection[str]) -> str:

    from corun_ray.service.pool.summary import make_printable

    closest = difflib.get_close_matches(key, keys, CLOSEST_KEYS, CLOSEST_LIKENESS)
    return f" (the closest: {', '.join(map(make_printable, closest))})" if closest else ""
