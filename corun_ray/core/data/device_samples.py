"""The pixel work of many drawn samples at once, on any device of torch.

Does with `DrawnPair` and `StrongDraw` what `samples.make_synthetic_pair` and `augment.make_strong_view` do with numpy
and OpenCV: the same steps in the same order, each rounded to 8 bits where they round. Without noise and JPEG a pixel
differs by one level at most. Noise is normal here, without the quantiles of there; JPEG is that of `device_jpeg`.

Each sample's noise has a seed of its own, so that it does not depend on the samples that it is made with.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from corun_ray.core.choices import ResizeKind
from corun_ray.core.data import augment
from corun_ray.core.data.augment import StrongOperation
from corun_ray.core.data.device_jpeg import apply_jpeg
from corun_ray.core.data.samples import DEPTH_LEVELS, DrawnPair, StrongDraw

_MAX_PIXELS = 2**23
"""Pixels of regions, with their padding, that are worked on at once: 100 MB in three channels of floats."""
_CUBIC = -0.75
"""Steepness of the bicubic kernel, which is OpenCV's."""

_GREY = (9798 / 2**15, 19235 / 2**15, 3735 / 2**15)
"""Shares of red, green and blue in grey (BT.601), as OpenCV rounds them."""

# --- Synthetic pairs ---


@torch.no_grad()
def make_pairs(
    drawn: Sequence[DrawnPair], device: torch.device, *, with_transmission: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make synthetic pairs.

    All have the same patch size and way of resizing. Returns hazy and clear patches, `B 3 p p`, and with
    `with_transmission` the true transmission, `B 1 p p`; all in [0, 1], in whole 255ths.
    """
    # Regions of similar size are worked on together: all are padded to the largest one.
    order = sorted(range(len(drawn)), key=lambda index: drawn[index].crop.side_px)
    patches = drawn[0].patch_px
    made = torch.empty((len(drawn), 7, patches, patches), device=device)
    while order:
        largest_px = drawn[order[-1]].crop.side_px
        group = order[-max(1, _MAX_PIXELS // largest_px**2) :]
        del order[-len(group) :]
        made[group] = _make_group([drawn[index] for index in group], device)

    # The channels of a pixel side by side, as images from the stream have them: networks are faster or slower by it.
    hazy, clear = (made[:, part].contiguous(memory_format=torch.channels_last) for part in (slice(3), slice(3, 6)))
    return hazy, clear, made[:, 6:] if with_transmission else None


def _make_group(drawn: list[DrawnPair], device: torch.device) -> Tensor:
    """Make pairs at once; return `B 7 p p`: hazy and clear patches and transmission."""
    sides_px = torch.tensor([one.crop.side_px for one in drawn], device=device)
    clear, inverse_depth = _stack_regions(drawn, device)

    # Haze over the camera's shot, then JPEG, at the images' own resolution.
    transmission = _compute_transmission(drawn, inverse_depth, sides_px)
    airlight = clear.new_tensor([one.haze.airlight for one in drawn])[:, :, None, None]
    hazy = (_take_shots(drawn, clear) - airlight) * transmission + airlight
    hazy = _round_levels(255 * hazy)
    _compress_some(drawn, hazy, sides_px)

    # Resize all seven planes to patches; the columns of a mirrored one in reverse order.
    levels = torch.cat((hazy, clear, _round_levels(255 * transmission)), 1)
    rows = _compute_weights(sides_px, levels.shape[-1], drawn[0].patch_px, drawn[0].resize)
    is_flipped = torch.tensor([one.crop.flip for one in drawn], device=device)
    columns = torch.where(is_flipped[:, None, None], rows.flip(1), rows)
    patches = _round_levels(rows[:, None] @ levels @ columns[:, None].transpose(2, 3))

    turned = [torch.rot90(patch, one.crop.quarter_turns, (1, 2)) for patch, one in zip(patches, drawn, strict=True)]
    return torch.stack(turned) / 255


def _stack_regions(drawn: list[DrawnPair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack regions, padded with zeros: clear `B 3 S S`, levels as float; inverse depth `B 1 S S` in [0, 1]."""
    side_px = max(one.crop.side_px for one in drawn)
    clear = np.zeros((len(drawn), side_px, side_px, 3), np.uint8)
    depth = np.zeros((len(drawn), 1, side_px, side_px), np.int16)
    for index, one in enumerate(drawn):
        own_px = one.crop.side_px
        clear[index, :own_px, :own_px] = one.region
        depth[index, 0, :own_px, :own_px] = one.inverse_depth

    # Whole numbers travel to the device, a quarter or half of the floats.
    on_device = torch.from_numpy(clear).to(device).permute(0, 3, 1, 2).float()
    return on_device.contiguous(), torch.from_numpy(depth).to(device).float() / DEPTH_LEVELS


def _compute_transmission(drawn: list[DrawnPair], inverse_depth: Tensor, sides_px: Tensor) -> Tensor:
    """Compute `exp(−2β(1 − d + n))`, `B 1 S S`."""
    beta = inverse_depth.new_tensor([one.haze.beta for one in drawn])[:, None, None, None]
    nearest = inverse_depth.new_tensor([one.haze.nearest for one in drawn])[:, None, None, None]
    if all(one.haze.deviation is None for one in drawn):
        return torch.exp(2 * beta * (inverse_depth - (1 + nearest)))

    # Where the density varies: its coarse lattice, enlarged smoothly over the region, without overshoot.
    density = beta.expand_as(inverse_depth).clone()
    for index, one in enumerate(drawn):
        if one.haze.deviation is None:
            continue
        lattice = torch.from_numpy(one.haze.deviation).to(inverse_depth.device)
        side, width = sides_px[index : index + 1], inverse_depth.shape[-1]
        rows, columns = (_compute_enlargement(length, side, width) for length in lattice.shape)
        smooth = (rows @ lattice @ columns.T).clamp(lattice.min(), lattice.max())
        density[index] *= 1 + smooth
    return torch.exp(2 * density * (inverse_depth - (1 + nearest)))


def _compute_enlargement(length: int, side_px: Tensor, padded_px: int) -> Tensor:
    """Return weights `padded_px length` that enlarge so many values to a side, bicubically; further rows repeat."""
    places = torch.arange(padded_px, device=side_px.device, dtype=torch.float64)
    centres = torch.minimum((places + 0.5) * length / side_px - 0.5, torch.full_like(places, length))
    return _weigh_cubic(centres[None], torch.tensor([length], device=side_px.device), length)[0].float()


def _take_shots(drawn: list[DrawnPair], clear: Tensor) -> Tensor:
    """Darken images and add noise: levels to a camera's shots in [0, 1]."""
    gamma = clear.new_tensor([one.camera.gamma for one in drawn])[:, None, None, None]
    shots = (clear / 255) ** gamma
    for shot, one in zip(shots, drawn, strict=True):
        if one.camera.noise is None:
            continue

        # A matrix `1 3` mixes one noise image into three channels, a matrix `3 3` three.
        assert one.noise_seed is not None
        side_px = one.crop.side_px
        generator = torch.Generator(shot.device).manual_seed(one.noise_seed)
        shape = (len(one.camera.noise), side_px, side_px)
        independent = torch.randn(shape, generator=generator, device=shot.device)
        mixing = torch.from_numpy(one.camera.noise).to(shot.device)
        shot[:, :side_px, :side_px] += torch.einsum("kc,khw->chw", mixing, independent)
    return shots.clamp_(0, 1)


def _compress_some(drawn: list[DrawnPair], hazy: Tensor, sides_px: Tensor) -> None:
    """Take those images through JPEG, in place, for which a quality was drawn."""
    chosen, placed = [], []
    for index, one in enumerate(drawn):
        if one.jpeg_quality is not None:
            chosen.append(index)
            placed.append((one.crop.top_px, one.crop.left_px, one.jpeg_quality))
    if chosen:
        tops, lefts, qualities = torch.tensor(placed, device=hazy.device).T
        hazy[chosen] = apply_jpeg(hazy[chosen], sides_px[chosen], tops, lefts, qualities)


def _round_levels(levels: Tensor) -> Tensor:
    """Round to whole levels within 0…255."""
    return levels.round().clamp_(0, 255)


# --- Resizing as a product with a matrix ---


def _compute_weights(sides_px: Tensor, padded_px: int, patch_px: int, method: ResizeKind) -> Tensor:
    """Return the weights `B patch_px padded_px` by which a side of each region becomes one of a patch.

    They do what `augment.resize` does; pixels beyond a region's side weigh nothing.
    """
    # Edges and centres of the patch's pixels, in pixels of the region.
    scales = sides_px.double()[:, None] / patch_px
    places = torch.arange(patch_px, device=sides_px.device, dtype=torch.float64)
    centres = (places + 0.5) * scales - 0.5
    if method == "cubic":
        return _weigh_cubic(centres, sides_px, padded_px).float()

    # A side that shrinks is averaged: a pixel weighs by how much of it lies between the edges.
    columns = torch.arange(padded_px, device=sides_px.device, dtype=torch.float64)
    starts, ends = (places * scales)[..., None], ((places + 1) * scales)[..., None]
    covered = (torch.minimum(ends, columns + 1) - torch.maximum(starts, columns)).clamp_(min=0)

    # A side that grows is interpolated between the two nearest pixels.
    within = torch.minimum(centres.clamp(min=0), sides_px[:, None] - 1.0)[..., None]
    between = (1 - (within - columns).abs()).clamp_(min=0)
    grows = (sides_px < patch_px)[:, None, None]
    return torch.where(grows, between, covered / scales[..., None]).float()


def _weigh_cubic(centres: Tensor, lengths: Tensor, padded: int) -> Tensor:
    """Return bicubic weights `B P padded` around centres `B P`; the ends of each length, `B`, are repeated."""
    columns = torch.arange(padded, device=centres.device)
    weights = torch.zeros((*centres.shape, padded), device=centres.device, dtype=centres.dtype)
    before = centres.floor()
    for tap in (-1, 0, 1, 2):
        distance = (centres - before - tap).abs()
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * _CUBIC
        place = torch.minimum((before + tap).clamp(min=0).long(), lengths[:, None] - 1)
        weights += torch.where(distance <= 1, near, far)[..., None] * (place[..., None] == columns)
    return weights


# --- Strong views ---


@torch.no_grad()
def make_strong_views(weak: Tensor, draws: Sequence[StrongDraw]) -> Tensor:
    """Make the student's views of weak ones, `B 3 p p` in [0, 1]; returns the same, in whole 255ths."""
    levels = _round_levels(255 * weak)
    for turn in range(max(len(draw.operations) for draw in draws)):
        # Views with the same operation at this turn are worked on together.
        for operation, apply in _OPERATIONS.items():
            chosen = [index for index, draw in enumerate(draws) if draw.operations[turn][0] is operation]
            if chosen:
                strengths = levels.new_tensor([draws[index].operations[turn][1] for index in chosen])
                levels[chosen] = _round_levels(apply(levels[chosen], strengths[:, None, None, None]))
    return levels / 255


def _adjust_contrast(levels: Tensor, factors: Tensor) -> Tensor:
    grey = (torch.einsum("c,nchw->nhw", levels.new_tensor(_GREY), levels) + 0.5).floor_()
    mean_grey = grey.double().mean((1, 2))[:, None, None, None].float()
    return mean_grey + factors * (levels - mean_grey)


def _adjust_brightness(levels: Tensor, factors: Tensor) -> Tensor:
    return factors * levels


def _posterize(levels: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (levels / step).floor() * step


def _adjust_sharpness(levels: Tensor, factors: Tensor) -> Tensor:
    kernel = levels.new_ones((3, 1, 3, 3))
    kernel[..., 1, 1] = 5
    smooth = levels.clone()
    inner = torch.nn.functional.conv2d(levels, kernel / 13, groups=3)
    smooth[..., 1:-1, 1:-1] = _round_levels(inner)
    return factors * levels + (1 - factors) * smooth


def _blur(levels: Tensor, radii_px: Tensor) -> Tensor:
    matrices = [_compute_blur(levels.shape[-1], radius_px) for radius_px in radii_px.flatten().tolist()]
    weights = torch.from_numpy(np.stack(matrices)).to(levels.device)[:, None]
    return weights @ levels @ weights.transpose(2, 3)


@lru_cache(maxsize=16)
def _compute_blur(side_px: int, radius_px: float) -> np.ndarray:
    """Return the weights `side_px side_px` of a blur along a side, which is mirrored at its ends."""
    # OpenCV rounds its kernel to 256ths. A line of 255 shows them: no weight of a radius from 1 is above a half.
    reach = round(6 * radius_px) // 2
    line = np.zeros((1, 2 * reach + 1), np.uint8)
    line[0, reach] = 255
    kernel = cv2.GaussianBlur(line, (0, 0), radius_px, borderType=cv2.BORDER_REPLICATE)[0].astype(np.float32)

    weights = np.zeros((side_px, side_px), np.float32)
    sources = np.pad(np.arange(side_px), reach, mode="reflect")
    for offset, share in enumerate(kernel / kernel.sum()):
        np.add.at(weights, (np.arange(side_px), sources[offset : offset + side_px]), share)
    return weights


_OPERATIONS: dict[StrongOperation, Callable[[Tensor, Tensor], Tensor]] = {
    augment.adjust_contrast: _adjust_contrast,
    augment.adjust_brightness: _adjust_brightness,
    augment.posterize: _posterize,
    augment.adjust_sharpness: _adjust_sharpness,
    augment.blur: _blur,
}
"""Each operation on one image with what does the same to levels `B 3 p p`, given strengths `B 1 1 1`."""
