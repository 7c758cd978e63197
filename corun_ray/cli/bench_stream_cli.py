"""`corun-ray bench stream`. Heavy imports happen when it runs."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from corun_ray.cli.bench import at_least, multiple_of
from corun_ray.cli.common import DONE, using_ray
from corun_ray.core.errors import UserError

if TYPE_CHECKING:
    from corun_ray.config.jobs import TrainingJob


ABOUT = """\
Measures how many training samples a second one core reads, decodes and synthesises, and where the time goes. Each of
a job's data CPUs does that much; whether it is enough, `corun-ray bench step` tells.

Without --data it renders four photographs of 2 megapixels with depth first (20 s) and measures pre-training and
Colabator samples, from a folder and from a pack. With --data it measures yours, from a folder, a pack or a URI, the
time that a store takes to answer included: pre-training samples, or with --hazy Colabator's.

An image is a synthetic pair or a real hazy image; a Colabator sample has one of each."""

EXAMPLES = """\
examples:
  corun-ray bench stream                                                  a minute
  corun-ray bench stream --data s3://haze/rgb_500 --depth s3://haze/depth_500
  corun-ray bench stream --data clear --hazy urhi --samples 200 --json stream.json"""


def add_stream_bench(group: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `stream` to the parsers of `bench`."""
    stream = group.add_parser(
        "stream",
        help="measure how training samples are made",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stream.add_argument("--data", metavar="CLEAR", help="folder, pack or URI of clear images (default: rendered ones)")
    stream.add_argument(
        "--depth", metavar="DEPTH", help="folder, pack or URI of their depth (default: a procedural depth)"
    )
    stream.add_argument("--depth-kind", choices=("inverse", "metres"), default="inverse", help="(default inverse)")
    stream.add_argument(
        "--hazy", metavar="HAZY", help="folder, pack or URI of real hazy images, for Colabator's samples"
    )
    stream.add_argument(
        "--patch", type=multiple_of(16), default=288, metavar="PX", help="side of a patch in pixels (default 288)"
    )
    stream.add_argument(
        "--samples", type=at_least(1), default=50, metavar="N", help="of a measurement, which is repeated (default 50)"
    )
    stream.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="medians are of these (default 5)")
    stream.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    stream.set_defaults(command=_stream)


def _stream(args: argparse.Namespace) -> int:
    if mistakes := [*_mistakes(args)]:
        raise UserError("\n".join(mistakes))
    with using_ray():
        _measure(args)
    return DONE


def _mistakes(args: argparse.Namespace) -> Iterator[str]:
    if args.patch < 32:
        yield f"--patch: {args.patch} is too few (at least 32)"
    for option, value in (("--depth", args.depth), ("--hazy", args.hazy)):
        if value is not None and args.data is None:
            yield f"{option}: needs --data, the clear images"
    if args.json is not None and not args.json.absolute().parent.is_dir():
        yield f"--json: there is no folder {args.json.absolute().parent}"


def _measure(args: argparse.Namespace) -> None:
    from corun_ray.bench.stream import StreamSettings, as_json, bench_stream, render_photographs, table
    from corun_ray.service.data.sample_maker import TooManyBadFiles
    from corun_ray.service.errors import JobFailed
    from corun_ray.service.telemetry.console import Console

    console = Console()
    settings = StreamSettings(args.patch, args.samples, args.repeats)
    with tempfile.TemporaryDirectory(prefix="corun-bench-") as name:
        console.header(
            "bench stream", {"samples": f"{args.samples}, {args.repeats} times", "patch": f"{args.patch} px"}
        )
        if args.data is None:
            render_photographs(Path(name), lambda done, total: console.progress(done, total, "photograph"))
        jobs = _jobs(args, Path(name))
        total = len(jobs) * args.samples * args.repeats
        try:
            report = bench_stream(jobs, settings, lambda done, what: console.progress(done, total, "sample", [what]))
        except TooManyBadFiles as error:
            raise JobFailed(f"bench stream: {error}") from None
    if args.json:
        args.json.write_text(as_json(report))
    console.say(f"\n{table(report)}")


def _jobs(args: argparse.Namespace, rendered: Path) -> dict[str, "TrainingJob"]:
    """What is measured, by its name."""
    from corun_ray.bench.stream import job_of

    if args.data is not None:
        kind = "Colabator" if args.hazy else "pre-training"
        return {kind: job_of(args.data, args.depth, args.depth_kind, args.hazy, args.patch)}
    clear, depth, pack = (str(rendered / name) for name in ("clear", "depth", "pack"))
    return {
        "pre-training": job_of(clear, depth, "inverse", None, args.patch),
        "Colabator": job_of(clear, depth, "inverse", clear, args.patch),
        "pre-training, packed": job_of(pack, pack, "inverse", None, args.patch),
        "Colabator, packed": job_of(pack, pack, "inverse", pack, args.patch),
    }
