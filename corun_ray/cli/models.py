"""`corun-ray dehaze`, `evaluate`, `promote` and `pull`. Heavy imports happen in the command that needs them."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from corun_ray.cli.common import DONE, FAILED, using_ray
from corun_ray.core.errors import UserError

SOURCE_HELP = "models:/NAME@ALIAS, runs:/…, a checkpoint folder or a .pth"
FORMATS = ("keep", "png", "jpg", "tif", "webp")

DEHAZE = """\
Dehazes every image below INPUT into OUTPUT, on the Ray cluster of RAY_ADDRESS or here. Names, folders, sizes and
formats stay; 16 bits stay 16 bits (PNG, TIFF); the EXIF orientation is applied, colour profile and EXIF are kept.
What is written is the restoration alone: an alpha channel is dropped.

An image too large for --memory-mib is restored in bands, a much too large one in tiles, which takes several times as
long. Their attention is that of the whole image, so that there are no seams. Files that cannot be used are named at the
end, the rest is done."""

DEHAZE_EXAMPLES = """\
examples:
  corun-ray dehaze photos out --model models:/corun@champion
  corun-ray dehaze s3://haze/raw s3://haze/clear --model models:/corun/3 --resume
  corun-ray dehaze photos out --model net.pth --transmission --format png"""

EVALUATE = """\
Measures baselines and models on a folder of images, on the Ray cluster of RAY_ADDRESS or here, and prints means with
95 % bootstrap intervals and how each compares with the first model, image by image. Every value goes into
STORAGE/evaluate-DATE/metrics.csv and .parquet, a contact sheet beside them.

psnr, ssim and fade need no weights. Any other metric of pyiqa (brisque, niqe, nima, musiq, lpips, ...) takes its files
from --weights, a folder or URI that `corun-ray weights` fills and checks."""

EVALUATE_EXAMPLES = """\
examples:
  corun-ray evaluate photos                                             haze density of photographs as they are
  corun-ray evaluate demo/hazy --truth demo/hazy_truth --model models:/corun-demo@champion
  corun-ray evaluate s3://haze/rtts --metrics fade,brisque,nima,musiq --weights s3://haze/weights \\
      --model new=models:/corun@candidate --model old=models:/corun@champion --against old"""


PROMOTE = """\
Moves the alias `champion` of a registered model to one of its versions. With --if-better it moves only where the
held-out images of both trainings show the version to be better than the champion, by a sign-flip test of the paired
differences at 5 %; else says why not and exits with 1. Six images or more are needed to show anything."""

PROMOTE_EXAMPLES = """\
examples:
  corun-ray promote corun 7
  corun-ray promote corun candidate --if-better val/fade"""

PULL = """\
Writes model.safetensors (weights), config.json (the network), and, of a registered model, README.md (its card) with
pictures, job.yaml and validation.csv. DIR can be used as --model and as network.init."""


def add_model_commands(commands: "argparse._SubParsersAction") -> None:
    """Adds the commands that use trained models to the parsers of `corun-ray`."""
    for add in (_add_dehaze, _add_evaluate, _add_promote, _add_pull):
        add(commands)


def add_command(
    commands: "argparse._SubParsersAction", name: str, help: str, text: str, examples: str = ""
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=text, epilog=examples, formatter_class=raw
    )
    parser.add_argument(
        "--tracking",
        default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db",
        metavar="URI",
        help="MLflow server of models:/ and runs:/ (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)",
    )
    return parser


def _add_dehaze(commands: "argparse._SubParsersAction") -> None:
    dehaze = add_command(commands, "dehaze", "dehaze a folder of images", DEHAZE, DEHAZE_EXAMPLES)
    dehaze.add_argument("input", metavar="INPUT", help="folder or URI of images")
    dehaze.add_argument("output", metavar="OUTPUT", help="folder or URI to write to")
    dehaze.add_argument("--model", required=True, metavar="SOURCE", help=SOURCE_HELP)
    dehaze.add_argument("--resume", action="store_true", help="pass over images that are in OUTPUT already")
    dehaze.add_argument(
        "--format", choices=FORMATS, default="keep", help="of the files written (default keep: as they were)"
    )
    dehaze.add_argument(
        "--transmission", action="store_true", help="also write NAME.transmission.png: 16 bit grey, 65535 is clear air"
    )
    dehaze.add_argument(
        "--stages",
        action="store_true",
        help="also write NAME.stages.png: every stage's scene, transmission and re-hazed image (CORUN only)",
    )
    dehaze.add_argument(
        "--memory-mib",
        type=int,
        metavar="N",
        help="memory of one image at work; larger ones go in bands or tiles (default 2816, or 3/4 of a GPU's)",
    )
    dehaze.set_defaults(command=_dehaze)


def _add_evaluate(commands: "argparse._SubParsersAction") -> None:
    evaluate = add_command(commands, "evaluate", "measure models on a folder of images", EVALUATE, EVALUATE_EXAMPLES)
    evaluate.add_argument("input", metavar="INPUT", help="folder or URI of hazy images")
    evaluate.add_argument("--truth", metavar="DIR", help="folder or URI of their clear truth, paired by stem")
    evaluate.add_argument(
        "--metrics", type=_listed, metavar="a,b", help="default: fade, and psnr and ssim where there is a truth"
    )
    evaluate.add_argument(
        "--model",
        action="append",
        default=[],
        dest="models",
        metavar="[NAME=]SOURCE",
        help="a model, as for dehaze, and what to call it; may be repeated",
    )
    evaluate.add_argument(
        "--baselines", type=_listed, metavar="a,b", help="hazy and dark_channel (default: both); '' for none"
    )
    evaluate.add_argument("--against", metavar="NAME", help="what the others are compared with (default: first model)")
    evaluate.add_argument("--weights", metavar="DIR", help="folder or URI of pyiqa's weights")
    evaluate.add_argument(
        "--storage", default="runs", metavar="DIR", help="folder or URI for the tables (default runs)"
    )
    evaluate.set_defaults(command=_evaluate)


def _add_promote(commands: "argparse._SubParsersAction") -> None:
    promote = add_command(commands, "promote", "make a version of a model its champion", PROMOTE, PROMOTE_EXAMPLES)
    promote.add_argument("name", metavar="NAME", help="registered model")
    promote.add_argument("version", metavar="VERSION", help="a number, or an alias such as candidate")
    promote.add_argument(
        "--if-better", metavar="METRIC", help="only where this metric of the held-out images shows it: val/fade, ..."
    )
    promote.set_defaults(command=_promote)


def _add_pull(commands: "argparse._SubParsersAction") -> None:
    pull = add_command(commands, "pull", "write a model as plain files", PULL)
    pull.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    pull.add_argument("folder", type=Path, metavar="DIR", help="where to write them; must be new or empty")
    pull.set_defaults(command=_pull)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _dehaze(args: argparse.Namespace) -> int:
    section = {key: getattr(args, key) for key in ("input", "output", "model", "format", "transmission", "stages")}
    tree = {"kind": "dehaze", "name": "images", "dehaze": section | {"memory_mib": args.memory_mib}}
    return run_described(tree, args.tracking, args.resume)


def run_described(tree: dict[str, Any], tracking: str, resume: bool = False) -> int:
    """Runs a job that the command line describes."""
    from corun_ray.config.loading import job_of
    from corun_ray.service.jobs import run_jobs
    from corun_ray.service.telemetry.console import Console

    with using_ray():
        run_jobs([job_of(tree | {"tracking": {"uri": tracking}})], Console(), resume=resume)
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    named = [_named(text) for text in args.models]
    if twice := {name for name, _ in named if [other for other, _ in named].count(name) > 1}:
        raise UserError(f"--model: {', '.join(sorted(twice))} is the name of several (NAME=SOURCE gives another)")
    section: dict[str, Any] = {"hazy": args.input, "clear": args.truth, "models": dict(named)}
    optional = {"metrics": args.metrics, "baselines": args.baselines, "against": args.against, "weights": args.weights}
    section |= {key: value for key, value in optional.items() if value is not None}
    tree = {"kind": "evaluate", "name": "evaluate", "storage": args.storage, "evaluate": section}
    return run_described(tree, args.tracking)


def _named(text: str) -> tuple[str, str]:
    """`NAME=SOURCE`, or a bare source, which is called by what its last parts say."""
    name, mark, source = text.partition("=")
    if mark and "/" not in name:
        return name, source
    said = text.lower().rstrip("/")
    return re.sub(r"[^a-z0-9._-]+", "-", said.partition(":/")[2] or said).strip("-._") or "model", text


def _promote(args: argparse.Namespace) -> int:
    from corun_ray.service.models.registry import Registry, promote

    decision = promote(Registry(args.tracking), args.name, args.version, args.if_better)
    is_now = "is now the champion" if decision.moves else "not promoted"
    print(f"{args.name} {args.version}: {is_now}: {decision.reason}")
    return DONE if decision.moves else FAILED


def _pull(args: argparse.Namespace) -> int:
    from corun_ray.service.models.sources import pull_model

    for path in pull_model(args.source, args.folder, args.tracking):
        print(path)
    return DONE
