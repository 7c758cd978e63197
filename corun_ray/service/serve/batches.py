"""Which images of a batch are restored together."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Size = TypeVar("Size", bound=Hashable)


def groups(sizes: Sequence[Size], at_once: Callable[[Size], int]) -> list[list[int]]:
    """Positions of images of one size, in order, at most `at_once` of them in a group; the first come first."""
    by_size: dict[Size, list[int]] = {}
    for position, size in enumerate(sizes):
        by_size.setdefault(size, []).append(position)
    found = []
    for size, positions in by_size.items():
        most = at_once(size)
        found += [positions[start : start + most] for start in range(0, len(positions), most)]
    return sorted(found)
