"""Batch dehazing: a folder or URI of images to another, same names and sizes, by Ray Data."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.data import DataContext

from corun_ray.core.corun import CORUN
from corun_ray.core.images import BadImage, decode_image, encode_png
from corun_ray.core.restore import restore, to_image, to_tensor
from corun_ray.service.manifest import images_below, stem
from corun_ray.service.restorers import Restorers, actor_slots, share_network
from corun_ray.service.storage import StorageError, locate


@dataclass
class DehazeResult:
    """What became of the images."""

    written: int = 0
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason."""


class DehazeFiles(Restorers):
    """A Ray Data actor: reads, dehazes and writes the images whose keys it is given."""

    def __init__(self, shared: dict[str, Any], source: str, target: str) -> None:
        super().__init__(shared)
        self.source, self.target = locate(source), locate(target)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keys (`item`) → `key` and the `error` of each, empty where it went well."""
        errors = [self._dehaze(key) for key in batch["item"].tolist()]
        return {"key": batch["item"], "error": np.array(errors, dtype=object)}

    def _dehaze(self, key: str) -> str:
        try:
            image = decode_image(self.source.child(key).read())
            scene = restore(self.networks["model"], to_tensor(image).to(self.device)).scene
            self.target.child(output_name(key)).write(encode_png(to_image(scene)))
        except (BadImage, StorageError, ValueError) as error:
            return str(error)
        return ""


def output_name(key: str) -> str:
    """The written file's path: the input's with the suffix `.png`, which loses nothing."""
    return f"{stem(key)}.png"


def dehaze(
    source: str, target: str, network: CORUN, progress: Callable[[int, int], None] | None = None
) -> DehazeResult:
    """Dehazes every image below `source` into `target`; unusable ones are named in the result, the rest is done.

    `progress` is told the images done and their number. Raises `StorageError`, `ManifestError`.
    """
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
        fn_constructor_args=({"model": share_network(network)}, source, target),
        **actor_slots(),
    )
    result = DehazeResult()
    for done, row in enumerate(outcomes.iter_rows(), 1):
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
