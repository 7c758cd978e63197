"""`corun-ray pack`. Heavy imports happen when it runs."""

import argparse
from typing import TYPE_CHECKING

from corun_ray.cli.bench import at_least
from corun_ray.cli.common import DONE, using_ray

if TYPE_CHECKING:
    from corun_ray.service.telemetry.console import Console

NAMED_LEFT_OUT = 20

ABOUT = """\
Writes the images below IMAGES, and with --depth their depth maps, into OUT as Parquet files of --shard-mib, on the Ray
cluster of RAY_ADDRESS or here. A store then holds a few large objects in place of many small ones, and training reads
an image by one request.

A job trains on OUT as it would on IMAGES: name it as data.clear, data.hazy or data.paired.*, and as data.depth, too,
where it holds depth. Images keep their names and bytes, and so samples and labels stay the same. Depth maps in PNG
become .npy of the same values, which takes more room and far less time to decode (--keep-png leaves them).

Stopped, it goes on when it is called again; called again after images have changed, it writes the shards that they are
in. Files that cannot be read, and images without a depth map, are left out and named."""

EXAMPLES = """\
examples:
  corun-ray pack rgb_500 packed --depth depth_500 --dry-run
  corun-ray pack s3://haze/rgb_500 s3://haze/rgb_500_pack --depth s3://haze/depth_500
  corun-ray run jobs/pretrain.yaml --set data.clear=s3://haze/rgb_500_pack --set data.depth=s3://haze/rgb_500_pack"""


def add_pack_command(commands: "argparse._SubParsersAction") -> None:
    """Adds the command `pack` to the parsers of `corun-ray`."""
    pack = commands.add_parser(
        "pack",
        help="write training images into a few large files",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pack.add_argument("images", metavar="IMAGES", help="folder or URI of images, clear or hazy")
    pack.add_argument("output", metavar="OUT", help="folder or URI to write to: empty, or an earlier pack")
    pack.add_argument("--depth", metavar="DEPTH", help="folder or URI of their depth maps, paired by stem")
    pack.add_argument(
        "--shard-mib", type=at_least(1), default=128, metavar="N", help="size of a file in MiB (default 128)"
    )
    pack.add_argument("--keep-png", action="store_true", help="leave depth maps in PNG as they are")
    pack.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    pack.set_defaults(command=_pack)


def _pack(args: argparse.Namespace) -> int:
    with using_ray():
        _plan_and_pack(args)
    return DONE


def _plan_and_pack(args: argparse.Namespace) -> None:
    import time

    from corun_ray.service.cluster import connect as cluster
    from corun_ray.service.data.packing import find_written_shards, pack, plan_pack
    from corun_ray.service.telemetry.console import Console, duration

    console, started_s = Console(), time.monotonic()
    plan = plan_pack(args.images, args.output, args.depth, args.shard_mib, args.keep_png)
    there = find_written_shards(plan)
    facts = {"images": f"{plan.num_images} below {plan.images}, {plan.num_bytes / 2**20:.1f} MiB"}
    if plan.depth is not None:
        facts["images"] += f" with their depth below {plan.depth}"
    facts["output"] = f"{plan.output}: {len(plan.shards)} shards, {len(there)} of them there already"
    if args.dry_run:
        console.header("pack, dry run", facts)
        _name_left_out(plan.skipped, console)
        return
    facts["on"] = cluster.connect()
    console.header("pack", facts)
    packed = pack(plan, there, lambda done, total: console.progress(done, total, "image"))
    _name_left_out(packed.skipped, console)
    console.footer(
        f"done: {packed.images} images in {packed.shards} shards, {packed.num_bytes / 2**20:.1f} MiB",
        {"left out": str(len(packed.skipped)), "took": duration(time.monotonic() - started_s)},
    )


def _name_left_out(left_out: dict[str, str], console: "Console") -> None:
    for uri, reason in list(left_out.items())[:NAMED_LEFT_OUT]:
        console.say(f"  left out: {uri}: {reason}")
    if len(left_out) > NAMED_LEFT_OUT:
        console.say(f"  left out: {len(left_out) - NAMED_LEFT_OUT} more")
