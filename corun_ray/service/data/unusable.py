"""Files that cannot be used: which file is to blame, and for what."""

import posixpath
from collections.abc import Mapping

from corun_ray.core.data.images import BadImage
from corun_ray.service.storage import MissingFile

NAMED_REASONS = 3
"""Unusable files that a message of one line names."""


class UnusableFile(Exception):
    """An image or map that cannot be used: its URI and the reason."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


class BlameFile:
    """Context manager that names the file to which a `BadImage` or `MissingFile` raised inside belongs.

    Any other `StorageError` passes: a store that cannot be reached says nothing about its images.
    """

    def __init__(self, root: str, key: str) -> None:
        self.uri = posixpath.join(root, key)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadImage | MissingFile):
            raise UnusableFile(self.uri, str(error)) from None


def join_first_reasons(reasons: Mapping[str, str], count: int = NAMED_REASONS) -> str:
    """Join the first `count` files (URI → reason) to one line, which tells how many more there are."""
    first = [f"{uri}: {reason}" for uri, reason in list(reasons.items())[:count]]
    more = len(reasons) - count
    return "; ".join(first) + (f"; and {more} more" if more > 0 else "")
