"""`corun-ray weights fetch | index | ls`. Heavy imports happen in the command that needs them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corun_ray.service.weights.folder import Wanted

JobNeeds = Callable[[argparse.Namespace], "Sequence[tuple[str | None, Wanted]]"]
"""The arguments of `ls` (`where`, a job file, and `set`) → its weights folders and the files wanted of each."""


def add_weights_commands(commands: "argparse._SubParsersAction", job_needs: JobNeeds) -> None:
    """Adds the command `weights` to the parsers of `corun-ray`."""
    about = "Folders of pretrained weights with an index, weights.json, of sizes and checksums."
    group = commands.add_parser("weights", help="fetch, index and list pretrained weights", description=about)
    subs = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    get = subs.add_parser("fetch", help="fill a local folder from the internet, by the libraries' own downloaders")
    get.add_argument("folder", metavar="DIR")
    get.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="daclip, vgg19, or a no-reference metric of pyiqa (default: daclip musiq vgg19)",
    )
    get.set_defaults(command=_fetch)

    index = subs.add_parser("index", help="write weights.json for the files of a folder or URI")
    index.add_argument("folder", metavar="DIR")
    index.set_defaults(command=_index)

    ls = subs.add_parser("ls", help="say what a job needs, or what a folder holds, and what is there")
    ls.add_argument("where", metavar="JOB.yaml|DIR")
    ls.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key.path=value",
        help="override a key of the job; may be repeated",
    )
    ls.set_defaults(command=lambda args: _ls(args, job_needs))


def listing(folder_uri: str | None, wanted: "Wanted") -> list[str]:
    """A table of `list_files`: file, size in MB, start of the SHA-256, state, needed by."""
    from corun_ray.service.weights.folder import list_files

    rows = list_files(folder_uri, wanted)
    width = max([len(row.name) for row in rows] + [4])
    lines = [f"{'file':<{width}}  {'MB':>8}  {'sha256':<12}  {'state':<12}  needed by"]
    for row in rows:
        size = "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f}"
        digest = (row.sha256 or "-")[:12]
        lines.append(f"{row.name:<{width}}  {size:>8}  {digest:<12}  {row.state:<12}  {row.needed_by}".rstrip())
    return lines


def _fetch(args: argparse.Namespace) -> int:
    from corun_ray.core.weights import WeightsError
    from corun_ray.service.weights.fetch import PUBLISHED, fetch

    if "://" in args.folder:
        raise WeightsError(f"{args.folder}: fetch fills a local folder; copy it to the bucket afterwards")
    fetch(Path(args.folder), args.what or PUBLISHED)
    return 0


def _index(args: argparse.Namespace) -> int:
    from corun_ray.service.weights.folder import index_folder

    index_folder(args.folder)
    print("\n".join(listing(args.folder, {})))
    return 0


def _ls(args: argparse.Namespace, job_needs: JobNeeds) -> int:
    """Exits with 1 where a wanted file cannot be used."""
    from corun_ray.service.weights.folder import describe_lacking

    is_job = args.where.endswith((".yaml", ".yml"))
    folders: Sequence[tuple[str | None, Wanted]] = job_needs(args) if is_job else [(args.where, {})]
    if not folders:
        print("needs no weights")
    for folder_uri, wanted in folders:
        print(f"{folder_uri or 'no weights folder'}:")
        print("\n".join(listing(folder_uri, wanted)))
    return int(any(describe_lacking(folder_uri, wanted) for folder_uri, wanted in folders))
