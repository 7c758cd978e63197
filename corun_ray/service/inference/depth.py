"""Depth estimation by Ray Data: a depth map for every photograph of a folder or URI, as training reads them.

Beside the maps stand `depth.json`, which says what they are, and a contact sheet. Neither has a suffix of depth maps.
"""

import io
import json
import posixpath
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data import DataContext

from corun_ray.config.jobs import DepthJob
from corun_ray.config.tasks import DepthSection
from corun_ray.core.choices import DepthKind
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.images import BadImage, decode_depth
from corun_ray.core.errors import explain_stop
from corun_ray.core.inference.depth import DepthModel, find_model_files
from corun_ray.core.inference.pictures import apply_colour_map, draw_grid
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.data.actors import iterate_rows, plan_actor_pool
from corun_ray.service.data.listing import IMAGE_SUFFIXES, ManifestError
from corun_ray.service.data.manifest import list_image_folder, load_image
from corun_ray.service.data.pairing import strip_suffix
from corun_ray.service.inference.outcome import Outcome, hold_output, name_bad_files, name_passed_over
from corun_ray.service.places import find_below
from corun_ray.service.storage import Location, MissingFile, StorageError, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.weights.folder import locate_model, read_index
from corun_ray.service.weights.needed import open_weights

RECORD_FILE = "depth.json"
SHEET_FILE = "contact_sheet.jpg"
"""JPEG: training would take a PNG beside the maps for one of them."""
SHEET_IMAGES = 12
"""Photographs on the contact sheet."""
SHEET_CELL_PX = 320
MAX_BLOCKS = 1000
"""Blocks of the Ray Data input."""
STEPS_PER_METRE = 256
"""Of metres in a PNG, whose 16 bits then reach to 256 m."""


# --- The work on one photograph, in a Ray Data actor ---


class DepthActor:
    """A Ray Data actor that reads photographs by their keys and writes their depth maps."""

    def __init__(self, model: "ray.ObjectRef[DepthModel]", threads: int, section: DepthSection) -> None:
        self.estimator = ray.get(model).build()
        self.section = section
        self.target = locate(section.output)

        # `threads` are for work on the CPU.
        if torch.cuda.is_available():
            self.estimator.network.cuda()
        else:
            torch.set_num_threads(threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Estimate the depth of the photographs whose keys are in `item`.

        Returns `key` and the `error` of each photograph, empty where all went well.
        """
        errors = [self._estimate(key) for key in batch["item"].tolist()]
        return {"key": batch["item"], "error": np.array(errors, dtype=object)}

    def _estimate(self, key: str) -> str:
        """Write the depth map of one photograph; return the error.

        Errors of the photograph are returned, so that the others continue. A `StorageError` ends the job.
        """
        try:
            depth = self.estimator.estimate(load_image(self.section.input, key))
            data = encode_depth(depth, self.estimator.kind, self.section.format)
            self.target.child(get_map_name(key, self.section.format)).write(data)
        except (BadImage, MissingFile, ValueError) as error:
            return str(error)
        return ""


def encode_depth(depth: NDArray[np.float32], kind: DepthKind, format: str) -> bytes:
    """Encode a map of inverse depth in [0, 1] or of metres as a file.

    `npy` has the values as float16. `png` has 65535 levels of inverse depth, or metres in steps of 1/256 up to 256.

    Raises `BadImage` where rounding leaves one value, which training would refuse.
    """
    if format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.minimum(depth, np.finfo(np.float16).max).astype(np.float16))
        data = buffer.getvalue()
    else:
        # A level of 0 would say of metres that there is no reading.
        most = np.iinfo(np.uint16).max
        least, scale = (1, STEPS_PER_METRE) if kind == "metres" else (0, most)
        levels = np.clip(np.round(depth * scale), least, most).astype(np.uint16)
        data = cv2.imencode(".png", levels)[1].tobytes()

    DepthMap.from_pixels(decode_depth(data, f".{format}"), kind)
    return data


def get_map_name(key: str, format: str) -> str:
    """Return the path of a photograph's depth map below the output."""
    return f"{strip_suffix(key)}.{format}"


# --- All photographs, from the driver ---


def run_depth_estimation(job: DepthJob, console: Console, resume: bool = False) -> Outcome:
    """Run a job of kind `depth` from the driver.

    With `resume`, maps that exist in the output are not estimated again.

    Raises `StorageError`, `ManifestError`, `WeightsError`, `ClusterError`, and `JobFailed` where not one photograph can
    be used.
    """
    started = time.monotonic()
    section = job.depth

    # Find mistakes before Ray starts, and before anything is written.
    _refuse_inner_output(section)
    found = list_image_folder(section.input, "depth.input", {"depth.output": section.output})
    keys = list(found.select(IMAGE_SUFFIXES))
    _check_names(section, keys)
    section = section.model_copy(update={"input": found.root})
    folder = locate_model(section.weights, section.model)
    model = read_model(section, folder)
    kind = model.build().kind
    digest = read_index(folder)["model.safetensors"].sha256
    record = {"depth_kind": kind, "model": section.model, "model_sha256": digest, "format": section.format}
    _write_record(section, record)

    place = join_cluster(job, console.say)
    facts = {"input": section.input, "model": section.model, "output": section.output, "on": place}
    console.header(f"depth {job.name}", facts)
    name_passed_over(found.count_others(IMAGE_SUFFIXES), console)

    # Estimate, with a line of progress on the console.
    log = Log("driver", {"job": job.name, "kind": job.kind})
    log.info("depth estimation started", input=section.input, output=section.output)

    def show_progress(done: int, total: int) -> None:
        console.progress(done, total, "image")

    rest = f"the depth maps in {section.output} are whole; --resume goes on with the others"
    with hold_output(section.output, console, resume), explain_stop(lambda: rest):
        result = estimate_depth(section, keys, model, show_progress, resume)
    result.bad_files |= found.list_skipped(IMAGE_SUFFIXES)

    # Name the skipped photographs in the log and on the console.
    for uri, reason in result.bad_files.items():
        log.warning("image left out", image=uri, reason=reason)
    log.info("depth estimation ended", written=result.written, left_out=len(result.bad_files))
    name_bad_files(section.output, result.bad_files, console)
    result.refuse_nothing()

    # Show the maps, and tell how to train with them.
    mapped = [key for key in keys if posixpath.join(section.input, key) not in result.bad_files]
    facts = {"skipped": str(len(result.bad_files))}
    if mapped:
        sheet = locate(section.output).child(SHEET_FILE)
        sheet.write(draw_contact_sheet(section, kind, mapped))
        facts["sheet"] = sheet.uri
        facts["train"] = f"data.depth: {section.output}, data.depth_kind: {kind}"

    took_s = time.monotonic() - started
    facts["took"] = f"{format_duration(took_s)}, {result.written / took_s:.3g} images/s"
    earlier = f", {result.already_written} were written before" if result.already_written else ""
    console.footer(f"done: {result.written} depth maps written{earlier}", facts)
    return result


def read_model(section: DepthSection, folder: str) -> DepthModel:
    """Read the checked files of a model's folder or URI.

    Raises `WeightsError`.
    """
    paths = find_model_files(open_weights(folder))
    return DepthModel(section.model, {name: path.read_bytes() for name, path in paths.items()}, section.depth_kind)


def estimate_depth(
    section: DepthSection,
    keys: list[str],
    model: DepthModel,
    progress: Callable[[int, int], None],
    resume: bool = False,
) -> Outcome:
    """Write the depth maps of the photographs `keys` below `input`.

    Unusable photographs are skipped and named in the result. `progress` is called with the number of photographs done
    and the number of all.

    Raises `StorageError`.
    """
    # Skip the maps of an earlier call.
    files = locate(section.output).list_files() if resume else []
    existing = {unicodedata.normalize("NFC", file) for file in files}
    wanted = []
    for key in keys:
        if unicodedata.normalize("NFC", get_map_name(key, section.format)) not in existing:
            wanted.append(key)
    result = Outcome(already_written=len(keys) - len(wanted))
    if not wanted:
        return result

    # Count the outcomes as they come.
    for done, row in enumerate(_estimate_photographs(section, wanted, model), 1):
        if row["error"]:
            result.bad_files[posixpath.join(section.input, row["key"])] = row["error"]
        else:
            result.written += 1
        progress(done, len(wanted))
    return result


def _estimate_photographs(section: DepthSection, keys: list[str], model: DepthModel) -> Iterator[dict[str, Any]]:
    """Start the actors; return their results one by one.

    Raises `StorageError`.
    """
    DataContext.get_current().enable_progress_bars = False
    slots, threads = plan_actor_pool(len(keys))

    # The dataset must have no name here: see `iterate_rows`.
    return iterate_rows(
        ray.data.from_items(keys, override_num_blocks=min(len(keys), MAX_BLOCKS)).map_batches(
            DepthActor, batch_size=1, fn_constructor_args=(ray.put(model), threads, section), **slots
        )
    )


def draw_contact_sheet(section: DepthSection, kind: DepthKind, keys: list[str]) -> bytes:
    """Draw some photographs beside their depth maps, as JPEG.

    Near is yellow, far is violet, whatever the kind of the maps. `keys` are photographs that have a map.

    Raises `StorageError` and `BadImage`.
    """
    # Take photographs from the whole list, evenly.
    numbers = np.linspace(0, len(keys) - 1, min(len(keys), SHEET_IMAGES)).round().astype(int)
    shown = [keys[number] for number in numbers]

    rows = []
    for key in shown:
        content = locate(section.output).child(get_map_name(key, section.format)).read()
        depth = DepthMap.from_pixels(decode_depth(content, f".{section.format}"), kind)
        picture = apply_colour_map(depth.to_inverse(depth.pixels))
        rows.append({"photograph": load_image(section.input, key), "depth (yellow: near)": picture})

    sheet = draw_grid(rows, SHEET_CELL_PX, shown)
    return cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes()


# --- Checks before any depth is estimated ---


def _refuse_inner_output(section: DepthSection) -> None:
    """Refuse an output in the folder of the photographs: a training on that folder would take maps for photographs.

    Raises `ManifestError`.
    """
    if find_below(locate(section.output), locate(section.input)) is not None:
        raise ManifestError(f"depth.output: {section.output} lies in the folder of the photographs; choose another")


def _check_names(section: DepthSection, keys: list[str]) -> None:
    """Refuse photographs whose maps would have the same name.

    Raises `ManifestError`.
    """
    owners: dict[str, str] = {}
    for key in keys:
        owner = owners.setdefault(strip_suffix(key), key)
        if owner != key:
            name = get_map_name(key, section.format)
            raise ManifestError(f"depth.input: {owner} and {key} would both have the depth map {name}")


def _write_record(section: DepthSection, record: dict[str, str]) -> None:
    """Write what the maps are into the output.

    Raises `StorageError` where the output has maps of another model or another format: training cannot mix them.
    """
    place = locate(section.output).child(RECORD_FILE)
    if place.exists():
        earlier = _read_record(place)
        for key, value in record.items():
            if earlier.get(key) != value:
                found = f"{section.output} holds depth maps of {key} {earlier.get(key)}, not {value}"
                raise StorageError(f"{found}: choose another output, or delete this one")

    place.write(json.dumps(record, indent=1).encode() + b"\n")


def _read_record(place: Location) -> dict[str, str]:
    """Read the record of an earlier call.

    Raises `StorageError` where the file is none.
    """
    try:
        record = json.loads(place.read())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StorageError(f"{place.uri}: not a record of depth maps; choose another output, or delete this one")
    return record
