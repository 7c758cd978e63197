"""Batch dehazing by Ray Data: a folder or URI of images to another, with the same names, sizes and folders."""

import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
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
from corun_ray.core.inference.pictures import build_stage_rows, draw_grid
from corun_ray.core.inference.restore import restore, restore_stages, to_image, to_tensor
from corun_ray.core.networks.corun import Restoration
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.data.actors import iterate_rows, plan_actor_pool
from corun_ray.service.data.manifest import list_images
from corun_ray.service.data.pairing import strip_suffix
from corun_ray.service.inference.outcome import Outcome, name_bad_files
from corun_ray.service.inference.photos import read_photo, write_photo
from corun_ray.service.inference.restorers import RestorerActor
from corun_ray.service.models.sources import Model, ModelSourceError, fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.storage import MissingFile, StorageError, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import DEHAZED, DEHAZED_PIXELS, MetricRecorder

STAGE_CELL_PX = 320
SELF_ENSEMBLE_FILE = "self_ensemble.txt"
"""Its presence in the output says that the images there were restored with `self_ensemble`."""
SELF_ENSEMBLE_TEXT = "The images of this folder are means over the restorations of eight flips and turns.\n"
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

        Returns `key`, the `error` of each image, empty where all went well, and the number of `pixels` written.
        """
        errors, pixels = [], []
        for key in batch["item"].tolist():
            error, num_pixels = self._dehaze(key)
            errors.append(error)
            pixels.append(num_pixels)
        return {"key": batch["item"], "error": np.array(errors, dtype=object), "pixels": np.array(pixels)}

    def _dehaze(self, key: str) -> tuple[str, int]:
        """Dehaze one image; return error and number of pixels.

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
            return str(error), 0
        return "", pixels.shape[0] * pixels.shape[1]

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
        self.target.child(f"{strip_suffix(key)}.stages.png").write(encode_png(picture))
        return restorations[-1]

    def _write_transmission(self, key: str, transmission: Tensor) -> None:
        """Write a transmission map 1 1 H W as 16-bit PNG."""
        levels = to_image(transmission, np.uint16)
        self.target.child(f"{strip_suffix(key)}.transmission.png").write(cv2.imencode(".png", levels)[1].tobytes())


def get_output_name(key: str, format: str) -> str:
    """Return the path of the restored image below the output.

    The path is that of the input, with another suffix where the job asks for another format.
    """
    return key if format == "keep" else f"{strip_suffix(key)}.{format}"


# --- All images, from the driver ---


def dehaze(
    section: DehazeSection,
    model: Model,
    progress: Callable[[int, int], None] | None = None,
    resume: bool = False,
    job_name: str = "",
) -> Outcome:
    """Dehaze every image below `input` into `output`.

    Unusable images are skipped and named in the result. `progress` is called with the number of images done and the
    number of all. With `resume`, images that exist in the output are not dehazed again, if they were made with the same
    `self_ensemble`. `job_name` labels the metrics.

    Raises `StorageError`, `ManifestError`, and `ModelSourceError` for a network that cannot give stages or a
    transmission that the job asks for.
    """
    # Refuse a wrong job before anything is written.
    _check_network(section, model)
    keys = list_images(section.input, "INPUT")
    _check_name_clashes(section, keys)

    # Skip the images of an earlier call.
    wanted = _select_unwritten(section, keys) if resume else keys
    _mark_self_ensemble(section)
    result = Outcome(already_written=len(keys) - len(wanted))
    if not wanted:
        return result

    # Count the outcomes as they come.
    recorder = MetricRecorder({"job_name": job_name})
    for done, row in enumerate(_dehaze_images(section, model, wanted), 1):
        if row["error"]:
            result.bad_files[posixpath.join(section.input, row["key"])] = row["error"]
        else:
            result.written += 1
        recorder.add(DEHAZED, outcome="left_out" if row["error"] else "written")
        recorder.add(DEHAZED_PIXELS, int(row["pixels"]))
        if progress:
            progress(done, len(wanted))
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

    Raises the errors of `dehaze` and `fetch_model`, and `ClusterError`.
    """
    started = time.monotonic()
    section = job.dehaze

    # Fetch the model before Ray starts: a wrong source is reported at once.
    model = fetch_model(section.model, get_tracking_uri(job))
    place = join_cluster(job, console.say)
    facts = {"input": section.input, "model": section.model, "output": section.output, "on": place}
    console.header(f"dehaze {job.name}", facts)

    # Dehaze, with a line of progress on the console.
    log = Log("driver", {"job": job.name, "kind": job.kind})
    log.info("dehazing started", input=section.input, output=section.output)
    with explain_stop(lambda: f"the images in {section.output} are whole; --resume goes on with the others"):
        result = dehaze(section, model, lambda done, total: console.progress(done, total, "image"), resume, job.name)

    # Name the skipped images in the log and on the console.
    for uri, reason in result.bad_files.items():
        log.warning("image left out", image=uri, reason=reason)
    log.info("dehazing ended", written=result.written, left_out=len(result.bad_files))
    name_bad_files(section.output, result.bad_files, console)

    # Tell the outcome.
    took_s = time.monotonic() - started
    earlier = f", {result.already_written} were written before" if result.already_written else ""
    pace = f"{format_duration(took_s)}, {result.written / took_s:.3g} images/s"
    console.footer(
        f"done: {result.written} images written{earlier}", {"skipped": str(len(result.bad_files)), "took": pace}
    )
    return result


def _select_unwritten(section: DehazeSection, keys: list[str]) -> list[str]:
    """Return the keys without a restored image.

    Raises `StorageError`, also where the existing images were made with another `self_ensemble`.
    """
    output = locate(section.output)
    existing = set(output.list_files()) if output.exists() else set()
    unwritten = [key for key in keys if get_output_name(key, section.format) not in existing]

    # Images that were made otherwise are not what this job asks for, and a folder of both kinds is no result.
    made_by_ensemble = SELF_ENSEMBLE_FILE in existing
    if len(unwritten) < len(keys) and made_by_ensemble != section.self_ensemble:
        made = "with" if made_by_ensemble else "without"
        raise StorageError(
            f"cannot resume in {section.output}: its images were made {made} self_ensemble; "
            "another output, or no --resume, was expected"
        )
    return unwritten


def _mark_self_ensemble(section: DehazeSection) -> None:
    """Mark the output as made with `self_ensemble`, or take an earlier mark away.

    Raises `StorageError`.
    """
    mark = locate(section.output).child(SELF_ENSEMBLE_FILE)
    if section.self_ensemble:
        mark.write(SELF_ENSEMBLE_TEXT.encode())
    else:
        mark.delete()


# --- Checks before any image is dehazed ---


def _check_network(section: DehazeSection, model: Model) -> None:
    """Refuse a network without the stages or transmission wanted.

    Raises `ModelSourceError`.
    """
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
