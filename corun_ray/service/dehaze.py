"""Batch dehazing: a folder or URI of images to another, same names and sizes, by Ray Data."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.data import DataContext

from corun_ray.core.images import BadImage, decode_image, encode_png
from corun_ray.core.pictures import grid, stage_rows
from corun_ray.core.restore import restore, stages, to_image, to_tensor
from corun_ray.service.manifest import images_below, stem
from corun_ray.service.models import Model, ModelSourceError
from corun_ray.service.restorers import Restorers, actor_slots, rows_of
from corun_ray.service.storage import MissingFile, StorageError, locate

STAGE_CELL_PX = 320


@dataclass
class DehazeResult:
    """What became of the images."""

    written: int = 0
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason."""


class DehazeFiles(Restorers):
    """A Ray Data actor: reads, dehazes and writes the images whose keys it is given."""

    def __init__(self, shared: dict[str, Any], source: str, target: str, with_stages: bool) -> None:
        super().__init__(shared)
        self.source, self.target, self.with_stages = locate(source), locate(target), with_stages

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keys (`item`) → `key` and the `error` of each, empty where it went well."""
        errors = [self._dehaze(key) for key in batch["item"].tolist()]
        return {"key": batch["item"], "error": np.array(errors, dtype=object)}

    def _dehaze(self, key: str) -> str:
        try:
            hazy = to_tensor(decode_image(self.source.child(key).read())).to(self.device)
            unfolded = stages(self.networks["model"], hazy) if self.with_stages else []
            scene = unfolded[-1].scene if unfolded else restore(self.networks["model"], hazy).scene
            self.target.child(output_name(key)).write(encode_png(to_image(scene)))
            if unfolded:
                rows = stage_rows(unfolded, hazy)
                picture = grid(list(rows.values()), STAGE_CELL_PX, list(rows))
                self.target.child(f"{stem(key)}.stages.png").write(encode_png(picture))
        except (BadImage, MissingFile, ValueError) as error:
            return str(error)
        return ""


def output_name(key: str) -> str:
    """The written file's path: the input's with the suffix `.png`, which loses nothing."""
    return f"{stem(key)}.png"


def dehaze(
    source: str,
    target: str,
    model: Model,
    progress: Callable[[int, int], None] | None = None,
    with_stages: bool = False,
) -> DehazeResult:
    """Dehazes every image below `source` into `target`; unusable ones are named in the result, the rest is done.

    `progress` is told the images done and their number. `with_stages` also writes a picture of what every stage of
    an unfolding network made of the image. Raises `StorageError`, `ManifestError`, and `ModelSourceError` for a
    network without stages.
    """
    if with_stages and model.spec.type != "corun":
        raise ModelSourceError(f"--stages: {model.spec.type} has no stages; only corun has")
    keys = images_below(source, "INPUT")
    clashes = _clashes(keys)
    if clashes:
        raise StorageError(
            f"cannot write {target}: {' and '.join(clashes)} would both become {output_name(clashes[0])}"
        )
    DataContext.get_current().enable_progress_bars = False
    outcomes = ray.data.from_items(keys, override_num_blocks=min(len(keys), 1000)).map_batches(
        DehazeFiles,
        batch_size=1,
        fn_constructor_args=({"model": ray.put(model)}, source, target, with_stages),
        **actor_slots(),
    )
    result = DehazeResult()
    for done, row in enumerate(rows_of(outcomes), 1):
        if row["error"]:
            result.bad_files[posixpath.join(source, row["key"])] = row["error"]
        else:
            result.written += 1
        if progress:
            progress(done, len(keys))
    return result


def _clashes(keys: list[str]) -> list[str]:
    """The first keys, if any, that differ by suffix alone."""
    seen: dict[str, str] = {}
    for key in keys:
        other = seen.setdefault(stem(key), key)
        if other != key:
            return [other, key]
    return []
