"""Validation during training: metrics on the validation sets, and a picture grid of the teacher's restorations."""

import contextlib
import math
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.core.data.device_samples import make_pairs
from corun_ray.core.data.images import BadImage, ImageU8, decode_image, encode_png
from corun_ray.core.data.samples import fit_truth, make_real_views
from corun_ray.core.inference.pictures import PictureRow, apply_colour_map, draw_grid, encode_thumbnail
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.metrics.catalog import TRANSMISSION_METRICS
from corun_ray.core.metrics.measure import Measure, Unmeasured, load_measure, rank_correlation
from corun_ray.core.scoring.coherence import BlockScores
from corun_ray.core.training.labels import Label, decode
from corun_ray.core.training.steps import Colabator
from corun_ray.core.weights import WeightsError
from corun_ray.service.data.inspection import refuse_other_transmission
from corun_ray.service.data.manifest import (
    Manifest,
    ManifestError,
    ValidationSet,
    list_validation_sets,
    load_image,
    load_transmission,
    load_truth,
)
from corun_ray.service.data.sample_maker import PAIR, SampleMaker
from corun_ray.service.data.unusable import BlameFile, UnusableFile, join_first_reasons
from corun_ray.service.runs.held_out import VALIDATION_FILE, MeasuredImage, PicturePair
from corun_ray.service.storage import MissingFile
from corun_ray.service.weights.needed import open_weights

PICTURE_PX = 640
"""Longer side of the pictures that a run keeps."""

TOLD_FILES = 10
"""Unusable validation files that one rank names."""

HIGHEST, LOWEST = 1, -1


def load_measures(job: TrainingJob, device: torch.device | str = "cpu") -> dict[str, Measure]:
    """Load the metrics of a job's validation sets that rate images, by name.

    Raises `WeightsError`, naming the key of the job file.
    """
    # Each metric once, in the order of the first set that has it.
    names: dict[str, None] = {}
    for section in job.data.list_validation_sections().values():
        names |= dict.fromkeys(job.train.choose_metrics(section))

    source = open_weights(job.train.validation_weights)
    measures = {}
    for name in names:
        if name in TRANSMISSION_METRICS:
            continue
        try:
            measures[name] = load_measure(name, source, device)
        except WeightsError as error:
            raise WeightsError(f"train.validation_metrics: {name}: {error}") from None
    return measures


@dataclass(frozen=True)
class ValidationResult:
    """One rank's part in a validation; the metrics are those of all ranks."""

    metrics: dict[str, float]
    """Means over the images of all ranks: `val/fade`, `val/psnr`, ...; those of a named set are `val/NAME/...`."""
    measured: list[MeasuredImage]
    """This rank's images."""
    notes: list[str]
    """Lines about images that a mean leaves out, alike on every rank."""
    own_notes: list[str] = field(default_factory=list)
    """Lines about this rank's images that cannot be used, each told once."""


class Validator:
    """Measures and pictures a network. The validation images are dealt out to the workers."""

    def __init__(self, job: TrainingJob, manifest: Manifest, rank: int, num_workers: int, device: torch.device) -> None:
        self.job, self.manifest, self.device = job, manifest, device
        self.num_workers = num_workers
        self.measures = load_measures(job, device)
        sets = list_validation_sets(job)
        self._told: set[str] = set()
        """Unusable files that have been told of."""

        # Each rank measures every n-th image of each set.
        self.sets = [replace(one, pairs=one.pairs[rank::num_workers]) for one in sets]
        """This rank's share of each validation set."""

        # The first images of each set, as they are before dealing out, have pictures at every validation.
        num_pictured = math.ceil(job.train.validation_images / max(1, len(sets)))
        self.pictured: list[set[str]] = []
        """The images of each set with pictures at every validation."""
        for one in sets:
            self.pictured.append({key for key, _ in one.pairs[:num_pictured]})

    def measure(self, network: nn.Module) -> ValidationResult:
        """Measure this rank's images of every set; every rank calls this at once.

        A mean is over the images with a finite value. The PSNR of equal images is infinite, and a metric may have no
        value for an image. Images that cannot be used are left out.

        Raises `ManifestError`, on every rank, where all images of a set are left out.
        """
        metrics: dict[str, float] = {}
        measured: list[MeasuredImage] = []
        notes: list[str] = []
        own_notes: list[str] = []
        for one, pictured in zip(self.sets, self.pictured, strict=True):
            # Measure this rank's images, and keep pictures of some.
            gallery, unusable = self._measure_set(network, one, pictured)
            images = gallery.list_measured()
            measured += images
            own_notes += self._describe_left_out(one, unusable)

            # Average over the images of all ranks.
            for name, (mean, num_finite, num_images) in self._average(one, images).items():
                if not num_images:
                    reasons = f" ({join_first_reasons(unusable)})" if unusable else ""
                    raise ManifestError(f"{one.prefix}: none of the validation images can be used{reasons}")
                metrics[f"{one.prefix}/{name}"] = mean
                if num_finite < num_images:
                    without = f"{num_images - num_finite} of {num_images} images without a finite value"
                    notes.append(f"{one.prefix}/{name}: {without}, left out of the mean (see {VALIDATION_FILE})")
        return ValidationResult(metrics, measured, notes, own_notes)

    def draw_picture(self, network: nn.Module, colabator: Colabator | None) -> bytes:
        """Draw a PNG grid of the network's restorations.

        Rows are real photographs with their labels for Colabator, else validation images, else training samples.
        """
        count = self.job.train.validation_images
        if isinstance(self.job, ColabatorJob) and colabator is not None:
            rows = self._make_label_rows(network, colabator, self._read_photos(self.job.data.hazy, count))
        else:
            rows = self._make_validation_rows(network, math.ceil(count / max(1, len(self.sets))))
        if not rows:
            rows = [self._make_sample_row(network, index) for index in range(count)]

        # Sets with and without clear images share one grid: all rows get all columns, some of them empty.
        columns: dict[str, None] = {}
        for row in rows:
            columns |= dict.fromkeys(row)
        return encode_png(draw_grid([{name: row.get(name) for name in columns} for row in rows]))

    # --- Measuring ---

    def _measure_set(
        self, network: nn.Module, validation_set: ValidationSet, pictured: set[str]
    ) -> tuple["Gallery", dict[str, str]]:
        """Restore and measure this rank's images of a set; return them, and URI → reason of unusable files."""
        gallery, unusable = Gallery(pictured), {}
        for hazy_key, clear_key in validation_set.pairs:
            uri = posixpath.join(validation_set.hazy_root, hazy_key)
            try:
                with BlameFile(validation_set.hazy_root, hazy_key):
                    hazy = load_image(validation_set.hazy_root, hazy_key)
                scene, transmission = restore(network, to_tensor(hazy).to(self.device))
                values = self._measure_scene(validation_set, scene, hazy_key, clear_key)
                if "transmission_rank" in validation_set.metrics:
                    values["transmission_rank"] = self._measure_transmission(validation_set, transmission, hazy_key)
            except UnusableFile as error:
                unusable[error.uri] = error.reason
                continue
            except Exception as error:
                error.add_note(f"(at the validation image {uri})")
                raise

            measured = MeasuredImage(validation_set.prefix, hazy_key, values)
            gallery.add(measured, lambda: (hazy, to_image(scene)))  # noqa: B023  # It is called at once.
        return gallery, unusable

    def _describe_left_out(self, validation_set: ValidationSet, unusable: Mapping[str, str]) -> list[str]:
        """Describe unusable files that have not been told of, the first ones by name."""
        new = {uri: reason for uri, reason in unusable.items() if uri not in self._told}
        self._told |= new.keys()

        lines = [f"{uri}: {reason}" for uri, reason in list(new.items())[:TOLD_FILES]]
        if len(new) > TOLD_FILES:
            lines.append(f"{len(new) - TOLD_FILES} more")
        return [f"left out of {validation_set.prefix}: {line}" for line in lines]

    def _measure_scene(
        self, validation_set: ValidationSet, scene: Tensor, hazy_key: str, clear_key: str | None
    ) -> dict[str, float]:
        """Measure a restored image `1 3 H W`, also against a clear image.

        A metric that has no value for the image gives NaN.

        Raises `UnusableFile` for a clear image that cannot be used, or does not fit.
        """
        clear = None
        if clear_key is not None:
            assert validation_set.clear_root is not None
            height_px, width_px = scene.shape[-2:]
            with BlameFile(validation_set.clear_root, clear_key):
                truth = load_image(validation_set.clear_root, clear_key)
            # A pair of two sizes is known by its hazy image.
            with BlameFile(validation_set.hazy_root, hazy_key):
                fitted = fit_truth(truth, (height_px, width_px, 3), crop_truth=validation_set.crop_truth)
            clear = to_tensor(fitted[0:height_px, 0:width_px]).to(self.device)

        values = {}
        for name in validation_set.metrics:
            if name in self.measures:
                try:
                    values[name] = self.measures[name](scene, clear)
                except Unmeasured:
                    values[name] = math.nan
        return values

    def _measure_transmission(self, validation_set: ValidationSet, transmission: Tensor | None, hazy_key: str) -> float:
        """Measure how well a transmission `1 1 H W` orders the places of an image by their haze.

        Raises `UnusableFile` for a true transmission that cannot be used, or does not fit.
        """
        # `load_starting_model` has refused networks without a transmission.
        assert transmission is not None and validation_set.transmission_root is not None
        with BlameFile(validation_set.transmission_root, validation_set.transmissions[hazy_key]):
            truth = load_transmission(validation_set, hazy_key)
            refuse_other_transmission(truth.shape, transmission.shape[-2:])
        return rank_correlation(transmission[0, 0].cpu(), torch.from_numpy(truth))

    def _average(
        self, validation_set: ValidationSet, measured: list[MeasuredImage]
    ) -> dict[str, tuple[float, int, int]]:
        """Average each metric over the images of all ranks that have a finite value.

        Returns metric → mean, number of images with a finite value, and number of all. Where no image has a finite
        value, the mean is infinite if all values are, else NaN.
        """
        names = validation_set.metrics

        # One row an image. The row of zeros, which counts as no image, stands for a rank without images of the set.
        rows = [[0.0] * len(names)]
        for image in measured:
            rows.append([image.values[name] for name in names])
        values = torch.tensor(rows, dtype=torch.float64)
        finite = values.isfinite()

        # Sums over all ranks: finite values, all values, and how many there are of each.
        sums = torch.stack(
            [
                values.where(finite, 0.0).sum(0),
                values.sum(0),
                finite[1:].sum(0).double(),
                torch.full((len(names),), len(measured), dtype=torch.float64),
            ]
        ).to(self.device)
        if self.num_workers > 1:
            dist.all_reduce(sums)

        means = {}
        for name, (finite_sum, whole_sum, num_finite, num_images) in zip(names, sums.T.tolist(), strict=True):
            mean = finite_sum / num_finite if num_finite else whole_sum
            means[name] = (mean, int(num_finite), int(num_images))
        return means

    # --- Rows of the grid ---

    def _read_photos(self, root: str, count: int) -> dict[str, ImageU8]:
        """Read the first `count` photographs that can be used."""
        photos: dict[str, ImageU8] = {}
        for key in self.manifest.hazy:
            if len(photos) == count:
                break
            with contextlib.suppress(BadImage, MissingFile):
                photos[key] = decode_image(self.manifest.read_image(root, key))
        return photos

    def _make_label_rows(
        self, network: nn.Module, colabator: Colabator, photos: Mapping[str, ImageU8]
    ) -> list[PictureRow]:
        """Make rows of photographs: restoration, label and trust map."""
        rows = []
        labels = colabator.pool.prefetch(list(photos)).result()
        for image, label in zip(photos.values(), labels, strict=True):
            # The weak view, as the teacher sees it. A fixed seed: every validation shows the same crop.
            rng = np.random.default_rng(0)
            data = self.job.data
            weak = make_real_views(image, rng, patch_px=data.patch_px, jpeg_quality=None, resize=data.resize).weak

            row = self._make_restored_row(network, weak)
            row["label"] = None if label is None else to_image(torch.from_numpy(decode(label.scene))[None])
            row["trust map"] = None if label is None else self._draw_trust(colabator, label)
            rows.append(row)
        return rows

    def _draw_trust(self, colabator: Colabator, label: Label) -> ImageU8:
        """Draw the trust map of a label in colours."""
        clarity = torch.from_numpy(label.block_clarity.copy())[None]
        quality = torch.from_numpy(label.block_quality.copy())[None]
        height, width = label.scene.shape[-2:]
        trust = colabator.coherence.build_trust_map(BlockScores(clarity, quality), height, width)
        return apply_colour_map(trust[0, 0].numpy())

    def _make_validation_rows(self, network: nn.Module, count_each: int) -> list[PictureRow]:
        """Make rows of the first images of every set that can be used."""
        rows: list[PictureRow] = []
        for one in self.sets:
            num_enough = len(rows) + count_each
            for hazy_key, clear_key in one.pairs:
                if len(rows) == num_enough:
                    break
                with contextlib.suppress(BadImage, MissingFile):
                    rows.append(self._make_validation_row(network, one, hazy_key, clear_key))
        return rows

    def _make_validation_row(
        self, network: nn.Module, validation_set: ValidationSet, hazy_key: str, clear_key: str | None
    ) -> PictureRow:
        """Make a row of a validation image and its truths.

        Raises `BadImage` and `MissingFile`.
        """
        hazy = load_image(validation_set.hazy_root, hazy_key)
        truths: PictureRow = {}
        if clear_key is not None:
            truths["truth"] = _load_truth(validation_set, clear_key, hazy.shape)
        if hazy_key in validation_set.transmissions:
            truths["true transmission"] = apply_colour_map(load_transmission(validation_set, hazy_key))
        return self._make_restored_row(network, hazy) | truths

    def _make_sample_row(self, network: nn.Module, index: int) -> PictureRow:
        """Make a row of a synthetic training sample."""
        maker = SampleMaker(self.job, self.manifest, self.job.data.patch_px, lambda bad_files: None)
        sample = maker.sample(index)
        if PAIR in sample:
            # The learner makes these on the worker's device.
            hazy, clear, _ = make_pairs([sample[PAIR]], self.device)
            sample = {"hazy": to_image(hazy), "clear": to_image(clear)}
        return {**self._make_restored_row(network, sample["hazy"]), "truth": sample["clear"]}

    def _make_restored_row(self, network: nn.Module, hazy: ImageU8) -> PictureRow:
        """Make a row of a hazy image, its restoration and any transmission."""
        scene, transmission = restore(network, to_tensor(hazy).to(self.device))
        row: PictureRow = {"hazy": hazy, "output": to_image(scene)}
        if transmission is not None:
            row["transmission"] = apply_colour_map(transmission[0, 0].cpu().numpy())
        return row


def _load_truth(validation_set: ValidationSet, clear_key: str, shape: tuple[int, ...]) -> ImageU8:
    """Read the truth of an image of this shape.

    Raises as `load_truth` does.
    """
    assert validation_set.clear_root is not None
    return load_truth(validation_set.clear_root, clear_key, shape, crop_truth=validation_set.crop_truth)


class Gallery:
    """The measured images of a set. Pictures are kept of chosen images and of the best and worst by each metric."""

    def __init__(self, chosen: set[str]) -> None:
        self._chosen = chosen
        self._measured: list[MeasuredImage] = []
        self._pictures: dict[str, PicturePair] = {}
        self._extremes: dict[tuple[str, int], tuple[float, str]] = {}
        """(metric, `HIGHEST` or `LOWEST`) → (value times the sign, image)."""

    def add(self, measured: MeasuredImage, render: Callable[[], tuple[ImageU8, ImageU8]]) -> None:
        """Add an image.

        `render` returns input and output. It is called only if the pictures are kept.
        """
        self._measured.append(measured)
        self._update_extremes(measured)

        # Keep the image's pictures if it is wanted now, and drop those of images that no longer are.
        wanted = set(self._chosen)
        for _, image in self._extremes.values():
            wanted.add(image)
        if measured.image in wanted:
            hazy, output = render()
            self._pictures[measured.image] = PicturePair(
                encode_thumbnail(hazy, PICTURE_PX), encode_thumbnail(output, PICTURE_PX)
            )
        for image in self._pictures.keys() - wanted:
            del self._pictures[image]

    def list_measured(self) -> list[MeasuredImage]:
        """List all images as added, with the pictures that were kept."""
        return [replace(one, pictures=self._pictures.get(one.image)) for one in self._measured]

    def _update_extremes(self, measured: MeasuredImage) -> None:
        """Note where the image is the best or worst so far."""
        for metric, value in measured.values.items():
            if math.isnan(value):  # Neither best nor worst.
                continue
            for sign in (HIGHEST, LOWEST):
                best = self._extremes.get((metric, sign))
                if best is None or sign * value > best[0]:
                    self._extremes[metric, sign] = (sign * value, measured.image)
