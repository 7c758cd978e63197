"""`corun-ray weights fetch | index | ls`. Heavy imports happen in the command that needs them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Wanted = Mapping[str, str]
"""File name → what needs it."""
JobNeeds = Callable[[argparse.Namespace], Sequence[tuple[str | None, Wanted]]]
"""The arguments of `ls` (`where`, a job file, and `set`) → its weights folders and the files wanted of each."""

OK, MISSING, SIZE_DIFFERS, NOT_INDEXED = "ok", "missing", "size differs", "not indexed"


@dataclass(frozen=True)
class FileState:
    """One line of `weights ls`; `size_bytes` and `sha256` are what the index says, None where it does not."""

    name: str
    size_bytes: int | None
    sha256: str | None
    state: str
    needed_by: str


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


def inventory(folder_uri: str | None, wanted: Wanted) -> list[FileState]:
    """The files that a folder holds, its index lists or `wanted` names; sizes are looked at, contents are not read.

    Raises `WeightsError` for a folder that cannot be read. None is the folder of a job that names none.
    """
    from corun_ray.service.weights.folder import look_into

    there, indexed = look_into(folder_uri) if folder_uri is not None else ({}, {})

    def state(name: str) -> str:
        if name not in there:
            return MISSING
        if name not in indexed:
            return NOT_INDEXED
        return OK if there[name] == indexed[name].size_bytes else SIZE_DIFFERS

    rows = []
    for name in sorted({*there, *indexed, *wanted}):
        content = indexed.get(name)
        size, sha256 = (content.size_bytes, content.sha256) if content else (there.get(name), None)
        rows.append(FileState(name, size, sha256, state(name), wanted.get(name, "")))
    return rows


def listing(folder_uri: str | None, wanted: Wanted) -> list[str]:
    """A table of `inventory`: file, size in MB, start of the SHA-256, state, needed by."""
    rows = inventory(folder_uri, wanted)
    width = max([len(row.name) for row in rows] + [4])
    lines = [f"{'file':<{width}}  {'MB':>8}  {'sha256':<12}  {'state':<12}  needed by"]
    for row in rows:
        size = "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f}"
        digest = (row.sha256 or "-")[:12]
        lines.append(f"{row.name:<{width}}  {size:>8}  {digest:<12}  {row.state:<12}  {row.needed_by}".rstrip())
    return lines


def lacking(folder_uri: str | None, wanted: Wanted) -> list[str]:
    """One line for each wanted file that cannot be used as it is; empty where all are there."""
    where = "the job names no weights folder" if folder_uri is None else folder_uri
    rows = [row for row in inventory(folder_uri, wanted) if row.name in wanted and row.state != OK]
    return [f"{row.name} (for {row.needed_by}): {row.state} ({where})" for row in rows]


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
    is_job = args.where.endswith((".yaml", ".yml"))
    folders: Sequence[tuple[str | None, Wanted]] = job_needs(args) if is_job else [(args.where, {})]
    if not folders:
        print("needs no weights")
    for folder_uri, wanted in folders:
        print(f"{folder_uri or 'no weights folder'}:")
        print("\n".join(listing(folder_uri, wanted)))
    return int(any(lacking(folder_uri, wanted) for folder_uri, wanted in folders))
