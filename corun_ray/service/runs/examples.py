"""The pictures of held-out images in a run's folder: `examples/SET/IMAGE/`, the hazy one and one a validation."""

import re
from dataclasses import dataclass

from corun_ray.service.storage import Location

EXAMPLES = "examples"
HAZY_PICTURE = "hazy.jpg"
_PICTURE = re.compile(r"(.+)/step_(\d{8,})\.jpg")


@dataclass(frozen=True)
class Example:
    """One held-out image before and after, as JPEGs of the same size."""

    name: str
    """`SET/IMAGE`."""
    hazy: bytes
    output: bytes


def picture_name(step: int) -> str:
    """The file of what the network made of an image after `step` steps."""
    return f"step_{step:08d}.jpg"


def pictured_steps(run: Location) -> dict[str, list[int]]:
    """`SET/IMAGE` → the steps of which there is a picture, in order; raises `StorageError`."""
    place = run.child(EXAMPLES)
    found: dict[str, list[int]] = {}
    for path in place.files() if place.exists() else ():
        if match := _PICTURE.fullmatch(path):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def example(run: Location, name: str, step: int) -> Example:
    """The pictures of one image; raises `StorageError`."""
    folder = run.child(EXAMPLES).child(name)
    return Example(name, folder.child(HAZY_PICTURE).read(), folder.child(picture_name(step)).read())


def shown_throughout(steps: dict[str, list[int]]) -> list[str]:
    """The images that have a picture of the most validations: those that were chosen, not the best or worst of one."""
    most = max(map(len, steps.values()), default=0)
    return sorted(name for name, at in steps.items() if len(at) == most)


def examples_at(run: Location, step: int) -> list[Example]:
    """The images that are shown throughout the run, as they were after `step` steps; raises `StorageError`."""
    steps = pictured_steps(run)
    return [example(run, name, step) for name in shown_throughout(steps) if step in steps[name]]
