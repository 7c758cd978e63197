"""What a replica answers to the door. Light, as the door has no need of torch."""

from typing import NamedTuple


class DehazedImage(NamedTuple):
    """A restored image as a file, and what it took."""

    file: bytes
    num_pixels: int
    batch: int
    """Images that were restored together."""
    restore_s: float
    """For all of them."""


class ReplicaHealth(NamedTuple):
    """A replica that answers."""

    device: str
    """`cpu` or `cuda`."""


class ServedModel(NamedTuple):
    """The model as its users know it: no path, no credentials."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}/{self.version}"
