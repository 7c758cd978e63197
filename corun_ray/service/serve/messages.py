"""Messages between the HTTP app and the replicas. The app has no need of torch, so this module must not import it."""

from typing import NamedTuple


class DehazedImage(NamedTuple):
    """A restored image as a file, and the work on it."""

    file: bytes
    num_pixels: int
    batch: int
    """Images that were restored together."""
    restore_s: float
    """The network's time for all images of the batch."""


class ReplicaHealth(NamedTuple):
    """The answer of a replica that has its model."""

    device: str
    """`cpu` or `cuda`."""


class ServedModel(NamedTuple):
    """The model as its users know it: no path, no credentials."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}/{self.version}"
