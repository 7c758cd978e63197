"""`corun-ray weights | pack`: what jobs read beside their job file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corun_ray.cli.command import App
from corun_ray.cli.common import DONE, FAILED, Overrides, ask_for_cluster, at_least, using_ray

if TYPE_CHECKING:
    from corun_ray.service.telemetry.console import Console
    from corun_ray.service.weights.folder import Wanted

NAMED_SKIPPED = 20
"""Images that `pack` names one by one."""
DIGEST_CHARACTERS = 12

PACK_EXAMPLES = """\
examples:
  corun-ray pack rgb_500 packed --depth depth_500 --dry-run
  corun-ray pack s3://haze/rgb_500 s3://haze/packed --depth s3://haze/depth_500
  corun-ray run jobs/pretrain.yaml --set data.clear=s3://haze/packed \\
      --set data.depth=s3://haze/packed"""

app = App()
weights = App(
    help="Fetch, index and list pretrained weights.\n\n"
    "Folders of pretrained weights have an index, weights.json, of sizes and checksums."
)
app.add_typer(weights, name="weights")

Folder = Annotated[str, typer.Argument(metavar="DIR", help="folder or URI of weights")]


@weights.command("fetch")
def fetch_weights(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a local folder")],
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHAT ...",
            help="daclip, vgg19, depth, a no-reference metric of pyiqa or a detector of torchvision "
            "(default: daclip musiq vgg19 brisque nima)",
        ),
    ] = None,
) -> int:
    """Fill a local folder from the internet.

    The libraries' own downloaders fetch the files; their checksums go into the folder's index.
    """
    from corun_ray.core.weights import WeightsError
    from corun_ray.service.weights.fetch import PUBLISHED, fetch

    if "://" in folder:
        raise WeightsError(f"{folder}: fetch fills a local folder; copy it to the bucket afterwards")
    fetch(Path(folder), what or PUBLISHED)
    return DONE


@weights.command("index")
def index_weights(folder: Folder) -> int:
    """Write weights.json for the files of a folder or URI."""
    from corun_ray.service.weights.folder import index_folder

    index_folder(folder)
    # A folder by itself wants nothing: the table has the files that are there.
    print(format_weights(folder, {}))
    return DONE


@weights.command("ls")
def list_weights(
    where: Annotated[str, typer.Argument(metavar="JOB.yaml|DIR", help="a job file, or a folder or URI of weights")],
    overrides: Overrides,
) -> int:
    """List the weights that a job needs or a folder holds.

    Says of each file whether it is there and is the one of the index.
    Exits with 1 where a file that a job needs cannot be used.
    """
    from corun_ray.service.weights.folder import describe_lacking

    # A job file may name several folders; a folder by itself wants nothing.
    folders: Sequence[tuple[str | None, Wanted]] = [(where, {})]
    if where.endswith((".yaml", ".yml")):
        folders = find_needs(Path(where), overrides)
    if not folders:
        print("needs no weights")

    # A table for each folder; one unusable file decides the exit code.
    is_lacking = False
    for folder_uri, wanted in folders:
        print(f"{folder_uri or 'no weights folder'}:")
        print(format_weights(folder_uri, wanted))
        is_lacking = is_lacking or bool(describe_lacking(folder_uri, wanted))
    return FAILED if is_lacking else DONE


def find_needs(job_file: Path, overrides: Sequence[str]) -> "list[tuple[str | None, Wanted]]":
    """Return the weights folders of a file's jobs, with the files needed."""
    from corun_ray.config.loading import load_jobs
    from corun_ray.config.trials import choose_example_job
    from corun_ray.service.weights.needed import find_needed_files

    needs: list[tuple[str | None, Wanted]] = []
    for job in load_jobs(job_file, overrides):
        # A search is looked at by one of its trials.
        needs += find_needed_files(choose_example_job(job)).items()
    return needs


def format_weights(folder_uri: str | None, wanted: "Wanted") -> str:
    """Return a table of a folder's files, present and wanted."""
    from corun_ray.service.telemetry.tables import format_table
    from corun_ray.service.weights.folder import list_files

    # A file that is wanted and missing has no size, one that was never indexed no digest.
    rows: list[tuple[str, ...]] = []
    for file in list_files(folder_uri, wanted):
        size_mb = "-" if file.size_bytes is None else f"{file.size_bytes / 1e6:.1f}"
        digest = "-" if file.sha256 is None else file.sha256[:DIGEST_CHARACTERS]
        rows.append((file.name, size_mb, digest, file.state, file.needed_by))
    return format_table(rows, ("file", "MB", "sha256", "state", "needed by"), right={1})


@app.command(epilog=PACK_EXAMPLES)
def pack(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="folder or URI of images, clear or hazy")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="folder or URI to write to: empty, or an earlier pack")],
    depth: Annotated[
        str | None,
        typer.Option("--depth", metavar="DEPTH", help="folder or URI of their depth maps, paired by stem"),
    ] = None,
    shard_mib: Annotated[
        int, typer.Option("--shard-mib", metavar="N", parser=at_least(1), help="size of a file in MiB")
    ] = 128,
    keep_png: Annotated[bool, typer.Option("--keep-png", help="leave depth maps in PNG as they are")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written, and write nothing")] = False,
) -> int:
    """Write training images into a few large files.

    Writes the images below IMAGES, and with --depth their depth maps, into OUT as Parquet files of --shard-mib, on
    the Ray cluster of RAY_ADDRESS or here. A store then holds a few large objects in place of many small ones, and
    training reads an image by one request.

    A job trains on OUT as it would on IMAGES: name it as data.clear, data.hazy or data.paired.*, and as data.depth,
    too, where it holds depth. Images keep their names and bytes, and so samples and labels stay the same. Depth maps
    in PNG become .npy of the same values, which takes more room and far less time to decode (--keep-png leaves them).

    Stopped, it resumes when it is called again; called again after images have changed, it writes the shards that
    hold them. Files that cannot be read, and images without a depth map, are skipped and named.
    """
    if not dry_run:
        ask_for_cluster()
    with using_ray():
        _plan_and_pack(images, output, depth, shard_mib, keep_png, dry_run)
    return DONE


def _plan_and_pack(
    images: str, output: str, depth: str | None, shard_mib: int, keep_png: bool, is_dry_run: bool
) -> None:
    """Write the shards that are missing; in a dry run, count them."""
    import time

    from corun_ray.core.errors import explain_stop
    from corun_ray.service.cluster.join import join_for_tasks
    from corun_ray.service.data.packing import find_written_shards, plan_pack
    from corun_ray.service.data.packing import pack as write_pack
    from corun_ray.service.inference.outcome import name_passed_over
    from corun_ray.service.runs.lease import Lease
    from corun_ray.service.storage import locate
    from corun_ray.service.telemetry.console import Console, format_duration

    started_s = time.monotonic()
    with Console() as console:
        # Look at what there is to do, and what an earlier call has done of it.
        plan = plan_pack(images, output, depth, shard_mib, keep_png)
        there = find_written_shards(plan)
        facts = {"images": f"{plan.num_images} below {plan.images}, {plan.num_bytes / 2**20:.1f} MiB"}
        if plan.depth is not None:
            facts["images"] += f" with their depth below {plan.depth}"
        facts["output"] = f"{plan.output}: {len(plan.shards)} shards, {len(there)} of them there already"
        if is_dry_run:
            console.header("pack, dry run", facts)
            name_passed_over(plan.passed_over, console)
            _name_skipped(plan.skipped, console)
            return

        # Two at once would delete each other's shards. Ray starts only now: a dry run needs none.
        read = {"IMAGES": plan.images} if plan.depth is None else {"IMAGES": plan.images, "--depth": plan.depth}
        rest = f"the shards in {plan.output} are whole; the same command goes on with the others"
        with Lease.take(locate(plan.output)), explain_stop(lambda: rest):
            facts["on"] = join_for_tasks(console.say, {"OUTPUT": plan.output}, read)
            console.header("pack", facts)
            name_passed_over(plan.passed_over, console)
            packed = write_pack(plan, there, lambda done, total: console.progress(done, total, "image"))

        # The images that are not in the pack are named before the sums.
        _name_skipped(packed.skipped, console)
        console.footer(
            f"done: {packed.images} images in {packed.shards} shards, {packed.num_bytes / 2**20:.1f} MiB",
            {"skipped": str(len(packed.skipped)), "took": format_duration(time.monotonic() - started_s)},
        )


def _name_skipped(skipped: dict[str, str], console: "Console") -> None:
    """Name the first images that were skipped, with reasons."""
    for uri, reason in list(skipped.items())[:NAMED_SKIPPED]:
        console.say(f"  skipped: {uri}: {reason}")
    if len(skipped) > NAMED_SKIPPED:
        console.say(f"  skipped: {len(skipped) - NAMED_SKIPPED} more")
