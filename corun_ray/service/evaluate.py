"""Measuring models on held-out images by Ray Data: a table, and a contact sheet to look at."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import DataContext

from corun_ray.config import Evaluate
from corun_ray.core.corun import CORUN
from corun_ray.core.fade import fade
from corun_ray.core.images import BadImage, encode_png
from corun_ray.core.metrics import psnr, ssim
from corun_ray.core.pictures import grid
from corun_ray.core.restore import restore, to_image, to_tensor
from corun_ray.service.manifest import held_out
from corun_ray.service.restorers import Restorers, actor_slots, share_network
from corun_ray.service.storage import StorageError
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
        """Rows of (key, truth key) → `key`, `error` and `values` as model × metric."""
        keys = batch["key"].tolist()
        rows = [self._measure(*pair) for pair in zip(keys, batch["truth"].tolist(), strict=True)]
        empty = np.full((len(self.networks) + 1, len(self.section.metrics)), np.nan)
        values = np.stack([empty if isinstance(row, str) else row for row in rows])
        errors = np.array([row if isinstance(row, str) else "" for row in rows], dtype=object)
        return {"key": batch["key"], "error": errors, "values": values}

    def _measure(self, key: str, truth_key: str) -> np.ndarray | str:
        try:
            hazy = to_tensor(load_image(self.section.hazy, key)).to(self.device)
            truth = None
            if self.section.clear is not None:
                truth = to_tensor(load_image(self.section.clear, truth_key)).to(self.device)
            scenes = [hazy, *(restore(network, hazy).scene for network in self.networks.values())]
            return np.array([[self._metric(name, scene, truth) for name in self.section.metrics] for scene in scenes])
        except (BadImage, StorageError, ValueError) as error:
            return str(error)

    @staticmethod
    def _metric(name: str, scene: torch.Tensor, truth: torch.Tensor | None) -> float:
        # What is measured is the picture a user gets: 8 bits.
        scene = (scene * 255).round() / 255
        if name == "fade" or truth is None:
            return fade(scene).item()
        if truth.shape != scene.shape:
            raise ValueError(f"its truth is of another size ({tuple(truth.shape[2:])}, not {tuple(scene.shape[2:])})")
        return {"psnr": psnr, "ssim": ssim}[name](scene, truth).item()


def evaluate(
    section: Evaluate, networks: dict[str, CORUN], progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Measures the hazy input and every network; unusable images are named in the result.

    Raises `StorageError`, `ManifestError`.
    """
    pairs = held_out(section.hazy, section.clear, "evaluate")
    DataContext.get_current().enable_progress_bars = False
    shared = {name: share_network(network) for name, network in networks.items()}
    items = [{"key": key, "truth": truth or ""} for key, truth in pairs]
    outcomes = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        MeasureFiles, batch_size=1, fn_constructor_args=(shared, section), **actor_slots()
    )
    images, bad_files = [], {}
    for done, row in enumerate(outcomes.iter_rows(), 1):
        if row["error"]:
            bad_files[f"{section.hazy}/{row['key']}"] = row["error"]
        else:
            models = zip([HAZY, *networks], row["values"].tolist(), strict=True)
            values = {model: dict(zip(section.metrics, metrics, strict=True)) for model, metrics in models}
            images.append(Measured(row["key"], values))
        if progress:
            progress(done, len(pairs))
    if not images:
        raise StorageError(f"evaluate.hazy: not one of the {len(pairs)} images could be used")
    images.sort(key=lambda image: image.key)
    return Evaluation(
        images,
        bad_files,
        _contact_sheet(section, networks, [p for p in pairs if f"{section.hazy}/{p[0]}" not in bad_files]),
    )


def _contact_sheet(section: Evaluate, networks: dict[str, CORUN], pairs: list[tuple[str, str | None]]) -> bytes:
    rows = []
    for key, truth_key in pairs[:: max(1, len(pairs) // SHEET_ROWS)][:SHEET_ROWS]:
        hazy = load_image(section.hazy, key)
        row: Row = {HAZY: hazy}
        row |= {name: to_image(restore(net.eval(), to_tensor(hazy)).scene) for name, net in networks.items()}
        if section.clear is not None and truth_key is not None:
            row["truth"] = load_image(section.clear, truth_key)
        rows.append(row)
    return encode_png(grid(rows, cell_px=240))
