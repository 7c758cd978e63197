"""`corun-ray pool`: looking into a saved label pool."""

import difflib
import json
import os
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corun_ray.cli.command import App
from corun_ray.cli.common import DONE, FAILED, parse_port
from corun_ray.core.choices import Combine

if TYPE_CHECKING:
    from corun_ray.config.jobs import ColabatorJob
    from corun_ray.core.data.images import ImageU8
    from corun_ray.service.pool.source import SavedPool

CLOSEST_KEYS = 3
CLOSEST_LIKENESS = 0.4
DEFAULT_COMBINE: Combine = "addition"
"""How scores become trust where the run's own way is not known."""

HELP = """\
Look into a saved label pool.

Reads storage only, starts no Ray.

SOURCE is a folder or URI:
  RUN                          a run: the snapshot of its last checkpoint
  RUN/checkpoint_00000500      the snapshot of that checkpoint
  RUN/pool                     the newest snapshot
  RUN/pool/step_00000500.json  that snapshot"""

EXAMPLES = """\
examples:
  corun-ray pool ls runs/demo-colabator-20260101-120000Z
  corun-ray pool show runs/demo-colabator-20260101-120000Z photo_3.png
  corun-ray pool export s3://bucket/runs/corun-20260101-120000Z labels --trust
  corun-ray pool review runs/demo-colabator-20260101-120000Z
  corun-ray pool diff RUN/pool/step_00000500.json RUN/pool/step_00001000.json"""

REVIEW_EXAMPLES = """\
examples:
  corun-ray pool review runs/demo-colabator-20260101-120000Z
  corun-ray pool review s3://my-bucket/runs/corun-20260101-120000Z \\
      --hazy photos/hazy
  corun-ray pool review RUN --port 8000 --no-open   on another machine, seen by
                                      ssh -L 8000:127.0.0.1:8000 MACHINE"""

app = App()
pool = App(help=HELP, epilog=EXAMPLES)
app.add_typer(pool, name="pool")

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="a run, checkpoint, pool folder or snapshot: see corun-ray pool --help"),
]


@pool.command("ls")
def list_labels(
    where: Source,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="also write the numbers to a file")
    ] = None,
) -> int:
    """Count labels; show their scores, age and size, and how many a review has rejected."""
    from corun_ray.service.pool.review import find_rejections, read_decisions
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import describe_summary, summarise
    from corun_ray.service.storage import locate

    source = find_saved_pool(where)
    rejections = find_rejections(read_decisions(source.pool))
    summary = summarise(source, source.read_index(), rejections)

    print("\n".join(describe_summary(summary)))
    if json_file:
        locate(json_file).write(json.dumps(asdict(summary), indent=1).encode())
    return DONE


@pool.command("show")
def show_label(
    where: Source,
    key: Annotated[str, typer.Argument(metavar="KEY", help="the hazy image's path below its folder")],
    hazy: Annotated[
        str | None,
        typer.Option("--hazy", metavar="ROOT", help="folder or URI of the hazy images (default: the run's data.hazy)"),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="PNG", help="file to write (default: KEY.png in this folder, without its /)"),
    ] = None,
) -> int:
    """Draw one label beside its hazy image."""
    from corun_ray.service.pool.export import draw_label
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError, locate

    # The label's record in the index, then its planes.
    source = find_saved_pool(where)
    index = source.read_index()
    if key not in index:
        raise StorageError(f"{source.uri}: no label of {make_printable(key)}{_closest_keys(key, index)}")
    label = source.read_label(key, index[key][1])

    # The run's job says where hazy images lie and how scores become trust.
    job, unknown = _read_job(source)
    image = _read_hazy_image(key, hazy, job, unknown, *label.scene.shape[-2:])
    combine = job.coherence.combine if job else DEFAULT_COMBINE

    # The picture goes beside nothing else: one file here, or where --output says.
    place = locate(output or _file_name(key))
    place.write(draw_label(label, image, combine))

    clarity, quality = label.scores
    note = f" (not known: {unknown})" if unknown else ""
    print(f"{make_printable(key)}: clarity {clarity:.4f}, quality {quality:.4f}, made at step {label.step}")
    print(f"  trust map by {combine}{note}\n  {place.uri}")
    return DONE


@pool.command("export", epilog="Exits with 1 where labels were skipped: they are listed at the end, with reasons.")
def export_labels(
    where: Source,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a new or empty folder")],
    transmission: Annotated[
        bool, typer.Option("--transmission", help="also KEY.transmission.png, grey, 255 is clear air")
    ] = False,
    trust: Annotated[bool, typer.Option("--trust", help="also KEY.trust.png, grey, 255 is full trust")] = False,
) -> int:
    """Write all labels as PNG files.

    Every label becomes DIR/KEY with .png as its suffix, 8 bit; DIR/labels.csv lists them. Labels rejected in review are
    left out.
    """
    from corun_ray.service.pool import export
    from corun_ray.service.pool.review import find_rejections, read_decisions
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError
    from corun_ray.service.telemetry.console import Console

    if "://" in folder:
        raise StorageError(f"{folder}: export fills a local folder; copy it to the bucket afterwards")
    source = find_saved_pool(where)
    rejections = find_rejections(read_decisions(source.pool))

    with Console() as console:
        console.header("pool export", {"snapshot": source.uri, "output": folder})

        # Trust maps are made as the run made them, where its job file is there.
        combine = None
        if trust:
            job, unknown = _read_job(source)
            combine = job.coherence.combine if job else DEFAULT_COMBINE
            if unknown:
                console.say(f"  trust maps by {combine} (not known: {unknown})")

        done = export.export_labels(
            source,
            Path(folder),
            transmission,
            combine,
            lambda number, total: console.progress(number, total, "label"),
            rejections,
        )
        rejected = f", {done.rejected} rejected in review left out" if done.rejected else ""
        console.footer(f"done: {len(done.files)} labels written, {len(done.refused)} skipped{rejected}", {})
        for key, reason in done.refused.items():
            console.say(f"  skipped: {make_printable(key)}: {make_printable(reason)}")
    return FAILED if done.refused else DONE


@pool.command("review", epilog=REVIEW_EXAMPLES)
def review_labels(
    where: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or URI, or another SOURCE of its pool")],
    hazy: Annotated[
        str | None,
        typer.Option("--hazy", metavar="ROOT", help="folder or URI of the hazy images (default: the run's data.hazy)"),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", parser=parse_port, help="port of the page; 0: a free one")
    ] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="open no browser")] = False,
) -> int:
    """Keep or reject labels by eye.

    Serves a page at this machine's loopback address until Ctrl-C: hazy image, label, trust map and scores, worst
    labels first. Keys: K keeps, R rejects, U takes back, arrows move.

    Decisions are saved at once, in RUN/pool/review. When the run is resumed (corun-ray run JOB.yaml --resume), rejected
    labels leave the pool. Their images learn from the teacher's prediction until a candidate comes that is better than
    the rejected label: no score lower, one at least higher.

    A run that is still training may be reviewed, as of its last checkpoint. Its decisions count from the next start of
    its workers; a better label that has come by then stays.
    """
    from corun_ray.service.pool.review_app import LabelImages, ReviewApp, describe_run_state, listen, serve
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.telemetry.console import Console

    # The run's job says where hazy images lie and how scores become trust.
    job, unknown = _read_job(find_saved_pool(where))
    combine, root = (job.coherence.combine, job.data.hazy) if job else (DEFAULT_COMBINE, None)
    app = ReviewApp(where, LabelImages(combine, hazy or root, unknown))
    door = listen(port)

    address = f"http://{door.getsockname()[0]}:{door.getsockname()[1]}/"
    counts = app.count_choices()
    facts = {
        "snapshot": app.pool.uri,
        "labels": f"{counts.total()}, of which {counts['keep']} kept and {counts['reject']} rejected so far",
        "saved to": app.review.place.parent().uri,
        "page": address,
    }
    with Console() as console:
        console.header("pool review", facts)
        state = describe_run_state(app.pool)
        if state:
            console.say(f"  {state}")
        console.say("  Ctrl-C ends it.")

        if not no_open:
            _open_browser(address)
        serve(app.build(), door)

        counts = app.count_choices()
        console.footer(f"done: {counts['keep']} labels kept, {counts['reject']} rejected", {})
    return DONE


@pool.command("diff")
def compare_snapshots(
    a: Annotated[str, typer.Argument(metavar="A", help="the earlier SOURCE, see corun-ray pool --help")],
    b: Annotated[str, typer.Argument(metavar="B", help="the later SOURCE")],
    all_changes: Annotated[
        bool, typer.Option("--all", help="list every change instead, as tab-separated lines")
    ] = False,
) -> int:
    """Show what changed from one snapshot to another.

    Counts labels added, removed and replaced, with their scores and steps.
    """
    from corun_ray.service.pool.source import find_saved_pool
    from corun_ray.service.pool.summary import describe_changes, find_changes, format_change_lines

    # The indexes alone, which are small beside the labels.
    earlier, later = find_saved_pool(a), find_saved_pool(b)
    before = {key: head for key, (head, _) in earlier.read_index().items()}
    after = {key: head for key, (head, _) in later.read_index().items()}
    found = find_changes(before, after)

    lines = format_change_lines(found) if all_changes else describe_changes(earlier, later, found, len(after))
    print("\n".join(lines))
    return DONE


def _open_browser(address: str) -> None:
    """Open a page in the browser of a graphical session."""
    import webbrowser

    # Elsewhere, a browser of text would take the terminal.
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin":
        webbrowser.open(address)


def _read_job(source: "SavedPool") -> "tuple[ColabatorJob | None, str]":
    """Return the job of the pool's run, or None and the reason."""
    from corun_ray.service.storage import StorageError

    try:
        return source.read_job(), ""
    except StorageError as error:
        return None, str(error)


def _read_hazy_image(
    key: str, root: str | None, job: "ColabatorJob | None", unknown: str, height_px: int, width_px: int
) -> "ImageU8":
    """Return the hazy image of a label at the label's size.

    The image lies below `root`, else below the job's data.hazy; `unknown` says why there is no job.
    Raises `StorageError` where it cannot be read.
    """
    from corun_ray.service.pool.export import load_hazy_image
    from corun_ray.service.pool.summary import make_printable
    from corun_ray.service.storage import StorageError

    # --hazy first, then where the run had its images.
    if not root and job is not None:
        root = job.data.hazy
    try:
        if not root:
            raise StorageError(unknown)
        return load_hazy_image(root, key, height_px, width_px)
    except StorageError as error:
        raise StorageError(
            f"no hazy image of {make_printable(key)}: {error}; name its folder with --hazy ROOT"
        ) from None


def _file_name(key: str) -> str:
    """Return a key as the name of a PNG file here."""
    # A key is a path below the folder of hazy images, with any characters.
    return "".join(c if c.isprintable() and c not in "/\\:" else "_" for c in key) + ".png"


def _closest_keys(key: str, keys: Collection[str]) -> str:
    """Return a note of the keys that are most like `key`."""
    from corun_ray.service.pool.summary import make_printable

    closest = difflib.get_close_matches(key, keys, CLOSEST_KEYS, CLOSEST_LIKENESS)
    return f" (the closest: {', '.join(map(make_printable, closest))})" if closest else ""
