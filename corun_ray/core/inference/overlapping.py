"""Any network on images too large for memory: tiles that overlap, cut where they are right and blended there.

Tiles begin and end on the network's grid, so that strides and windows lie as on the whole image. Of a network that
looks no further than the margins, the result is that of the whole image but for rounding. A network that looks at the
whole picture (global pooling, attention over all pixels) sees another picture in each tile. How far neighbours differ
is therefore measured where they are blended. CORUN has exact ways of its own (`core.inference.banded`, `tiled`).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corun_ray.core.inference.needs import Reach, find_grid_px
from corun_ray.core.networks.corun import Restoration, as_restoration
from corun_ray.core.networks.spec import PAD_MULTIPLE_PX

BLEND_PX = 64
"""Width of the blend between tiles, where tiles are large enough."""
LEVELS = 255
VISIBLE_DIFFERENCE = 0.5 / LEVELS
"""Half a level of 8 bits: less is rounded away."""


@dataclass(frozen=True)
class Tiling:
    """Tiles that do not give what the whole image would give, and by how much they disagree."""

    side_px: int
    looks: str
    """How far the network looks, such as `at the whole picture`."""
    max_difference: float
    """Greatest difference of two tiles where they are blended, scene in [0, 1]."""
    mean_difference: float

    def describe(self, network: str) -> str:
        """Tell in one line what the tiles cost; `network` is the network's name."""
        greatest, mean = (f"{LEVELS * value:.2g}" for value in (self.max_difference, self.mean_difference))
        return (
            f"tiles of {self.side_px} px: {network} looks {self.looks}, so the result depends on the tiles; where two "
            f"overlap they differ by up to {greatest} of {LEVELS} levels (mean {mean}), and are blended"
        )


def find_worse(first: Tiling | None, second: Tiling | None) -> Tiling | None:
    """Return the tiles that disagree more; None are no tiles, or exact ones."""
    if first is None or second is None:
        return first or second
    return max(first, second, key=lambda tiling: tiling.max_difference)


@dataclass(frozen=True)
class Span:
    """The rows or the columns of a tile."""

    start: int
    stop: int
    weights: Tensor
    """What each pixel counts in the result, from 0 to 1; the weights of all spans add up to 1."""
    blend: slice
    """Pixels that are blended with the span before, counted from the image's edge; empty in the first span."""

    @property
    def kept(self) -> slice:
        """Pixels of the span that count at all, counted from the image's edge."""
        counted = self.weights.nonzero()
        return slice(self.start + int(counted.min()), self.start + int(counted.max()) + 1)

    def shift(self, part: slice) -> slice:
        """Return where a part of the image lies within the span."""
        return slice(part.start - self.start, part.stop - self.start)


def split_side(
    length: int, side_px: int, margin_px: int, blend_px: int, grid_px: int, even_out: bool = True
) -> list[Span]:
    """Split a side of an image into spans that overlap.

    All spans are equally long, at most `side_px`, and begin and end on the grid; the last one ends with the image, as a
    network's own padding may depend on where that is. A pixel within `margin_px` of a span's end counts nothing there,
    but at the ends of the image. With `even_out`, spans are no longer than their number makes necessary.

    Raises `ValueError` where `side_px` leaves too little beside margins and blends.
    """
    step = (side_px - 2 * margin_px - blend_px) // grid_px * grid_px
    if step < max(blend_px, grid_px):
        raise ValueError(f"tiles of {side_px} px are too small for margins of {margin_px} px")

    # As few spans as possible. All is counted up to the grid's next line.
    image_end = length
    length = math.ceil(length / grid_px) * grid_px
    count = 1 + math.ceil(max(0, length - side_px) / step)
    size = min(length, side_px)
    if even_out:
        size = min(size, math.ceil((length + (count - 1) * (side_px - step)) / count / grid_px) * grid_px)
    starts = [number * (length - size) // max(1, count - 1) // grid_px * grid_px for number in range(count)]

    # Between two spans, the weight goes over from one to the other in the middle of their overlap.
    spans = []
    blends = [slice(0, 0)]
    for before, start in zip(starts, starts[1:], strict=False):
        first = (before + size + start - blend_px) // 2
        blends.append(slice(first, first + blend_px))
    for number, start in enumerate(starts):
        stop = min(start + size, image_end)
        positions = torch.arange(start, stop) + 0.5
        weights = torch.ones(stop - start)
        if number > 0:
            weights *= ((positions - blends[number].start) / blend_px).clamp(0, 1)
        if number + 1 < count:
            weights *= 1 - ((positions - blends[number + 1].start) / blend_px).clamp(0, 1)
        spans.append(Span(start, stop, weights, blends[number]))
    return spans


class OverlappingTiles(nn.Module):
    """A network that sees its input one tile at a time; for inference only."""

    def __init__(self, network: nn.Module, side_px: int, reach: Reach) -> None:
        """Wrap a network to work in tiles of at most `side_px` a side, margins included."""
        super().__init__()
        self.network, self.side_px, self.reach = network, side_px, reach
        self.tiling: Tiling | None = None
        """How the tiles of the last images disagree; None: they were one tile, or give what the whole image gives."""

        # `restore` pads to the sizes that these attributes tell. Square tiles need an image that holds one.
        self.grid_px = grid_px = find_grid_px(network)
        self.size_multiple_px = getattr(network, "size_multiple_px", PAD_MULTIPLE_PX)
        self.size_min_px = getattr(network, "size_min_px", 0)
        self.has_square_tiles = getattr(network, "size_square", False)
        if self.has_square_tiles:
            self.size_multiple_px, self.size_min_px = grid_px, side_px

        # Wider margins than a quarter of a tile would cost more than the tile, and those that mend little are not worth
        # as much. Each tile must get on by a step of the grid.
        self.blend_px = min(BLEND_PX, side_px // 8)
        widest_px = (side_px - self.blend_px - max(self.blend_px, grid_px)) // 2
        self.margin_px = min(reach.margin_px, side_px // (4 if reach.is_exact else 8), widest_px)

    @torch.no_grad()
    def forward(self, hazy: Tensor) -> Restoration:
        """Restore images, B 3 H W in [0, 1], one after another."""
        images = []
        self.tiling = None
        for image in hazy.split(1):
            images.append(self._restore(image))
        restored = torch.cat(images) if len(images) > 1 else images[0]

        # The transmission, where there is one, is the fourth channel.
        return Restoration(restored[:, :3], restored[:, 3:] if restored.shape[1] > 3 else None)

    def _restore(self, image: Tensor) -> Tensor:
        """Restore one image; return the channels of its scene, and of its transmission if there is one."""
        rows, columns = (
            split_side(
                length, self.side_px, self.margin_px, self.blend_px, self.grid_px, even_out=not self.has_square_tiles
            )
            for length in image.shape[-2:]
        )
        seams = _Seams(rows, columns)
        restored: Tensor | None = None
        for (row_number, row), (column_number, column) in itertools.product(enumerate(rows), enumerate(columns)):
            tile = self._run(image[..., row.start : row.stop, column.start : column.stop])
            seams.compare(row_number, column_number, tile)

            # Add what counts of the tile. The weights of all tiles add up to 1.
            if restored is None:
                restored = tile.new_zeros(1, tile.shape[1], *image.shape[-2:])
            inner = row.shift(row.kept), column.shift(column.kept)
            weights = (row.weights[:, None] * column.weights)[inner]
            restored[..., row.kept, column.kept] += tile[..., *inner] * weights.to(tile.device)
        assert restored is not None

        self._note(max(rows[0].stop, columns[0].stop), seams)
        return restored

    def _run(self, tile: Tensor) -> Tensor:
        """Run the network on one tile."""
        scene, transmission = as_restoration(self.network(tile))
        return scene.float() if transmission is None else torch.cat([scene.float(), transmission.float()], 1)

    def _note(self, side_px: int, seams: "_Seams") -> None:
        """Keep how the tiles of an image disagree; of several images, the most."""
        is_exact = self.reach.is_exact and seams.max_difference <= VISIBLE_DIFFERENCE
        if not seams.count or is_exact:
            return
        looks = f"further than {self.margin_px} px" if self.reach.is_exact else self.reach.describe()
        found = Tiling(side_px, looks, seams.max_difference, seams.sum / seams.count)
        self.tiling = find_worse(self.tiling, found)


class _Seams:
    """The differences of neighbouring tiles where they are blended, tile after tile, row by row."""

    def __init__(self, rows: list[Span], columns: list[Span]) -> None:
        self.max_difference = self.sum = 0.0
        self.count = 0
        self._rows, self._columns = rows, columns
        self._left: Tensor | None = None
        self._above: dict[int, Tensor] = {}

    def compare(self, row_number: int, column_number: int, tile: Tensor) -> None:
        """Compare a tile with its neighbours to the left and above; keep what those to the right and below need."""
        row, column = self._rows[row_number], self._columns[column_number]
        if self._left is not None:
            self._add(self._left, tile[..., row.shift(row.kept), column.shift(column.blend)])
        if row_number > 0:
            self._add(self._above[column_number], tile[..., row.shift(row.blend), column.shift(column.kept)])

        self._left = None
        if column_number + 1 < len(self._columns):
            blend = self._columns[column_number + 1].blend
            self._left = tile[..., row.shift(row.kept), column.shift(blend)].clone()
        if row_number + 1 < len(self._rows):
            blend = self._rows[row_number + 1].blend
            self._above[column_number] = tile[..., row.shift(blend), column.shift(column.kept)].clone()

    def _add(self, first: Tensor, second: Tensor) -> None:
        """Add the differences of two scenes, as they will be seen."""
        differences = (first[:, :3].clamp(0, 1) - second[:, :3].clamp(0, 1)).abs()
        self.max_difference = max(self.max_difference, float(differences.max()))
        self.sum += float(differences.sum())
        self.count += differences.numel()
