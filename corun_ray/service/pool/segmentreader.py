"""Reads single labels back from segments: an actor beside its shard, so that a read costs no start of a process."""

import functools

import pyarrow.parquet as pq

from corun_ray.core.training.labels import Label
from corun_ray.service.pool import segments
from corun_ray.service.storage import locate

READS_AT_ONCE = 8
"""Of one reader; enough to have several requests to an object store under way."""
FOOTERS = 256
"""Segments whose footers are remembered: of 131,072 labels, and 360 MB at most."""


class SegmentReader:
    """Labels of the segments in one folder. No file stays open, so that a deleted segment takes no room on a disk."""

    def __init__(self, folder_uri: str) -> None:
        self._folder = locate(folder_uri)
        self._footer = functools.lru_cache(FOOTERS)(functools.partial(segments.read_footer, self._folder))

    def read(self, segment: str, row: int) -> Label:
        """One label; raises `StorageError`."""
        footer: pq.FileMetaData = self._footer(segment)
        (label,) = segments.read_labels(self._folder, segment, [row], footer)
        return label
