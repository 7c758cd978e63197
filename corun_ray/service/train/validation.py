"""Validation during training: metrics on held-out images, and a picture grid of what the teacher makes of haze.

Held-out images measured one by one, and which of them are kept as pictures."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.core.data.images import BadImage, ImageU8, decode_image, encode_png
from corun_ray.core.data.samples import make_real_views
from corun_ray.core.inference.pictures import PictureRow, apply_colour_map, draw_grid, encode_thumbnail
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.metrics.fade import fade
from corun_ray.core.metrics.measure import psnr, ssim
from corun_ray.core.scoring.coherence import BlockScores
from corun_ray.core.training.labels import Label, decode
from corun_ray.core.training.steps import Colabator
from corun_ray.service.data.manifest import Manifest, ValidationSet, list_validation_sets, load_image
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.runs.held_out import MeasuredImage, PicturePair
from corun_ray.service.storage import MissingFile

PICTURE_PX = 640


class Gallery:
    """Keeps the pictures of named images and of the best and worst by each metric, and no others' in memory."""

    def __init__(self, shown: set[str]) -> None:
        self._shown = shown
        self._measured: list[MeasuredImage] = []
        self._kept: dict[str, PicturePair] = {}
        self._extremes: dict[tuple[str, int], tuple[float, str]] = {}
        """(metric, +1 the highest or -1 the lowest) → (value times that sign, image)."""

    def add(self, measured: MeasuredImage, look: Callable[[], tuple[ImageU8, ImageU8]]) -> None:
        """One more image; `look` gives what went in and what came out, and is called only if they are kept."""
        self._measured.append(measured)
        for metric, value in measured.values.items():
            for sign in (1, -1) if not math.isnan(value) else ():
                if (metric, sign) not in self._extremes or sign * value > self._extremes[metric, sign][0]:
                    self._extremes[metric, sign] = (sign * value, measured.image)
        wanted = self._shown | {image for _, image in self._extremes.values()}
        if measured.image in wanted:
            self._kept[measured.image] = PicturePair(*(encode_thumbnail(picture, PICTURE_PX) for picture in look()))
        self._kept = {image: pictures for image, pictures in self._kept.items() if image in wanted}

    def measured(self) -> list[MeasuredImage]:
        """All of them, with the pictures that were kept."""
        return [replace(one, pictures=self._kept.get(one.image)) for one in self._measured]


class Validator:
    """Measures and pictures a network; the held-out images are dealt out to the workers."""

    def __init__(self, job: TrainingJob, manifest: Manifest, rank: int, num_workers: int, device: torch.device) -> None:
        self.job, self.manifest, self.device = job, manifest, device
        self.num_workers = num_workers
        held_out = list_validation_sets(job)
        self.held_out = [replace(held, pairs=held.pairs[rank::num_workers]) for held in held_out]
        """This rank's share of each set."""
        each = -(-job.train.validation_images // max(1, len(held_out)))
        self.shown = [{key for key, _ in held.pairs[:each]} for held in held_out]
        """Of each set, the images whose pictures are kept of every validation."""

    def measure(self, network: nn.Module) -> tuple[dict[str, float], list[MeasuredImage]]:
        """Mean `val/psnr` and `val/ssim` where there is a truth, and `val/fade`; `val/NAME/...` of a named set.

        Every rank calls it, and is given the means over all ranks' images and its own images one by one.
        """
        metrics: dict[str, float] = {}
        measured: list[MeasuredImage] = []
        for held, shown in zip(self.held_out, self.shown, strict=True):
            gallery = Gallery(shown)
            for hazy_key, clear_key in held.pairs:
                hazy = load_image(held.hazy_root, hazy_key)
                scene = restore(network, to_tensor(hazy).to(self.device)).scene
                values = self._values(held, scene, clear_key)
                gallery.add(MeasuredImage(held.prefix, hazy_key, values), lambda: (hazy, to_image(scene)))  # noqa: B023
            found = gallery.measured()
            metrics |= {f"{held.prefix}/{name}": mean for name, mean in self._means(held, found).items()}
            measured += found
        return metrics, measured

    def _values(self, held: ValidationSet, scene: torch.Tensor, clear_key: str | None) -> dict[str, float]:
        values = {"fade": fade(scene).item()}
        if clear_key is not None:
            assert held.clear_root is not None
            truth = self._tensor(held.clear_root, clear_key)
            values |= {"psnr": psnr(scene, truth).item(), "ssim": ssim(scene, truth).item()}
        return values

    def _means(self, held: ValidationSet, measured: list[MeasuredImage]) -> dict[str, float]:
        """Over the images of all ranks."""
        names = ("fade",) if held.clear_root is None else ("fade", "psnr", "ssim")
        rows = [[*(image.values[name] for name in names), 1.0] for image in measured]
        sums = torch.tensor([[0.0] * (len(names) + 1), *rows], dtype=torch.float64).sum(0).to(self.device)
        if self.num_workers > 1:
            dist.all_reduce(sums)
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def picture(self, network: nn.Module, colabator: Colabator | None) -> bytes:
        """A PNG grid: real haze with its labels for Colabator, else held-out images, else training samples."""
        count = self.job.train.validation_images
        if isinstance(self.job, ColabatorJob) and colabator is not None:
            rows = self._label_rows(network, colabator, self._photos(self.job.data.hazy, count))
        elif self.held_out:
            each = -(-count // len(self.held_out))
            rows = [self._held_out_row(network, held, *pair) for held in self.held_out for pair in held.pairs[:each]]
        else:
            rows = [self._sample_row(network, index) for index in range(count)]
        # Sets with and without a truth share one grid.
        columns = dict.fromkeys(name for row in rows for name in row)
        return encode_png(draw_grid([{name: row.get(name) for name in columns} for row in rows]))

    def _photos(self, root: str, count: int) -> dict[str, ImageU8]:
        """The first real photographs that can be used: what the stream sets aside must not fail a picture."""
        found: dict[str, ImageU8] = {}
        for key in self.manifest.hazy:
            if len(found) == count:
                break
            with contextlib.suppress(BadImage, MissingFile):
                found[key] = decode_image(self.manifest.read_image(root, key))
        return found

    def _label_rows(self, network: nn.Module, colabator: Colabator, photos: dict[str, ImageU8]) -> list[PictureRow]:
        rows = []
        labels = colabator.pool.prefetch(list(photos)).result()
        for image, label in zip(photos.values(), labels, strict=True):
            weak = make_real_views(
                image, np.random.default_rng(0), patch_px=self.job.data.patch_px, jpeg_quality=None
            ).weak
            row = self._restored(network, weak)
            row["label"] = None if label is None else to_image(torch.from_numpy(decode(label.scene))[None])
            row["trust map"] = None if label is None else self._trust(colabator, label)
            rows.append(row)
        return rows

    def _trust(self, colabator: Colabator, label: Label) -> ImageU8:
        clarity, quality = (torch.from_numpy(x.copy())[None] for x in (label.block_clarity, label.block_quality))
        trust = colabator.coherence.build_trust_map(BlockScores(clarity, quality), *label.scene.shape[-2:])
        return apply_colour_map(trust[0, 0].numpy())

    def _sample_row(self, network: nn.Module, index: int) -> PictureRow:
        sample = SampleMaker(self.job, self.manifest, self.job.data.patch_px, lambda bad_files: None).sample(index)
        return {**self._restored(network, sample["hazy"]), "truth": sample["clear"]}

    def _held_out_row(
        self, network: nn.Module, held: ValidationSet, hazy_key: str, clear_key: str | None
    ) -> PictureRow:
        row = self._restored(network, load_image(held.hazy_root, hazy_key))
        if clear_key is not None:
            assert held.clear_root is not None
            row["truth"] = load_image(held.clear_root, clear_key)
        return row

    def _restored(self, network: nn.Module, hazy: ImageU8) -> PictureRow:
        scene, transmission = restore(network, to_tensor(hazy).to(self.device))
        row: PictureRow = {"hazy": hazy, "output": to_image(scene)}
        if transmission is not None:
            row["transmission"] = apply_colour_map(transmission[0, 0].cpu().numpy())
        return row

    def _tensor(self, root: str, key: str) -> torch.Tensor:
        return to_tensor(load_image(root, key)).to(self.device)
