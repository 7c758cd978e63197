"""CORUN on images too large for memory, tile by tile, with the result that the whole image would give.

Convolutions see no further than `HALO_PX`, so a tile with such a margin has right pixels in its middle. Attention sees
further: its weights come from sums over all pixels of the image. But sums can be taken in parts. So before a CPMM's
result is computed, its attentions are visited in order: each tile is run up to the attention, its part of the sums is
added, and the weights that follow are fixed before the next attention is visited. The result is exact but for
rounding, without seams; the price is that a CPMM's early layers run once for each later attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import CPMM, SIZE_MULTIPLE_PX, SpectralAttention

HALO_PX = 96
"""How far a CPMM's convolutions see: 3 px a block and 1 px a resampling, at 1 to 8 times the size, down and up again,
rounded up to a multiple of 8, in which pixels are shuffled."""


@dataclass(frozen=True)
class Tile:
    """A part of an image, and the larger part that must be seen to compute it."""

    core: tuple[slice, slice]
    """Rows and columns that the tile computes."""
    outer: tuple[slice, slice]
    """Rows and columns that the tile sees: the core with its margins."""

    def inner(self, scale: int = 1) -> tuple[slice, slice]:
        """Return where the core lies within the outer part.

        At 1/scale of the resolution.
        """
        rows, columns = (
            slice((core.start - outer.start) // scale, (core.stop - outer.start) // scale)
            for core, outer in zip(self.core, self.outer, strict=True)
        )
        return rows, columns


def in_tiles(network: CORUN, side_px: int) -> CORUN:
    """Copy the network for inference in tiles.

    Tiles have at most `side_px` a side, margins included.
    """
    return network.replace_cpmms(lambda cpmm: TiledCPMM(cpmm, side_px))


def split_into_tiles(height: int, width: int, side_px: int) -> Iterator[Tile]:
    """Yield tiles with their margins, row by row.

    A tile has at most `side_px` a side. All sides are multiples of 8.

    Raises `ValueError` where `side_px` leaves no pixel beside the margins.
    """
    step = side_px - 2 * HALO_PX
    if step < SIZE_MULTIPLE_PX:
        raise ValueError(f"tiles of {side_px} px are too small: their margins alone are {2 * HALO_PX} px")
    for rows, outer_rows in _split_side(height, step):
        for columns, outer_columns in _split_side(width, step):
            yield Tile((rows, columns), (outer_rows, outer_columns))


def _split_side(length: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Yield spans of a side, without and with margins.

    A span has at most `step` pixels.
    """
    step -= step % SIZE_MULTIPLE_PX
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(max(0, start - HALO_PX), min(length, stop + HALO_PX))


class TiledCPMM(nn.Module):
    """A CPMM that sees its input one tile at a time; for inference only."""

    def __init__(self, cpmm: CPMM, side_px: int) -> None:
        super().__init__()
        self.cpmm, self.side_px = cpmm, side_px

    @torch.no_grad()
    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """Refine `estimate` with the help of `partner`, as `CPMM.forward` does."""
        height, width = estimate.shape[-2:]
        tiles = list(split_into_tiles(height, width, self.side_px))
        attentions = self.cpmm.list_attentions()
        try:
            # Fix the weights of each attention in order: the next one's sums depend on them.
            for attention in attentions:
                products = [self._sum_products(attention, tile, estimate, partner) for tile in tiles]
                # In float64, so that many parts add up.
                attention.fixed_mixing = attention.compute_mixing(torch.stack(products).sum(0, dtype=torch.float64))

            # With all weights fixed, the core of each tile is that of the whole image.
            refined = torch.empty_like(estimate)
            for tile in tiles:
                refined[..., *tile.core] = self._run(tile, estimate, partner)[..., *tile.inner()]
            return refined
        finally:
            for attention in attentions:
                attention.fixed_mixing = None

    def _sum_products(self, attention: SpectralAttention, tile: Tile, estimate: Tensor, partner: Tensor) -> Tensor:
        """Return the tile's part of one attention's sums.

        All attentions before it must have their weights.
        """

        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            """Leave the CPMM with the features that enter the attention."""
            raise _Reached(inputs[0])

        # Run the CPMM only up to the attention.
        hook = attention.register_forward_pre_hook(stop)
        try:
            self._run(tile, estimate, partner)
            raise AssertionError("a CPMM that does not run its attention")
        except _Reached as reached:
            features: Tensor = reached.features
        finally:
            hook.remove()

        # Sum over the core only: the margins belong to other tiles.
        scale = (tile.outer[0].stop - tile.outer[0].start) // features.shape[-2]
        return attention.compute_products(features[..., *tile.inner(scale)])

    def _run(self, tile: Tile, estimate: Tensor, partner: Tensor) -> Tensor:
        """Run the CPMM on one tile with its margins."""
        return self.cpmm(estimate[..., *tile.outer], partner[..., *tile.outer])


class _Reached(Exception):
    """The features that were about to enter the attention."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
