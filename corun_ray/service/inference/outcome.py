"""What a job has made of a folder of images, file by file: how many it wrote, and which it skipped."""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from corun_ray.core.inference.overlapping import Tiling
from corun_ray.service.data.unusable import join_first_reasons
from corun_ray.service.errors import JobFailed
from corun_ray.service.runs.lease import Lease, RunDriven
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console

MAX_NAMED_BAD_FILES = 20
"""More skipped images go into a file of the output folder."""
MAX_NAMED_NOTED = 3
"""Images that a line names for what they lack."""
BAD_FILES_LIST = "left_out.tsv"


@dataclass
class Outcome:
    """The outcome of dehazing a folder, or of estimating its depth."""

    written: int = 0
    already_written: int = 0
    """Files that an earlier call wrote, with `resume`."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason, of skipped images."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What the written files lack, such as an alpha channel → URIs of the images."""
    tiled: int = 0
    """Images in tiles that do not give what the whole image would give."""
    tiling: Tiling | None = None
    """Of these, the tiles that disagree most."""

    @property
    def num_images(self) -> int:
        """Number of all images, written or not."""
        return self.written + self.already_written + len(self.bad_files)

    def refuse_nothing(self) -> None:
        """Refuse an outcome without any file.

        Raises `JobFailed`, with the first reasons.
        """
        if self.written or self.already_written or not self.bad_files:
            return
        reasons = join_first_reasons(self.bad_files)
        raise JobFailed(f"not one of the {self.num_images} images can be used ({reasons})")


def merge_reasons(rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return URI → reason of unusable files, one row for each image that they take with them.

    One truth may be that of several hazy images.
    """
    counts = Counter(uri for uri, _ in rows)
    merged = {}
    for uri, reason in rows:
        merged[uri] = reason if counts[uri] == 1 else f"{reason} (takes {counts[uri]} images with it)"
    return merged


def name_passed_over(others: str, console: Console) -> None:
    """Tell the numbers of files that are no images, such as `.heic 2, .txt 1`, if there are any."""
    if others:
        console.say(f"  passed over: {others} (other kinds of files)")


def name_notes(notes: dict[str, list[str]], console: Console) -> None:
    """Tell what the written files lack, with the first images of each kind."""
    for note, uris in sorted(notes.items()):
        named = ", ".join(posixpath.basename(uri) for uri in uris[:MAX_NAMED_NOTED])
        more = f" and {len(uris) - MAX_NAMED_NOTED} more" if len(uris) > MAX_NAMED_NOTED else ""
        console.say(f"  {note}: {named}{more}")


def name_tiles(outcome: Outcome, network: str, console: Console) -> None:
    """Tell, in one line, that images depend on their tiles; `network` is the network's name."""
    if outcome.tiling is not None:
        images = "1 image" if outcome.tiled == 1 else f"{outcome.tiled} images"
        console.say(f"  {images} in {outcome.tiling.describe(network)}")


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
