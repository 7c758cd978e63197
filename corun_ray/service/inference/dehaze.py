"""Batch dehazing by Ray Data: a folder or URI of images to another, with the same names, sizes and folders."""

import posixpath
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
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
from corun_ray.core.errors import explain_stop
from corun_ray.core.inference.memory import fit_in_memory
from corun_ray.core.inference.overlapping import find_worse
from corun_ray.core.inference.pictures import build_stage_rows, draw_grid
from corun_ray.core.inference.restore import restore, restore_stages, to_image, to_tensor
from corun_ray.core.networks.corun import Restoration
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.data.actors import iterate_rows, plan_actor_pool
from corun_ray.service.data.listing import IMAGE_SUFFIXES, ManifestError
from corun_ray.service.data.manifest import list_image_folder
from corun_ray.service.data.pairing import strip_suffix
from corun_ray.service.inference.made_with import record_settings, refuse_other_ensemble, refuse_other_model
from corun_ray.service.inference.outcome import (
    Outcome,
    hold_output,
    name_bad_files,
    name_notes,
    name_passed_over,
    name_tiles,
)
from corun_ray.service.inference.photos import read_photo, write_photo
from corun_ray.service.inference.restorers import RestorerActor, read_tilings
from corun_ray.service.models.sources import Model, ModelSourceError, fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.places import find_overwritten
from corun_ray.service.storage import MissingFile, StorageError, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import DEHAZED, DEHAZED_PIXELS, MetricRecorder

STAGE_CELL_PX = 320
TRANSMISSION_SUFFIX, STAGES_SUFFIX = ".transmission.png", ".stages.png"
PROBE_PX = 32
"""The side of the image that tries whether a network gives a transmission."""
MAX_BLOCKS = 1000
"""Blocks of the Ray Data input."""


# --- The work on one image, in a Ray Data actor ---


class ImageDehazer(RestorerActor):
    """A Ray Data actor that reads, dehazes and writes images by their keys."""

    def __init__(self, models: Mapping[str, "ray.ObjectRef[Model]"], threads: int, section: DehazeSection) -> None:
        super().__init__(models, threads, section.memory_mib)
        self.section = section
        self.source = locate(section.input)
        self.target = locate(section.output)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Dehaze the images whose keys are in `item`.

        Returns `key`, the `error` of each image, empty where all went well, the number of `pixels` written, in `notes`,
        one a line, what the file written lacks, and in `tilings` how its tiles disagreed, if they did.
        """
        errors, pixels, notes, tilings = [], [], [], []
        for key in batch["item"].tolist():
            error, num_pixels, note = self._dehaze(key)
            errors.append(error)
            pixels.append(num_pixels)
            notes.append(note)
            tilings.append(self.take_tilings())
        return {
            "key": batch["item"],
            "error": np.array(errors, dtype=object),
            "pixels": np.array(pixels),
            "notes": np.array(notes, dtype=object),
            "tilings": np.array(tilings, dtype=object),
        }

    def _dehaze(self, key: str) -> tuple[str, int, str]:
        """Dehaze one image; return error, number of pixels, and notes, one a line.

        Errors of the image are returned, so that the other images continue. A `StorageError` ends the job.
        """
        try:
            photo = read_photo(self.source.child(key).read())
            restored = self._restore(key, to_tensor(photo.pixels).to(self.device))
            if self.section.transmission and restored.transmission is not None:
                self._write_transmission(key, restored.transmission)

            # The image itself comes last: an image that exists says that all its files exist.
            name = get_output_name(key, self.section.format)
            pixels = to_image(restored.scene, photo.pixels.dtype.type)
            data = write_photo(photo.with_pixels(pixels), posixpath.splitext(name)[1])
            self.target.child(name).write(data)
        except (BadImage, MissingFile, ValueError) as error:
            return str(error), 0, ""
        return "", pixels.shape[0] * pixels.shape[1], "\n".join(photo.notes)

    def _restore(self, key: str, hazy: Tensor) -> Restoration:
        """Restore an image 1 3 H W.

        Where the job asks for stages, also write a picture of them.
        """
        if not self.section.stages:
            return self.restore("model", hazy, self.section.self_ensemble)

        # Draw one row for each stage, below the hazy image.
        network = fit_in_memory(self.networks["model"], hazy, self.memory_mib)
        restorations = restore_stages(network, hazy)
        rows = build_stage_rows(restorations, hazy)
        picture = draw_grid(list(rows.values()), STAGE_CELL_PX, list(rows))
        self.target.child(f"{strip_suffix(key)}{STAGES_SUFFIX}").write(encode_png(picture))
        return restorations[-1]

    def _write_transmission(self, key: str, transmission: Tensor) -> None:
        """Write a transmission map 1 1 H W as 16-bit PNG."""
        levels = to_image(transmission, np.uint16)
        name = f"{strip_suffix(key)}{TRANSMISSION_SUFFIX}"
        self.target.child(name).write(cv2.imencode(".png", levels)[1].tobytes())


def get_output_name(key: str, format: str) -> str:
    """Return the path of the restored image below the output.

    The path is that of the input, with another suffix where the job asks for another format.
    """
    return key if format == "keep" else f"{strip_suffix(key)}.{format}"


def list_output_names(section: DehazeSection, key: str) -> list[str]:
    """Return the paths below the output of all files that are written for an image."""
    names = [get_output_name(key, section.format)]
    if section.transmission:
        names.append(f"{strip_suffix(key)}{TRANSMISSION_SUFFIX}")
    if section.stages:
        names.append(f"{strip_suffix(key)}{STAGES_SUFFIX}")
    return names


# --- What there is to do ---


@dataclass(frozen=True)
class DehazePlan:
    """The images of a job, looked at before anything starts."""

    section: DehazeSection
    """The job's, whose input is a folder or URI, also where it named one image."""
    keys: list[str]
    """All images, by relative path."""
    wanted: list[str]
    """The images still to restore."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """URI → reason, of links that lead nowhere."""
    passed_over: str = ""
    """Files of other kinds by number, such as `.heic 2, .txt 1`."""


def plan_dehazing(section: DehazeSection, resume: bool = False) -> DehazePlan:
    """List the images to restore; with `resume`, without those that an earlier call has written.

    What lies below the output is no input.

    Raises `StorageError` and `ManifestError` for a job that would replace its own input, mix images of two kinds, or
    write two images to one file.
    """
    found = list_image_folder(section.input, "INPUT", {"OUTPUT": section.output})
    section = section.model_copy(update={"input": found.root})
    keys = list(found.select(IMAGE_SUFFIXES))
    _check_name_clashes(section, keys)
    _refuse_overwriting(section, keys)

    wanted = _select_unwritten(section, keys) if resume else keys
    bad_files, passed_over = found.list_skipped(IMAGE_SUFFIXES), found.count_others(IMAGE_SUFFIXES)
    return DehazePlan(section, keys, wanted, bad_files, passed_over)


# --- All images, from the driver ---


def dehaze(
    section: DehazeSection,
    model: Model,
    progress: Callable[[int, int], None] | None = None,
    resume: bool = False,
    job_name: str = "",
) -> Outcome:
    """Dehaze every image below `input` into `output`.

    With `resume`, images that exist in the output are not dehazed again, if they were made with the same settings.

    Raises the errors of `plan_dehazing` and `dehaze_planned`, and `ModelSourceError` for a network that cannot give
    stages or a transmission that the job asks for.
    """
    plan = plan_dehazing(section, resume)
    _check_model(plan, model)
    return dehaze_planned(plan, model, progress, job_name)


def dehaze_planned(
    plan: DehazePlan, model: Model, progress: Callable[[int, int], None] | None = None, job_name: str = ""
) -> Outcome:
    """Dehaze the wanted images of a plan.

    Unusable images are skipped and named in the result. `progress` is called with the number of images done and the
    number of all. `job_name` labels the metrics.

    Raises `StorageError`.
    """
    section = plan.section
    record_settings(section, model)
    result = Outcome(already_written=len(plan.keys) - len(plan.wanted), bad_files=dict(plan.bad_files))
    if not plan.wanted:
        return result

    # Count the outcomes as they come.
    recorder = MetricRecorder({"job_name": job_name})
    for done, row in enumerate(_dehaze_images(section, model, plan.wanted), 1):
        uri = posixpath.join(section.input, row["key"])
        if row["error"]:
            result.bad_files[uri] = row["error"]
        else:
            result.written += 1
        for note in row["notes"].splitlines():
            result.notes.setdefault(note, []).append(uri)
        for tiling in read_tilings(row["tilings"]).values():
            result.tiled += 1
            result.tiling = find_worse(result.tiling, tiling)
        recorder.add(DEHAZED, outcome="left_out" if row["error"] else "written")
        recorder.add(DEHAZED_PIXELS, int(row["pixels"]))
        if progress:
            progress(done, len(plan.wanted))
    return result


def _dehaze_images(section: DehazeSection, model: Model, keys: list[str]) -> Iterator[dict[str, Any]]:
    """Start the actors; return their results one by one.

    Raises `StorageError`.
    """
    DataContext.get_current().enable_progress_bars = False
    slots, threads = plan_actor_pool(len(keys))

    # The dataset must have no name here: see `iterate_rows`.
    return iterate_rows(
        ray.data.from_items(keys, override_num_blocks=min(len(keys), MAX_BLOCKS)).map_batches(
            ImageDehazer, batch_size=1, fn_constructor_args=({"model": ray.put(model)}, threads, section), **slots
        )
    )


def run_dehazing(job: DehazeJob, console: Console, resume: bool = False) -> Outcome:
    """Run a job of kind `dehaze` from the driver.

    Raises the errors of `plan_dehazing`, `dehaze_planned` and `fetch_model`, `ClusterError`, and `JobFailed` where not
    one image can be used.
    """
    started = time.monotonic()
    section = job.dehaze

    # Look at the images and fetch the model before Ray starts: mistakes are reported at once.
    plan = plan_dehazing(section, resume)
    model = fetch_model(section.model, get_tracking_uri(job))
    _check_model(plan, model)
    place = join_cluster(job, console.say)
    facts = {"input": section.input, "model": section.model, "output": section.output, "on": place}
    console.header(f"dehaze {job.name}", facts)
    name_passed_over(plan.passed_over, console)

    # Dehaze, with a line of progress on the console.
    log = Log("driver", {"job": job.name, "kind": job.kind})
    log.info("dehazing started", input=section.input, output=section.output)
    rest = f"the images in {section.output} are whole; --resume goes on with the others"
    with hold_output(section.output, console, resume), explain_stop(lambda: rest):
        result = dehaze_planned(plan, model, lambda done, total: console.progress(done, total, "image"), job.name)

    # Name the skipped images in the log and on the console, and what the others have lost.
    for uri, reason in result.bad_files.items():
        log.warning("image left out", image=uri, reason=reason)
    log.info("dehazing ended", written=result.written, left_out=len(result.bad_files))
    name_bad_files(section.output, result.bad_files, console)
    name_notes(result.notes, console)
    name_tiles(result, model.spec.type.rpartition(":")[2], console)
    result.refuse_nothing()

    # Tell the outcome.
    took_s = time.monotonic() - started
    earlier = f", {result.already_written} were written before" if result.already_written else ""
    pace = f"{format_duration(took_s)}, {result.written / took_s:.3g} images/s"
    console.footer(
        f"done: {result.written} images written{earlier}", {"skipped": str(len(result.bad_files)), "took": pace}
    )
    return result


def _select_unwritten(section: DehazeSection, keys: list[str]) -> list[str]:
    """Return the keys that lack a restored image, or the maps beside it.

    Raises `StorageError`, also where the existing images were made with another `self_ensemble`.
    """
    # Some file systems give names back in another form of Unicode than they were written.
    output = locate(section.output)
    files = output.list_files() if output.exists() else []
    existing = {unicodedata.normalize("NFC", file) for file in files}
    unwritten = []
    for key in keys:
        names = {unicodedata.normalize("NFC", name) for name in list_output_names(section, key)}
        if not names <= existing:
            unwritten.append(key)

    # Images that were made otherwise are not what this job asks for, and a folder of both kinds is no result.
    if len(unwritten) < len(keys):
        refuse_other_ensemble(section, existing)
    return unwritten


# --- Checks before any image is dehazed ---


def _check_model(plan: DehazePlan, model: Model) -> None:
    """Refuse a network without the stages or transmission wanted, and another than made the images that are there.

    Raises `ModelSourceError` and `StorageError`.
    """
    section = plan.section
    if len(plan.wanted) < len(plan.keys):
        refuse_other_model(section, model)
    if section.stages and model.spec.type != "corun":
        raise ModelSourceError(f"stages: {model.spec.type} has no stages; only corun has")

    # Whether another network gives a transmission shows only when it runs.
    if section.transmission and model.spec.type != "corun":
        tried = restore(model.build().eval(), torch.rand(1, 3, PROBE_PX, PROBE_PX))
        if tried.transmission is None:
            raise ModelSourceError(f"transmission: {model.spec.type} gives none")


def _check_name_clashes(section: DehazeSection, keys: list[str]) -> None:
    """Refuse images whose outputs would have the same name.

    Names clash where images differ by suffix alone and the output has another suffix, or maps beside the images.
    Raises `StorageError`.
    """
    has_maps = section.transmission or section.stages
    owners: dict[str, str] = {}
    for key in keys:
        name = strip_suffix(key) if has_maps else get_output_name(key, section.format)
        owner = owners.setdefault(name, key)
        if owner != key:
            shared = f"{name}.*.png" if has_maps else name
            raise StorageError(f"cannot write {section.output}: {owner} and {key} would both become {shared}")


def _refuse_overwriting(section: DehazeSection, keys: list[str]) -> None:
    """Refuse an output that would replace images of the input, or what they are links to.

    Raises `ManifestError`.
    """
    names = []
    for key in keys:
        names += list_output_names(section, key)

    lost = find_overwritten(locate(section.input), keys, locate(section.output), names)
    if lost:
        raise ManifestError(
            f"OUTPUT: {section.output} would replace {len(lost)} images of INPUT (first: {lost[0]}): choose another"
        )
