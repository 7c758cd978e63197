"""Measuring models on held-out images by Ray Data: a table, and a contact sheet to look at."""

import csv
import io
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import DataContext

from corun_ray.config import Evaluate
from corun_ray.core.fade import fade
from corun_ray.core.images import BadImage, decode_image, encode_png
from corun_ray.core.metrics import psnr, ssim
from corun_ray.core.pictures import grid
from corun_ray.core.restore import restore, to_image, to_tensor
from corun_ray.service.manifest import held_out
from corun_ray.service.models import Model
from corun_ray.service.restorers import Restorers, actor_slots, rows_of
from corun_ray.service.storage import MissingFile, StorageError
from corun_ray.service.validation import Row, load_image

HAZY = "hazy input"
SHEET_ROWS = 6


@dataclass(frozen=True)
class Measured:
    """One image's metrics: model → metric → value."""

    key: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    images: list[Measured]
    bad_files: dict[str, str]
    contact_sheet: bytes
    """PNG."""

    def means(self) -> dict[str, dict[str, float]]:
        """Model → metric → mean over the images."""
        first = self.images[0].values
        return {
            model: {name: float(np.mean([image.values[model][name] for image in self.images])) for name in metrics}
            for model, metrics in first.items()
        }

    def csv(self) -> bytes:
        """One line an image and model."""
        text = io.StringIO()
        metrics = list(next(iter(self.images[0].values.values())))
        writer = csv.writer(text)
        writer.writerow(["image", "model", *metrics])
        for image in self.images:
            for model, values in image.values.items():
                writer.writerow([image.key, model, *(f"{values[name]:.6f}" for name in metrics)])
        return text.getvalue().encode()


class MeasureFiles(Restorers):
    """A Ray Data actor: restores images with every model and measures the results."""

    def __init__(self, shared: dict[str, Any], section: Evaluate) -> None:
        super().__init__(shared)
        self.section = section

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One row of `key`, `truth` (its key or empty), `shown` → `key`, `error`, `values` (model x metric), `strip`.

        `strip` is a PNG of the hazy image and every restoration, side by side, for the contact sheet.
        """
        key, truth, shown = batch["key"][0], batch["truth"][0], batch["shown"][0]
        values, strip, error = np.zeros((len(self.networks) + 1, len(self.section.metrics))), b"", ""
        try:
            hazy = to_tensor(load_image(self.section.hazy, key)).to(self.device)
            scenes = [hazy, *(restore(network, hazy).scene for network in self.networks.values())]
            values = self._values(scenes, truth)
            strip = encode_png(np.concatenate([to_image(scene) for scene in scenes], 1)) if shown else b""
        except (BadImage, MissingFile, ValueError) as reason:
            error = str(reason)
        cells = {"key": key, "error": error, "strip": strip}
        row = {name: np.array([cell], dtype=object) for name, cell in cells.items()}
        return {**row, "values": values[None]}

    def _values(self, scenes: list[torch.Tensor], truth_key: str) -> np.ndarray:
        truth = None
        if self.section.clear is not None:
            truth = to_tensor(load_image(self.section.clear, truth_key)).to(self.device)
        # What is measured is the picture a user gets: 8 bits.
        pictures = [(scene * 255).round() / 255 for scene in scenes]
        return np.array([[_metric(name, picture, truth) for name in self.section.metrics] for picture in pictures])


def _metric(name: str, picture: torch.Tensor, truth: torch.Tensor | None) -> float:
    if name == "fade" or truth is None:
        return fade(picture).item()
    if truth.shape != picture.shape:
        raise ValueError(f"its truth is of another size ({tuple(truth.shape[2:])}, not {tuple(picture.shape[2:])})")
    return {"psnr": psnr, "ssim": ssim}[name](picture, truth).item()


def evaluate(
    section: Evaluate, models: dict[str, Model], progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Measures the hazy input and every network; unusable images are named in the result.

    Raises `StorageError`, `ManifestError`.
    """
    pairs = held_out(section.hazy, section.clear, "evaluate")
    DataContext.get_current().enable_progress_bars = False
    shared = {name: ray.put(model) for name, model in models.items()}
    spacing = max(1, len(pairs) // SHEET_ROWS)
    shown = {key for key, _ in pairs[::spacing][:SHEET_ROWS]}
    items = [{"key": key, "truth": truth or "", "shown": key in shown} for key, truth in pairs]
    outcomes = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        MeasureFiles, batch_size=1, fn_constructor_args=(shared, section), **actor_slots()
    )
    names = [HAZY, *models]
    images, bad_files, strips = [], {}, {}
    for done, row in enumerate(rows_of(outcomes), 1):
        if row["error"]:
            bad_files[posixpath.join(section.hazy, row["key"])] = row["error"]
        else:
            measured = zip(names, row["values"].tolist(), strict=True)
            values = {model: dict(zip(section.metrics, metrics, strict=True)) for model, metrics in measured}
            images.append(Measured(row["key"], values))
        if row["strip"]:
            strips[row["key"]] = row["strip"]
        if progress:
            progress(done, len(pairs))
    if not images:
        raise StorageError(f"evaluate.hazy: not one of the {len(pairs)} images could be used: {bad_files}")
    images.sort(key=lambda image: image.key)
    return Evaluation(images, bad_files, _contact_sheet(section, names, dict(pairs), strips))


def _contact_sheet(
    section: Evaluate, names: list[str], truths: dict[str, str | None], strips: dict[str, bytes]
) -> bytes:
    rows = []
    for key, strip in sorted(strips.items()):
        row: Row = dict(zip(names, np.split(decode_image(strip), len(names), axis=1), strict=True))
        truth = truths[key]
        if section.clear is not None and truth is not None:
            row["truth"] = load_image(section.clear, truth)
        rows.append(row)
    return encode_png(grid(rows, cell_px=240))
