"""Batch dehazing: a folder or URI of images to another, same names, sizes and folders, by Ray Data."""

import posixpath
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import ray
import torch
from ray.data import DataContext
from torch import Tensor

from corun_ray.config.jobs import DehazeJob
from corun_ray.config.tasks import DehazeSection
from corun_ray.core.data.images import BadImage, encode_png
from corun_ray.core.inference.memory import fit_in_memory
from corun_ray.core.inference.pictures import build_stage_rows, draw_grid
from corun_ray.core.inference.restore import restore, restore_stages, to_image, to_tensor
from corun_ray.core.networks.corun import Restoration
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.data.actors import actor_slots, rows_of
from corun_ray.service.data.manifest import images_below, stem
from corun_ray.service.inference.photos import read_photo, write_photo
from corun_ray.service.inference.restorers import RestorerActor
from corun_ray.service.models.sources import Model, ModelSourceError, fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.storage import MissingFile, StorageError, locate
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.console import Console, duration
from corun_ray.service.telemetry.logs import Log

STAGE_CELL_PX = 320
NAMED_BAD_FILES = 20
TRY_PX = 32


@dataclass
class DehazeResult:
    """What became of the images."""

    written: int = 0
    already_written: int = 0
    """Done before, with `resume`."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason."""


class ImageDehazer(RestorerActor):
    """A Ray Data actor: reads, dehazes and writes the images whose keys it is given."""

    def __init__(self, shared: dict[str, Any], threads: int, section: DehazeSection) -> None:
        super().__init__(shared, threads, section.memory_mib)
        self.section = section
        self.source, self.target = locate(section.input), locate(section.output)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keys (`item`) → `key`, the `error` of each, empty where it went well, and the `pixels` that were written."""
        outcomes = [self._dehaze(key) for key in batch["item"].tolist()]
        errors, pixels = zip(*outcomes, strict=True)
        return {"key": batch["item"], "error": np.array(errors, dtype=object), "pixels": np.array(pixels)}

    def _dehaze(self, key: str) -> tuple[str, int]:
        try:
            photo = read_photo(self.source.child(key).read())
            restored = self._restored(key, to_tensor(photo.pixels).to(self.device))
            if self.section.transmission and restored.transmission is not None:
                self._write_transmission(key, restored.transmission)
            name = get_output_name(key, self.section.format)
            pixels = to_image(restored.scene, photo.pixels.dtype.type)
            # The image itself comes last: where it is, all is done.
            self.target.child(name).write(write_photo(photo.with_pixels(pixels), posixpath.splitext(name)[1]))
        except (BadImage, MissingFile, ValueError) as error:
            return str(error), 0
        return "", pixels.shape[0] * pixels.shape[1]

    def _restored(self, key: str, hazy: Tensor) -> Restoration:
        network = fit_in_memory(self.networks["model"], hazy, self.memory_mib)
        if not self.section.stages:
            return restore(network, hazy)
        unfolded = restore_stages(network, hazy)
        rows = build_stage_rows(unfolded, hazy)
        picture = draw_grid(list(rows.values()), STAGE_CELL_PX, list(rows))
        self.target.child(f"{stem(key)}.stages.png").write(encode_png(picture))
        return unfolded[-1]

    def _write_transmission(self, key: str, transmission: Tensor) -> None:
        levels = to_image(transmission, np.uint16)
        self.target.child(f"{stem(key)}.transmission.png").write(cv2.imencode(".png", levels)[1].tobytes())


def get_output_name(key: str, format: str) -> str:
    """The written file's path: the input's, with the suffix of another format if one is asked for."""
    return key if format == "keep" else f"{stem(key)}.{format}"


def dehaze(
    section: DehazeSection,
    model: Model,
    progress: Callable[[int, int], None] | None = None,
    resume: bool = False,
    job_name: str = "",
) -> DehazeResult:
    """Dehazes every image below `input` into `output`; unusable ones are named in the result, the rest is done.

    `progress` is told the images done and their number. With `resume`, images that have been written before are
    passed over. `job_name` is that of the metrics. Raises `StorageError`, `ManifestError`, and `ModelSourceError` for a
    network that cannot give what is asked for.
    """
    _refuse_what_the_network_has_not(section, model)
    keys = images_below(section.input, "INPUT")
    _refuse_clashes(section, keys)
    wanted = _not_yet_written(section, keys) if resume else keys
    result = DehazeResult(already_written=len(keys) - len(wanted))
    if not wanted:
        return result
    DataContext.get_current().enable_progress_bars = False
    recorder = telemetry.MetricRecorder({"job_name": job_name})
    slots, threads = actor_slots(len(wanted))
    rows = rows_of(
        ray.data.from_items(wanted, override_num_blocks=min(len(wanted), 1000)).map_batches(
            ImageDehazer, batch_size=1, fn_constructor_args=({"model": ray.put(model)}, threads, section), **slots
        )
    )
    for done, row in enumerate(rows, 1):
        if row["error"]:
            result.bad_files[posixpath.join(section.input, row["key"])] = row["error"]
        else:
            result.written += 1
        recorder.add(telemetry.DEHAZED, outcome="left_out" if row["error"] else "written")
        recorder.add(telemetry.DEHAZED_PIXELS, int(row["pixels"]))
        if progress:
            progress(done, len(wanted))
    return result


def _not_yet_written(section: DehazeSection, keys: list[str]) -> list[str]:
    output = locate(section.output)
    there = set(output.list_files()) if output.exists() else set()
    return [key for key in keys if get_output_name(key, section.format) not in there]


def run_dehazing(job: DehazeJob, console: Console, resume: bool = False) -> DehazeResult:
    """The job of kind `dehaze`, seen from the driver. Raises the errors of `dehaze` and `fetch_model`."""
    started, section = time.monotonic(), job.dehaze
    model = fetch_model(section.model, get_tracking_uri(job))
    place = cluster.connect(job.cluster)
    facts = {"input": section.input, "model": section.model, "output": section.output, "on": place}
    console.header(f"dehaze {job.name}", facts)
    log = Log("driver", {"job": job.name, "kind": job.kind})
    log.info("dehazing started", input=section.input, output=section.output)
    result = dehaze(section, model, lambda done, total: console.progress(done, total, "image"), resume, job.name)
    for uri, reason in result.bad_files.items():
        log.warning("image left out", image=uri, reason=reason)
    log.info("dehazing ended", written=result.written, left_out=len(result.bad_files))
    _name_bad_files(section, result.bad_files, console)
    took_s = time.monotonic() - started
    before = f", {result.already_written} were there before" if result.already_written else ""
    console.footer(
        f"done: {result.written} images written{before}",
        {"left out": str(len(result.bad_files)), "took": f"{duration(took_s)}, {result.written / took_s:.3g} images/s"},
    )
    return result


def _name_bad_files(section: DehazeSection, bad_files: dict[str, str], console: Console) -> None:
    """The first on the console; where there are more, all of them in a file of the output."""
    for uri, reason in list(bad_files.items())[:NAMED_BAD_FILES]:
        console.say(f"  left out: {uri}: {reason}")
    if len(bad_files) > NAMED_BAD_FILES:
        listing = "".join(f"{uri}\t{reason}\n" for uri, reason in sorted(bad_files.items()))
        place_of_all = locate(section.output).child("left_out.tsv")
        place_of_all.write(listing.encode())
        console.say(f"  left out: {len(bad_files) - NAMED_BAD_FILES} more, all in {place_of_all.uri}")


def _refuse_what_the_network_has_not(section: DehazeSection, model: Model) -> None:
    if section.stages and model.spec.type != "corun":
        raise ModelSourceError(f"stages: {model.spec.type} has no stages; only corun has")
    if section.transmission and model.spec.type != "corun":
        tried = restore(model.build().eval(), torch.rand(1, 3, TRY_PX, TRY_PX))
        if tried.transmission is None:
            raise ModelSourceError(f"transmission: {model.spec.type} gives none")


def _refuse_clashes(section: DehazeSection, keys: list[str]) -> None:
    """Images that differ by suffix alone cannot all have the same other one; nor can maps of theirs."""
    seen: dict[str, str] = {}
    for key in keys:
        has_map = section.transmission or section.stages
        name = stem(key) if has_map else get_output_name(key, section.format)
        other = seen.setdefault(name, key)
        if other != key:
            shared = f"{name}.*.png" if has_map else name
            raise StorageError(f"cannot write {section.output}: {other} and {key} would both become {shared}")
