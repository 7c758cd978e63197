"""`corun-ray bench`: measuring parts of the service on this machine.

`step`, `dehaze` and `scaling` need torch, numpy, typer and rich alone.
"""

import math
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from corun_ray.cli.command import App
from corun_ray.cli.common import (
    DONE,
    WRITE_JSON,
    ask_for_cluster,
    at_least,
    multiple_of,
    parse_positive,
    parse_share,
    using_ray,
)
from corun_ray.core.choices import DepthKind, Encoding, Precision, SynthesisPlace
from corun_ray.core.errors import UserError

if TYPE_CHECKING:
    from corun_ray.bench.label_pool.figures import PoolSettings
    from corun_ray.config.jobs import TrainingJob
    from corun_ray.service.storage import Location


class ImageSize(NamedTuple):
    """Height and width of an image."""

    height_px: int
    width_px: int


SIZES = {"1080p": ImageSize(1088, 1920), "12mp": ImageSize(3008, 4000), "24mp": ImageSize(4000, 6000)}
"""Named sizes, multiples of 16 px."""
SMALLEST_SIZE_PX = 16
DEFAULT_GPUS = [8, 64, 512]
DEFAULT_LINKS_GBIT = [25.0, 100.0, 200.0]
DEFAULT_PROCESSES = [2, 4]
DEFAULT_STEP_S = 0.3
DEFAULT_SHARDS = [1, 2, 4]

MIN_LABELS, MIN_SIDE_PX = 60, 8
MIN_IN_MEMORY = 200
"""Labels that memory must have room for, so that there is something to read from it."""
MIN_PATCH_PX = 32

EXAMPLES = """\
examples:
  corun-ray bench step --size 96 --stages 2   a first look, half a minute
  corun-ray bench step --precision bf16 --compile --batch 2 --json step.json
  corun-ray bench step --method pretrain --trace step.json.gz
                                 for chrome://tracing or ui.perfetto.dev
  corun-ray bench dehaze --sizes 1080p 12mp --memory-mib 2816
  corun-ray bench scaling --step-s 0.3 --gpus 8 64 512 --link-gbit 100
  corun-ray bench scaling --step-json step.json --shards 8
                                 the step that bench step measured"""

STREAM_EXAMPLES = """\
examples:
  corun-ray bench stream         a minute
  corun-ray bench stream --data s3://haze/rgb_500 --depth s3://haze/depth_500
  corun-ray bench stream --data clear --hazy urhi --json stream.json"""

POOL_EXAMPLES = """\
examples:
  corun-ray bench pool                            about 5 minutes on 2 cores
  corun-ray bench pool --labels 600 --shards 1 2  a first look
  corun-ray bench pool --labels 100000 --storage /data --json pool.json
                                                  33 GB on disk, 20 minutes

What it writes below --storage is deleted at the end, and when Ctrl-C stops it."""

app = App()
bench = App(help="Measure parts of the service on this machine.")
app.add_typer(bench, name="bench")

Method = Literal["pretrain", "colabator"]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help=WRITE_JSON)]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="D", help="cpu, cuda or cuda:1 (default: cuda where there is one)"),
]
Stages = Annotated[int, typer.Option("--stages", metavar="K", parser=at_least(2), help="of the network")]
Width = Annotated[int, typer.Option("--width", metavar="W", parser=at_least(2), help="of the network")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", parser=at_least(1), help="medians are of these")]
Arithmetic = Annotated[Precision, typer.Option("--precision", help="of the network; auto: bf16 where it is fast")]
Compile = Annotated[bool, typer.Option("--compile", help="by torch.compile; takes minutes at first")]
Batch = Annotated[int, typer.Option("--batch", metavar="B", parser=at_least(1), help="images of each kind and GPU")]
WinRate = Annotated[
    float,
    typer.Option("--wins", metavar="SHARE", parser=parse_share, help="of the candidates; their blocks are rated"),
]


def parse_size(text: str) -> ImageSize:
    """Convert `1080p` or `1920x1080` to height and width."""
    if text in SIZES:
        return SIZES[text]

    # People say width first, arrays have height first.
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) >= SMALLEST_SIZE_PX):
        expected = f"{', '.join(SIZES)} or WIDTHxHEIGHT of {SMALLEST_SIZE_PX} px and more"
        raise ValueError(f"expected {expected}, got {text}")
    return ImageSize(int(height), int(width))


# --- step, dehaze, scaling: torch and numpy are enough ---


@contextmanager
def telling_mistakes() -> Iterator[None]:
    """Turn a ValueError of the benchmarks into a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"bench: {error}") from None


@bench.command("step", epilog=EXAMPLES)
def measure_step(
    # The step.
    method: Annotated[Method, typer.Option("--method", help="kind of training")] = "colabator",
    size_px: Annotated[int, typer.Option("--size", metavar="PX", parser=multiple_of(32), help="side of images")] = 288,
    batch: Batch = 1,
    win_rate: WinRate = 0.1,
    no_perceptual: Annotated[bool, typer.Option("--no-perceptual", help="leave VGG-19 out of the losses")] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="less memory, more time")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="also write a profiler's trace of one step")
    ] = None,
    # The network and how it is run.
    stages: Stages = 4,
    width: Width = 30,
    precision: Arithmetic = "fp32",
    compile_network: Compile = False,
    repeats: Repeats = 10,
    device: Device = None,
    json_file: JsonFile = None,
) -> int:
    """Measure a training step.

    Times steps on random images, by part: teacher, global and local scores, pool, student, losses, backward,
    optimizer and moving average. The scorers are those without weights; VGG-19 has random ones.

    The floor says what the counted arithmetic would take at the measured rate of large matrix products, and what the
    memory traffic would take at that of a copy if every operation had its own pass. Compiled code may need fewer.
    """
    from corun_ray.bench.run import find_device, resolve_precision, run_step
    from corun_ray.bench.step import StepSettings

    with telling_mistakes():
        torch_device = find_device(device)
        settings = StepSettings(
            method=method,
            size_px=size_px,
            batch=batch,
            stages=stages,
            width=width,
            precision=resolve_precision(precision, torch_device),
            compile=compile_network,
            perceptual=not no_perceptual,
            win_rate=win_rate,
            checkpoint_activations=checkpoint_activations,
            repeats=repeats,
            device=torch_device,
        )
        run_step(settings, json_file, trace)
    return DONE


@bench.command("dehaze", epilog=EXAMPLES)
def measure_dehazing(
    # The photographs.
    sizes: Annotated[
        list[ImageSize] | None,
        typer.Option(
            "--sizes",
            metavar="S ...",
            parser=parse_size,
            help=f"{', '.join(SIZES)} or WIDTHxHEIGHT (default 1080p)",
        ),
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            "--memory-mib",
            metavar="M",
            parser=at_least(1),
            help="for an image at work, else bands or tiles (default: whole)",
        ),
    ] = None,
    # The network and how it is run.
    stages: Stages = 4,
    width: Width = 30,
    precision: Arithmetic = "fp32",
    compile_network: Compile = False,
    repeats: Repeats = 3,
    device: Device = None,
    json_file: JsonFile = None,
) -> int:
    """Measure the restoration of photographs.

    Restores random images by a network with random weights: megapixels a second and the most memory, of the GPU's
    tensors or of the whole process.
    """
    from corun_ray.bench.dehaze import DehazeSettings
    from corun_ray.bench.run import find_device, resolve_precision, run_dehaze

    with telling_mistakes():
        torch_device = find_device(device)
        chosen = resolve_precision(precision, torch_device)

        # The same network on images of each size.
        settings: list[DehazeSettings] = []
        for size in sizes or [SIZES["1080p"]]:
            one = DehazeSettings(
                height_px=size.height_px,
                width_px=size.width_px,
                stages=stages,
                width=width,
                precision=chosen,
                compile=compile_network,
                memory_mib=memory_mib,
                repeats=repeats,
                device=torch_device,
            )
            settings.append(one)
        run_dehaze(settings, json_file)
    return DONE


@bench.command("scaling", epilog=EXAMPLES)
def work_out_scaling(
    # The step on one GPU.
    step_s: Annotated[
        float | None,
        typer.Option("--step-s", metavar="S", parser=parse_positive, help="on one GPU, candidates lose (default 0.3)"),
    ] = None,
    step_json: Annotated[
        Path | None,
        typer.Option("--step-json", metavar="FILE", help="of bench step --json: the step, by part"),
    ] = None,
    rating_s: Annotated[
        float | None,
        typer.Option(
            "--rating-s",
            metavar="S",
            parser=parse_positive,
            help="what rating an image's blocks adds (default 0.9 of the step)",
        ),
    ] = None,
    method: Annotated[Method, typer.Option("--method", help="kind of training")] = "colabator",
    batch: Batch = 1,
    # The GPUs and what joins them.
    gpus: Annotated[
        list[int], typer.Option("--gpus", metavar="N ...", parser=at_least(1), help="numbers of GPUs to compare")
    ] = DEFAULT_GPUS,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", metavar="N", parser=at_least(1), help="GPUs of a node")
    ] = 8,
    link_gbit: Annotated[
        list[float],
        typer.Option(
            "--link-gbit",
            metavar="G ...",
            parser=parse_positive,
            help="between nodes, all cards of a node together; a table each",
        ),
    ] = DEFAULT_LINKS_GBIT,
    link_latency_us: Annotated[
        float,
        typer.Option(
            "--link-latency-us", metavar="US", parser=parse_positive, help="a message between nodes, as NCCL counts"
        ),
    ] = 14,
    node_gbit: Annotated[
        float,
        typer.Option("--node-gbit", metavar="G", parser=parse_positive, help="within a node, as NCCL counts for A100s"),
    ] = 1880,
    node_latency_us: Annotated[
        float,
        typer.Option(
            "--node-latency-us", metavar="US", parser=parse_positive, help="a message within a node, as NCCL counts"
        ),
    ] = 4,
    # The network and its labels.
    stages: Stages = 4,
    width: Width = 30,
    size_px: Annotated[int, typer.Option("--size", metavar="PX", parser=multiple_of(32), help="side of labels")] = 288,
    encoding: Annotated[Encoding, typer.Option("--encoding", help="pool.encoding")] = "uint8",
    # The pool and the stream.
    shards: Annotated[int, typer.Option("--shards", metavar="S", parser=at_least(1), help="pool.shards")] = 1,
    win_rate: WinRate = 0.1,
    share_blocks: Annotated[bool, typer.Option("--share-blocks", help="as with coherence.share_blocks")] = False,
    samples_per_s: Annotated[
        float, typer.Option("--samples-per-s", metavar="R", parser=parse_positive, help="a core's, of bench stream")
    ] = 36,
    # The check on this machine.
    no_check: Annotated[bool, typer.Option("--no-check", help="measure nothing")] = False,
    processes: Annotated[
        list[int], typer.Option("--processes", metavar="N ...", parser=at_least(2), help="of the check")
    ] = DEFAULT_PROCESSES,
    repeats: Repeats = 10,
    json_file: JsonFile = None,
) -> int:
    """Work out a step on many GPUs.

    Forecasts the time of a training step on many GPUs from its time on one: DDP's buckets of gradients in rings and
    trees behind the backward pass, the label pool's answers behind the teacher's time, and the wait for the worker
    that has most blocks to rate. Tells what costs most and which key of a job helps. The formulae are in
    corun_ray.bench.scaling_model.

    The step on one GPU is a measured one (--step-json), or --step-s with the shares of parts that a CPU showed. Give
    links a measured bandwidth, such as nccl-tests' bus bandwidth, for a forecast, or the nominal one for a bound.

    A check follows: gloo's all-reduce between processes of this machine and a backward pass with and without it,
    beside what the same formulae say (a minute on 2 cores; --no-check skips it).
    """
    # Both give the step on one GPU.
    if step_s is not None and step_json is not None:
        raise UserError("bench scaling: --step-json is not allowed with --step-s")

    from corun_ray.bench.run import read_step, run_scaling
    from corun_ray.bench.scaling import ScalingSettings, assume_step

    with telling_mistakes():
        settings = ScalingSettings(
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            link_gbit=link_gbit,
            link_latency_us=link_latency_us,
            node_gbit=node_gbit,
            node_latency_us=node_latency_us,
            method=method,
            stages=stages,
            width=width,
            size_px=size_px,
            encoding=encoding,
            shards=shards,
            win_rate=win_rate,
            share_blocks=share_blocks,
            samples_per_s=samples_per_s,
            processes=processes,
            repeats=repeats,
        )
        # The step on one GPU; a measured one brings its network along.
        if step_json is None:
            alone = assume_step(step_s or DEFAULT_STEP_S, batch, rating_s)
        else:
            settings, alone = read_step(step_json, settings, rating_s)
        run_scaling(settings, alone, not no_check, json_file)
    return DONE


# --- stream ---


@bench.command("stream", epilog=STREAM_EXAMPLES)
def measure_stream(
    # The images.
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="CLEAR", help="folder, pack or URI of clear images (default: rendered ones)"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            "--depth", metavar="DEPTH", help="folder, pack or URI of their depth (default: a procedural depth)"
        ),
    ] = None,
    depth_kind: Annotated[DepthKind, typer.Option("--depth-kind", help="what the depth is")] = "inverse",
    hazy: Annotated[
        str | None,
        typer.Option("--hazy", metavar="HAZY", help="folder, pack or URI of real hazy images, for Colabator's samples"),
    ] = None,
    synthesis: Annotated[
        SynthesisPlace,
        typer.Option("--synthesis", help="who makes the haze (data.synthesis); worker: only what the stream does then"),
    ] = "stream",
    # The measurement.
    patch_px: Annotated[
        int, typer.Option("--patch", metavar="PX", parser=multiple_of(16), help="side of a patch in pixels")
    ] = 288,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", parser=at_least(1), help="of a measurement, which is repeated"),
    ] = 50,
    repeats: Repeats = 5,
    json_file: JsonFile = None,
) -> int:
    """Measure how training samples are made.

    Tells how many training samples a second one core reads, decodes and synthesises, and where the time goes. Each of
    a job's data CPUs does that much; `corun-ray bench step` tells how much a GPU needs.

    Without --data, four photographs of 2 megapixels with depth are rendered first (20 s); pre-training and Colabator
    samples are measured, from a folder and from a pack. With --data, your images are measured, from a folder, a pack
    or a URI, with the time that a store takes to answer: pre-training samples, or with --hazy Colabator's.

    An image is a synthetic pair or a real hazy image; a Colabator sample has one of each.
    """
    # All mistakes at once, before anything heavy is imported.
    mistakes: list[str] = []
    if patch_px < MIN_PATCH_PX:
        mistakes.append(f"--patch: {patch_px} is too few (at least {MIN_PATCH_PX})")
    for option, value in (("--depth", depth), ("--hazy", hazy)):
        if value is not None and data is None:
            mistakes.append(f"{option}: needs --data, the clear images")
    mistakes += _find_missing_folders({"--json": json_file})
    if mistakes:
        raise UserError("\n".join(mistakes))

    from corun_ray.bench.stream import (
        StreamSettings,
        bench_stream,
        build_job,
        format_json,
        format_report,
        render_photographs,
    )
    from corun_ray.service.data.sample_maker import TooManyBadFiles
    from corun_ray.service.errors import JobFailed
    from corun_ray.service.telemetry.console import Console

    with using_ray(), Console() as console, tempfile.TemporaryDirectory(prefix="corun-bench-") as name:
        facts = {"samples": f"{samples}, {repeats} times", "patch": f"{patch_px} px"}
        if synthesis == "worker":
            facts["synthesis"] = "the training worker's, whose time is not measured here"
        console.header("bench stream", facts)

        # Jobs that read the user's images, or rendered ones.
        if data is not None:
            kind = "Colabator" if hazy else "pre-training"
            jobs = {kind: build_job(data, depth, depth_kind, hazy, patch_px, synthesis)}
        else:
            render_photographs(Path(name), lambda done, total: console.progress(done, total, "photograph"))
            jobs = _describe_rendered(Path(name), patch_px, synthesis)

        # The table comes when all are measured.
        total = len(jobs) * samples * repeats
        settings = StreamSettings(patch_px, samples, repeats)
        try:
            report = bench_stream(jobs, settings, lambda done, what: console.progress(done, total, "sample", [what]))
        except TooManyBadFiles as error:
            raise JobFailed(f"bench stream: {error}") from None

        if json_file:
            json_file.write_text(format_json(report))
        console.say(f"\n{format_report(report)}")
    return DONE


def _describe_rendered(folder: Path, patch_px: int, synthesis: SynthesisPlace) -> "dict[str, TrainingJob]":
    """Return jobs that read the rendered photographs, by name.

    Both kinds of training read them from a folder and from a pack.
    """
    from corun_ray.bench.stream import build_job

    clear, depth, pack = str(folder / "clear"), str(folder / "depth"), str(folder / "pack")
    return {
        "pre-training": build_job(clear, depth, "inverse", None, patch_px, synthesis),
        "Colabator": build_job(clear, depth, "inverse", clear, patch_px, synthesis),
        "pre-training, packed": build_job(pack, pack, "inverse", None, patch_px, synthesis),
        "Colabator, packed": build_job(pack, pack, "inverse", pack, patch_px, synthesis),
    }


# --- pool ---


@bench.command("pool", epilog=POOL_EXAMPLES)
def measure_pool(
    # The pools.
    labels: Annotated[
        int, typer.Option("--labels", metavar="N", parser=at_least(MIN_LABELS), help="labels in a pool")
    ] = 5000,
    side_px: Annotated[
        int, typer.Option("--side", metavar="PX", parser=at_least(MIN_SIDE_PX), help="side of a label in pixels")
    ] = 288,
    shards: Annotated[
        list[int],
        typer.Option(
            "--shards", metavar="S ...", parser=at_least(1), help="numbers of shards to compare, one pool each"
        ),
    ] = DEFAULT_SHARDS,
    encoding: Annotated[Encoding, typer.Option("--encoding", help="of the labels")] = "uint8",
    # What holds and uses them.
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="DIR",
            help="folder or URI, reached by all nodes, below which one pool at a time is saved "
            "(default: the temp folder)",
        ),
    ] = None,
    memory_mib: Annotated[
        int,
        typer.Option(
            "--memory-mib",
            metavar="M",
            parser=at_least(1),
            help="memory for labels in Ray's object store, of all shards together",
        ),
    ] = 4096,
    workers: Annotated[
        int, typer.Option("--workers", metavar="W", parser=at_least(1), help="of the simulated job")
    ] = 64,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PNG", help="also draw how costs grow with the number of labels"),
    ] = None,
) -> int:
    """Measure the label pool.

    Runs on this machine and needs no GPU, no data, no network.

    A pool for each number of shards is filled with synthetic labels and measured: offers, reads of labels in memory
    and of labels that only storage has, memory, snapshots, restoring, and how long the workers of a simulated job wait
    for it. The table tells of the full pools; --json and --plot also show how costs grow on the way there.

    With more labels than --memory-mib holds, storage has the others, as in a job with pool.memory_mib.
    """
    from corun_ray.bench.label_pool.figures import PoolSettings

    # The labels' size in bytes decides what fits.
    settings = PoolSettings(labels, side_px, tuple(shards), encoding, memory_mib, workers)
    place = storage or tempfile.gettempdir()

    # All mistakes at once, before Ray is started.
    mistakes: list[str] = []
    least_mib = math.ceil(MIN_IN_MEMORY * settings.label_bytes / 2**20)
    if memory_mib < least_mib:
        mistakes.append(f"--memory-mib: {memory_mib} is too few for such labels (at least {least_mib})")
    mistakes += _find_missing_folders({"--json": json_file, "--plot": plot_file})
    mistakes += _find_storage_mistakes(place, settings)
    if mistakes:
        raise UserError("\n".join(mistakes))

    ask_for_cluster()
    with using_ray():
        _fill_and_measure(settings, place, json_file, plot_file)
    return DONE


def _find_storage_mistakes(storage: str, settings: "PoolSettings") -> Sequence[str]:
    """Return why the labels cannot be saved there.

    Only local folders are looked at, not URIs.
    """
    if "://" in storage:
        return []
    if not Path(storage).is_dir():
        return [f"--storage: there is no folder {storage}"]

    # The largest pool there is at one time.
    needed, free = settings.labels * settings.label_bytes, shutil.disk_usage(storage).free
    if free < needed:
        return [f"--storage: {storage} has {free / 1e9:.1f} GB free, the labels may take {needed / 1e9:.1f} GB"]
    return []


def _fill_and_measure(settings: "PoolSettings", storage: str, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure a pool for each number of shards; print the table."""
    from corun_ray.bench.label_pool.report import format_json, format_report, plot
    from corun_ray.bench.label_pool.trial import bench_pool
    from corun_ray.service.cluster.connect import connect
    from corun_ray.service.errors import JobFailed
    from corun_ray.service.pool.client import PoolError
    from corun_ray.service.storage import locate
    from corun_ray.service.telemetry.console import Console

    total = settings.labels * len(settings.shards)
    with Console() as console, _scratch_folder(locate(storage)) as folder:
        # Ray starts here, when all that could be wrong was checked.
        place = connect()
        labels = f"{settings.labels} of {settings.side_px} px in {settings.encoding}"
        console.header("bench pool", {"labels": labels, "on": place, "storage": folder.uri})

        try:
            for report in bench_pool(
                settings, folder, lambda done, what: console.progress(done, total, "label", [what])
            ):
                # What is known already should outlast whatever ends a long run.
                if json_file:
                    json_file.write_text(format_json(report))
                if plot_file:
                    plot_file.write_bytes(plot(report))
        except PoolError as error:
            raise JobFailed(f"bench pool: {error}") from None

        console.say(f"\n{format_report(report)}")


@contextmanager
def _scratch_folder(storage: "Location") -> "Iterator[Location]":
    """Lend a new folder below a storage; delete it afterwards."""
    import ray

    folder = storage.child(f"corun-bench-{uuid.uuid4().hex[:12]}")
    try:
        yield folder
    finally:
        # Ray's processes might still write there.
        ray.shutdown()
        folder.delete()


def _find_missing_folders(files: dict[str, Path | None]) -> Sequence[str]:
    """Return a line for each file whose folder is missing."""
    mistakes: list[str] = []
    for option, file in files.items():
        if file is not None and not file.absolute().parent.is_dir():
            mistakes.append(f"{option}: there is no folder {file.absolute().parent}")
    return mistakes
