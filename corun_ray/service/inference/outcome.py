"""What a job has made of a folder of images, file by file: how many it wrote, and which it skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from corun_ray.service.runs.lease import Lease, RunDriven
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console

MAX_NAMED_BAD_FILES = 20
"""More skipped images go into a file of the output folder."""
BAD_FILES_LIST = "left_out.tsv"


@dataclass
class Outcome:
    """The outcome of dehazing a folder, or of estimating its depth."""

    written: int = 0
    already_written: int = 0
    """Files that an earlier call wrote, with `resume`."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason, of skipped images."""


def name_bad_files(output: str, bad_files: dict[str, str], console: Console) -> None:
    """Name the first skipped images on the console.

    Where there are more, a file in the folder or URI `output` lists all.

    Raises `StorageError`.
    """
    for uri, reason in list(bad_files.items())[:MAX_NAMED_BAD_FILES]:
        console.say(f"  skipped: {uri}: {reason}")

    if len(bad_files) > MAX_NAMED_BAD_FILES:
        listing = "".join(f"{uri}\t{reason}\n" for uri, reason in sorted(bad_files.items()))
        target = locate(output).child(BAD_FILES_LIST)
        target.write(listing.encode())
        console.say(f"  skipped: {len(bad_files) - MAX_NAMED_BAD_FILES} more, all in {target.uri}")


@contextmanager
def hold_output(uri: str, console: Console, resume: bool) -> Iterator[None]:
    """Show in an output that this process writes there.

    Another process that does is refused with `resume`, which goes on with what one call has begun; without, it is told.

    Raises `RunDriven` and `StorageError`.
    """
    lease = None
    try:
        lease = Lease.take(locate(uri))
    except RunDriven as error:
        if resume:
            raise
        console.say(f"  also writes there: {error}")

    try:
        yield
    finally:
        if lease is not None:
            lease.release()
