"""`corun-ray dehaze | evaluate | depth | promote | pull | serve`: uses of trained models."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from corun_ray.cli.command import App, parse_whole_number
from corun_ray.cli.common import DEFAULT_TRACKING, DONE, FAILED, SOURCE_HELP, Tracking, ask_for_cluster, run_with_ray
from corun_ray.core.choices import PulledFormat
from corun_ray.core.errors import UserError

DEHAZE_EXAMPLES = """\
examples:
  corun-ray dehaze photos out --model corun-small
  corun-ray dehaze photos out --model models:/corun@champion
  corun-ray dehaze s3://haze/raw s3://haze/out --model models:/corun/3 --resume
  corun-ray dehaze photos out --model net.pth --transmission --format png"""

EVALUATE_EXAMPLES = """\
examples:
  corun-ray evaluate photos           haze density of photographs as they are
  corun-ray evaluate demo/hazy --truth demo/hazy_truth \\
      --model models:/corun-demo@champion
  corun-ray evaluate SOTS/outdoor/hazy --truth SOTS/outdoor/gt \\
      --match '^([^_]+)'
  corun-ray evaluate demo/hazy --truth demo/hazy_truth \\
      --model corun-small --model theirs=results/theirs
  corun-ray evaluate s3://haze/rtts --metrics fade,brisque,nima,musiq \\
      --weights s3://haze/weights --model new=models:/corun@candidate \\
      --model old=models:/corun@champion --against old
  corun-ray evaluate rtts/images --boxes rtts/annotations --weights weights \\
      --detector fasterrcnn_resnet50_fpn --model corun-small"""

DEPTH_EXAMPLES = """\
examples:
  corun-ray weights fetch weights depth
  corun-ray depth clear depth --weights weights
  corun-ray depth s3://haze/clear s3://haze/depth --weights s3://haze/weights
  corun-ray depth clear depth --weights weights --model glpn-kitti --resume"""

PROMOTE_EXAMPLES = """\
examples:
  corun-ray promote corun 7
  corun-ray promote corun candidate --if-better val/fade"""

SERVE_EXAMPLES = """\
examples:
  corun-ray serve models:/corun@champion
  corun-ray serve net.pth --port 8080 --replicas 2
  corun-ray serve models:/corun/3 --replicas 1,4 --gpus-per-replica 0.5
  curl --data-binary @hazy.jpg -H 'Content-Type: image/jpeg' \\
      http://127.0.0.1:8000/dehaze -o clear.jpg"""

app = App()


@app.command(epilog=DEHAZE_EXAMPLES)
def dehaze(
    images: Annotated[str, typer.Argument(metavar="INPUT", help="folder or URI of images, or one image")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="folder or URI to write to, not INPUT itself")],
    model: Annotated[str, typer.Option("--model", metavar="SOURCE", help=SOURCE_HELP)],
    # What is written, and how.
    resume: Annotated[bool, typer.Option("--resume", help="skip images that are in OUTPUT already")] = False,
    file_format: Annotated[
        Literal["keep", "png", "jpg", "tif", "webp"],
        typer.Option("--format", help="of the files written; keep: as they were"),
    ] = "keep",
    transmission: Annotated[
        bool,
        typer.Option("--transmission", help="also write NAME.transmission.png: 16 bit grey, 65535 is clear air"),
    ] = False,
    stages: Annotated[
        bool,
        typer.Option(
            "--stages",
            help="also write NAME.stages.png: every stage's scene, transmission and re-hazed image (CORUN only)",
        ),
    ] = False,
    self_ensemble: Annotated[
        bool,
        typer.Option("--self-ensemble", help="mean over eight flips and turns of each image: 8 times as long"),
    ] = False,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            "--memory-mib",
            metavar="N",
            help="memory of one image at work; larger ones go in bands or tiles (default 2816, or 3/4 of a GPU's)",
        ),
    ] = None,
    tracking: Tracking = DEFAULT_TRACKING,
) -> int:
    """Dehaze a folder of images.

    Dehazes every image below INPUT into OUTPUT, on the Ray cluster of RAY_ADDRESS or here. Names, folders, sizes and
    formats stay; 16 bits stay 16 bits (PNG, TIFF); the EXIF orientation is applied, colour profile and EXIF are kept
    (TIFF: the profile alone). An alpha channel and a profile of other colours than RGB are dropped with a word.

    An image too large for --memory-mib is restored in bands, a much too large one in tiles, which takes several times
    as long. Bands and tiles use the attention of the whole image, so that there are no seams. Networks other than CORUN
    work in tiles that overlap; where one looks further than their margins, a line says so.

    Files that cannot be used are skipped and named at the end, files of other kinds are counted; where not one image
    can be used, the exit code is 1. An OUTPUT inside INPUT is no input.
    """
    # The keys of a job file's section.
    section = {
        "input": images,
        "output": output,
        "model": model,
        "format": file_format,
        "transmission": transmission,
        "stages": stages,
        "self_ensemble": self_ensemble,
        "memory_mib": memory_mib,
    }
    return run_described({"kind": "dehaze", "name": "images", "dehaze": section}, tracking, resume)


@app.command(epilog=EVALUATE_EXAMPLES)
def evaluate(
    images: Annotated[str, typer.Argument(metavar="INPUT", help="folder or URI of hazy images, or one image")],
    # What is measured.
    truth: Annotated[
        str | None,
        typer.Option("--truth", metavar="DIR", help="folder or URI of their clear truth, paired by stem or --match"),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            metavar="REGEX",
            help="the text of its group pairs hazy and clear names: '^([^_]+)' (docs/datasets.md)",
        ),
    ] = None,
    match_clear: Annotated[
        str | None,
        typer.Option("--match-clear", metavar="REGEX", help="the same for clear names (default: that of --match)"),
    ] = None,
    crop_truth: Annotated[
        bool,
        typer.Option("--crop-truth", help="take the centre of a truth that has a border (SOTS indoor)"),
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="a,b", help="default: fade, and psnr and ssim where there is a truth"),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[NAME=]SOURCE",
            help="a model, as for dehaze, or a folder or URI of another method's results, and what to call it; may be "
            "repeated",
        ),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option("--baselines", metavar="a,b", help="hazy, untrained, dark_channel (default: all); '' for none"),
    ] = None,
    self_ensemble: Annotated[
        bool, typer.Option("--self-ensemble", help="models restore by the mean over eight flips and turns")
    ] = False,
    # What it is compared with, and where the results go.
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="NAME", help="what the others are compared with (default: first model)"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="DIR", help="folder or URI of weights: pyiqa's and the detector's"),
    ] = None,
    # Boxes that a detector is to find.
    detector: Annotated[
        str | None,
        typer.Option("--detector", metavar="NAME", help="detector of torchvision, such as fasterrcnn_resnet50_fpn"),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option("--boxes", metavar="PATH", help="true boxes: folder of VOC's .xml, or COCO's .json"),
    ] = None,
    box_classes: Annotated[
        str | None,
        typer.Option("--box-classes", metavar="a,b", help="classes of the boxes to measure (default: all)"),
    ] = None,
    detector_file: Annotated[
        str | None,
        typer.Option(
            "--detector-file", metavar="FILE", help="your own state dict in --weights (default: torchvision's)"
        ),
    ] = None,
    detector_classes: Annotated[
        str | None,
        typer.Option("--detector-classes", metavar="a,b", help="its classes, numbered from 1 (default: COCO's)"),
    ] = None,
    storage: Annotated[str, typer.Option("--storage", metavar="DIR", help="folder or URI for the tables")] = "runs",
    tracking: Tracking = DEFAULT_TRACKING,
) -> int:
    """Measure models on a folder of images.

    Measures baselines and models on a folder of images, on the Ray cluster of RAY_ADDRESS or here, and prints means
    with 95 % bootstrap intervals and how each compares with the first model, image by image. Every value goes into
    STORAGE/evaluate-DATE/metrics.csv and .parquet, a contact sheet beside them.

    A folder of results holds an image for each image of INPUT, of its size and named like it but for the suffix.

    psnr and ssim rate 8-bit RGB pictures, scaled to [0, 1]. psnr is of the error over all pixels and channels. ssim has
    a Gaussian window of 11 px and sigma 1.5, only where it fits, and is the mean over the channels.

    All means and differences of a metric are over the same images: those where every model has a finite value. The
    others are named, for example one whose result equals its truth: its psnr is infinite.

    psnr, ssim and fade need no weights. Any other metric of pyiqa (brisque, niqe, nima, musiq, lpips, ...) takes its
    files from --weights, a folder or URI that `corun-ray weights` fills and checks.

    With --detector and --boxes, a detector looks for boxes in every picture: average precision of each model, with
    intervals, and its difference from the first model.
    """
    # The keys of a job file's section.
    section: dict[str, Any] = {"hazy": images, "clear": truth, "models": name_models(models or [])}
    section |= {"match": match, "match_clear": match_clear, "crop_truth": crop_truth, "self_ensemble": self_ensemble}

    # The defaults of what is not given are those of a job file.
    optional = {
        "metrics": split_names(metrics),
        "baselines": split_names(baselines),
        "against": against,
        "weights": weights,
        "detector": detector,
        "boxes": boxes,
        "box_classes": split_names(box_classes),
        "detector_file": detector_file,
        "detector_classes": split_names(detector_classes),
    }
    section |= {key: value for key, value in optional.items() if value is not None}
    return run_described({"kind": "evaluate", "name": "evaluate", "storage": storage, "evaluate": section}, tracking)


@app.command(epilog=DEPTH_EXAMPLES)
def depth(
    images: Annotated[str, typer.Argument(metavar="CLEAR", help="folder or URI of clear photographs, or one")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="folder or URI to write the depth maps to")],
    weights: Annotated[
        str, typer.Option("--weights", metavar="DIR", help="folder or URI of weights, which holds the model")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="folder below DIR: a depth estimator of transformers")
    ] = "depth-anything-v2-small",
    file_format: Annotated[
        Literal["npy", "png"], typer.Option("--format", help="npy: float16; png: 16-bit grey")
    ] = "npy",
    depth_kind: Annotated[
        Literal["inverse", "metres"] | None,
        typer.Option("--depth-kind", help="what the model predicts (default: as its type tells)"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="skip photographs whose maps are in OUT already")] = False,
) -> int:
    """Estimate the depth of clear photographs, for training.

    Writes a depth map for every photograph below CLEAR into OUT, on the Ray cluster of RAY_ADDRESS or here, of the
    same name, folder and shape, and no larger than the model sees. A job then trains on data.clear: CLEAR and
    data.depth: OUT.

    Most models, Depth Anything V2 too, give inverse depth without a unit: larger is nearer, scaled to [0, 1] in each
    photograph. Some give metres: larger is farther; a PNG has them in steps of 1/256, up to 256. The last lines and
    OUT/depth.json tell which data.depth_kind the maps have. OUT/contact_sheet.jpg shows some of them, yellow is near.

    DIR/NAME has the files config.json, preprocessor_config.json and model.safetensors as Hugging Face hosts them, and
    an index (`corun-ray weights`). Files that cannot be used are skipped and named at the end.
    """
    # The keys of a job file's section.
    section = {
        "input": images,
        "output": output,
        "weights": weights,
        "model": model,
        "format": file_format,
        "depth_kind": depth_kind,
    }
    return run_described({"kind": "depth", "name": "photographs", "depth": section}, DEFAULT_TRACKING, resume)


@app.command(epilog=PROMOTE_EXAMPLES)
def promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="registered model")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a number, or an alias such as candidate")],
    if_better: Annotated[
        str | None,
        typer.Option(
            "--if-better",
            metavar="METRIC",
            help="only where this metric of the validation images shows it: val/fade, ...",
        ),
    ] = None,
    tracking: Tracking = DEFAULT_TRACKING,
) -> int:
    """Make a version of a model its champion.

    Moves the alias `champion` of a registered model to one of its versions. With --if-better it moves only where the
    validation images of both trainings show the version to be better than the champion, by a sign-flip test of the
    paired differences at 5 %; else says why not and exits with 1. Six images or more are needed to show anything.
    """
    from corun_ray.service.models.tracking import connect_to_mlflow

    # A wrong password need not wait for the imports below, which take seconds.
    connect_to_mlflow(tracking)

    from corun_ray.service.models import registry

    decision = registry.promote(registry.Registry(tracking), name, version, if_better)
    outcome = "is now the champion" if decision.moves else "not promoted"
    print(f"{name} {version}: {outcome}: {decision.reason}")
    return DONE if decision.moves else FAILED


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to write them; must be new or empty")],
    half: Annotated[
        bool,
        typer.Option("--half", help="write the weights as float16: half the size, rounded at the fourth digit"),
    ] = False,
    file_format: Annotated[
        PulledFormat,
        typer.Option("--format", help="onnx: a graph for programs without torch, with free sizes"),
    ] = "safetensors",
    tracking: Tracking = DEFAULT_TRACKING,
) -> int:
    """Write a model as plain files.

    Writes model.safetensors (weights), config.json (the network), and, of a registered model, README.md (its card)
    with pictures, job.yaml and validation.csv. DIR can be used as --model and as network.init.

    With --format onnx, writes model.onnx and model.json (its inputs and outputs) in their place. The file takes batches
    of images of any size. It is compared with torch where onnxruntime is installed. An export takes about a minute.
    """
    from corun_ray.service.models.tracking import MLFLOW_SCHEMES, connect_to_mlflow

    # A wrong password need not wait for the imports below, which take seconds.
    if source.startswith(MLFLOW_SCHEMES):
        connect_to_mlflow(tracking)

    from corun_ray.service.models import sources

    for path in sources.pull_model(source, folder, tracking, half, file_format):
        print(path)
    return DONE


def parse_replicas(text: str) -> int | tuple[int, ...]:
    """Convert `2`, or `1,4` for a range, to numbers."""
    numbers = tuple(parse_whole_number(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    model: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="of the application")] = "dehazing",
    # Where it listens.
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDRESS", help="where to listen (default 127.0.0.1: this machine alone)"),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="port (default 8000)")] = None,
    path: Annotated[
        str | None, typer.Option("--path", metavar="PATH", help="path below which it answers (default /)")
    ] = None,
    # What the model runs on.
    replicas: Annotated[
        Any,
        typer.Option(
            "--replicas",
            metavar="N|LOW,HIGH",
            parser=parse_replicas,
            help="copies of the model, or as many of LOW to HIGH as are needed (default 1)",
        ),
    ] = None,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option("--gpus-per-replica", metavar="N", help="GPUs of a copy, also 0.5 (default 0: CPU)"),
    ] = None,
    cpus_per_replica: Annotated[
        float | None,
        typer.Option("--cpus-per-replica", metavar="N", help="CPUs of a copy, and its threads (default 1)"),
    ] = None,
    # How requests are put together, and what is refused.
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", metavar="N", help="images of equal size that are restored together (default 4)"),
    ] = None,
    batch_wait_s: Annotated[
        float | None,
        typer.Option("--batch-wait-s", metavar="S", help="how long an image waits for others (default 0.01)"),
    ] = None,
    max_upload_mib: Annotated[
        int | None, typer.Option("--max-upload-mib", metavar="N", help="largest file (default 32)")
    ] = None,
    max_megapixels: Annotated[
        float | None, typer.Option("--max-megapixels", metavar="N", help="largest image (default 25)")
    ] = None,
    max_queued: Annotated[
        int | None,
        typer.Option("--max-queued", metavar="N", help="requests that may wait, more get 503 (default 32)"),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout-s", metavar="S", help="when a request is given up (default 300)"),
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            "--memory-mib",
            metavar="N",
            help="memory of a batch at work, larger images are processed in parts (default 2816, or 3/4 of a GPU's)",
        ),
    ] = None,
    tracking: Tracking = DEFAULT_TRACKING,
) -> int:
    """Serve a model over HTTP.

    Answers POST /dehaze with the restored image, and gives people a page to drop photographs on, on Ray Serve: on the
    cluster of RAY_ADDRESS or here. It runs until Ctrl-C, which takes it away again.

    There is no authentication: by default it listens at this machine's loopback address alone. The keys of a job of
    kind serve (`corun-ray check --keys`) are these options.
    """
    optional = {
        "host": host,
        "port": port,
        "path": path,
        "replicas": replicas,
        "gpus_per_replica": gpus_per_replica,
        "cpus_per_replica": cpus_per_replica,
        "max_batch": max_batch,
        "batch_wait_s": batch_wait_s,
        "max_upload_mib": max_upload_mib,
        "max_megapixels": max_megapixels,
        "max_queued": max_queued,
        "timeout_s": timeout_s,
        "memory_mib": memory_mib,
    }
    # The defaults of what is not given are those of a job file.
    section = {"model": model} | {key: value for key, value in optional.items() if value is not None}
    return run_described({"kind": "serve", "name": name, "serve": section}, tracking)


def run_described(tree: dict[str, Any], tracking: str, resume: bool = False) -> int:
    """Run a job that the command line describes.

    `tree` is what a job file would hold.
    """
    from corun_ray.config.loading import build_job

    # Report a mistake before the imports below, which take seconds.
    job = build_job(tree | {"tracking": {"uri": tracking}})
    ask_for_cluster()

    run_with_ray([job], resume=resume)
    return DONE


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Return the names of a list such as `psnr,ssim`."""
    # '' is a list of nothing: `--baselines ''`.
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def name_models(texts: Sequence[str]) -> dict[str, str]:
    """Return the models that the command line names, by name.

    Raises `UserError` where two have the same name.
    """
    models: dict[str, str] = {}
    twice: set[str] = set()
    for text in texts:
        name, source = name_model(text)
        if name in models:
            twice.add(name)
        models[name] = source

    if twice:
        raise UserError(f"--model: {', '.join(sorted(twice))} is the name of several (NAME=SOURCE gives another)")
    return models


def name_model(text: str) -> tuple[str, str]:
    """Return name and source of `NAME=SOURCE` or of a bare source."""
    # An = behind a / is part of a path or URI.
    name, mark, source = text.partition("=")
    if mark and "/" not in name:
        return name, source

    # A bare source is named after its path: models:/corun@champion becomes corun-champion.
    lower = text.lower().rstrip("/")
    path = lower.partition(":/")[2] or lower
    return re.sub(r"[^a-z0-9._-]+", "-", path).strip("-._") or "model", text
