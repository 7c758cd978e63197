"""CORUN on images too large for memory, tile by tile, with the result that the whole image would give.

Convolutions see no further than `HALO_PX`, so a tile with that margin around it has right pixels in its middle. The
attention is another matter: its weights come from sums over all pixels of the image. But sums can be taken in parts.
So before a CPMM's result is computed, its attentions are visited in order: each tile is run up to the attention, its
part of the sums is added, and the weights that follow are fixed before the next one is visited. That is exact but for
rounding, so there is no seam to hide; the price is that a CPMM's early layers run once for each later attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import CPMM, SIZE_MULTIPLE_PX, SpectralAttention

HALO_PX = 96
"""How far a CPMM's convolutions see: 3 px a block and 1 a resampling, at 1 to 8 times the size, there and back, and up
to the next multiple of 8, in which pixels are shuffled."""


@dataclass(frozen=True)
class Tile:
    """A part of an image, and the larger part that must be seen to compute it."""

    core: tuple[slice, slice]
    outer: tuple[slice, slice]

    def inner(self, scale: int = 1) -> tuple[slice, slice]:
        """Where the core lies within the outer part, at 1/scale of the resolution."""
        rows, columns = (
            slice((core.start - outer.start) // scale, (core.stop - outer.start) // scale)
            for core, outer in zip(self.core, self.outer, strict=True)
        )
        return rows, columns


def split_into_tiles(height: int, width: int, side_px: int) -> Iterator[Tile]:
    """Tiles of at most `side_px` with their margins, row by row; all sides are multiples of 8."""
    step = side_px - 2 * HALO_PX
    if step < SIZE_MULTIPLE_PX:
        raise ValueError(f"tiles of {side_px} px are too small: their margins alone are {2 * HALO_PX} px")
    for rows, outer_rows in _spans(height, step):
        for columns, outer_columns in _spans(width, step):
            yield Tile((rows, columns), (outer_rows, outer_columns))


def _spans(length: int, step: int) -> Iterator[tuple[slice, slice]]:
    step -= step % SIZE_MULTIPLE_PX
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(max(0, start - HALO_PX), min(length, stop + HALO_PX))


def in_tiles(network: CORUN, side_px: int) -> CORUN:
    """A copy of the network that computes in tiles of at most `side_px`, margins of `HALO_PX` included."""
    return network.replace_cpmms(lambda cpmm: TiledCPMM(cpmm, side_px))


class TiledCPMM(nn.Module):
    """A CPMM that sees its input one tile at a time; for inference only."""

    def __init__(self, cpmm: CPMM, side_px: int) -> None:
        super().__init__()
        self.cpmm, self.side_px = cpmm, side_px

    @torch.no_grad()
    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """As the CPMM's own."""
        height, width = estimate.shape[-2:]
        parts = list(split_into_tiles(height, width, self.side_px))
        attentions = self.cpmm.list_attentions()
        try:
            for attention in attentions:
                products = [self._products(attention, tile, estimate, partner) for tile in parts]
                # In float64, so that many parts add up.
                attention.fixed_mixing = attention.compute_mixing(torch.stack(products).sum(0, dtype=torch.float64))
            refined = torch.empty_like(estimate)
            for tile in parts:
                refined[..., *tile.core] = self._run(tile, estimate, partner)[..., *tile.inner()]
            return refined
        finally:
            for attention in attentions:
                attention.fixed_mixing = None

    def _products(self, attention: SpectralAttention, tile: Tile, estimate: Tensor, partner: Tensor) -> Tensor:
        """The tile's part of the image's sums at one attention: those before it have their weights already."""

        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _Reached(inputs[0])

        hook = attention.register_forward_pre_hook(stop)
        try:
            self._run(tile, estimate, partner)
            raise AssertionError("a CPMM that does not run its attention")
        except _Reached as reached:
            features: Tensor = reached.features
        finally:
            hook.remove()
        scale = (tile.outer[0].stop - tile.outer[0].start) // features.shape[-2]
        return attention.compute_products(features[..., *tile.inner(scale)])

    def _run(self, tile: Tile, estimate: Tensor, partner: Tensor) -> Tensor:
        return self.cpmm(estimate[..., *tile.outer], partner[..., *tile.outer])


class _Reached(Exception):
    """The features that were about to enter the attention."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
