"""The JPEG round trip of many images at once, on any device of torch.

Computes what libjpeg does to pixels, without coding them: colours to luma and two chroma planes, chroma at half the
resolution, cosine transform of blocks of 8 px, quantisation, and all of it back. Baseline JPEG is ITU-T T.81; the
rounding of colours and chroma is libjpeg's. Only the transform is rounded in another way, so that few pixels differ
from `augment.apply_jpeg`, and those by few levels.
"""

import torch
from torch import Tensor

BLOCK_PX, GRID_PX = 8, 16
"""Sides of a block, and of the square that the blocks of all three planes cover together."""

# Quantisation of luma and chroma at quality 50, rows by vertical frequency: T.81, tables K.1 and K.2.
_LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
# Red, green and blue to luma and the two chroma planes, the latter around 0.
_TO_PLANES = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


def apply_jpeg(images: Tensor, sides_px: Tensor, tops_px: Tensor, lefts_px: Tensor, qualities: Tensor) -> Tensor:
    """Encode and decode square images as JPEG.

    `images` are `N 3 S S`, levels 0…255 as float. Of image `n`, the first `sides_px[n]` rows and columns count; what
    lies beyond them is undefined, in the result too. They began at `tops_px` and `lefts_px` of a larger image, whose
    block grid they keep. All other arguments are int64, `N`; `qualities` are 1…100.
    """
    tops_px, lefts_px = tops_px % GRID_PX, lefts_px % GRID_PX
    heights_px, widths_px = sides_px + tops_px, sides_px + lefts_px
    grid_px = -(-int(torch.maximum(heights_px, widths_px).max()) // GRID_PX) * GRID_PX

    # Repeat the outermost pixels: at the top and left to the block grid, at the bottom and right to whole blocks.
    places = torch.arange(grid_px, device=images.device)
    rows = _clamp(places - tops_px[:, None], sides_px - 1)
    columns = _clamp(places - lefts_px[:, None], sides_px - 1)
    planes = _split_colours(_pick(images, rows, columns))

    # Planes through their blocks: luma whole, chroma at half the resolution.
    luma_steps, chroma_steps = compute_quantisation(qualities)
    luma = _quantise_blocks(planes[:, :1], luma_steps)
    half_heights, half_widths = (heights_px + 1) // 2, (widths_px + 1) // 2
    chroma = _quantise_blocks(_halve(planes[:, 1:], half_heights), chroma_steps)
    decoded = _join_colours(luma, _double(chroma, half_heights, half_widths))

    # Back to where the images began.
    places = torch.arange(images.shape[-1], device=images.device)
    last = torch.full_like(sides_px, grid_px - 1)
    return _pick(decoded, _clamp(places + tops_px[:, None], last), _clamp(places + lefts_px[:, None], last))


def compute_quantisation(qualities: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the steps by which luma and chroma are quantised, both `N 8 8`, 1…255."""
    scale = torch.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)[:, None]
    tables = []
    for base in (_LUMA, _CHROMA):
        steps = (torch.tensor(base, device=qualities.device) * scale + 50) // 100
        tables.append(steps.clamp(1, 255).unflatten(1, (BLOCK_PX, BLOCK_PX)).float())
    return tables[0], tables[1]


def _clamp(places: Tensor, last: Tensor) -> Tensor:
    """Keep places, `N P` or `P`, within 0 and the last one of each image, `N`."""
    return torch.minimum(places.clamp(min=0), last[:, None])


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take rows and columns, `N P` and `N Q`, of each image `N C H W`."""
    channels, width = images.shape[1], images.shape[-1]
    images = images.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    return images.gather(3, columns[:, None, None, :].expand(-1, channels, rows.shape[1], -1))


def _split_colours(rgb: Tensor) -> Tensor:
    """Convert RGB levels to luma and both chroma planes, all 0…255."""
    planes = torch.einsum("pc,nchw->nphw", rgb.new_tensor(_TO_PLANES), rgb)
    planes[:, 1:] += 128
    # libjpeg rounds halves of luma up, and those of chroma down.
    planes[:, :1] = (planes[:, :1] + 0.5).floor_()
    planes[:, 1:] = (planes[:, 1:] - 0.5).ceil_()
    return planes.clamp_(0, 255)


def _join_colours(luma: Tensor, chroma: Tensor) -> Tensor:
    """Convert luma and chroma planes back to RGB levels."""
    blue, red = chroma[:, :1] - 128, chroma[:, 1:] - 128
    green = -0.114 * 1.772 / 0.587 * blue - 0.299 * 1.402 / 0.587 * red
    offsets = torch.cat((1.402 * red, green, 1.772 * blue), 1)
    return (luma + (offsets + 0.5).floor_()).clamp_(0, 255)


def _halve(planes: Tensor, half_heights: Tensor) -> Tensor:
    """Halve the resolution: means of four pixels.

    Sums of four are rounded in turn by 1/4 and 2/4, along a row. Rows below an image repeat its last halved one.
    """
    sums = planes.unflatten(3, (-1, 2)).sum(4).unflatten(2, (-1, 2)).sum(3)
    columns = torch.arange(sums.shape[-1], device=planes.device)
    halved = ((sums + 1 + columns % 2) / 4).floor_()
    rows = _clamp(columns, half_heights - 1)
    return _pick(halved, rows, columns.expand(len(planes), -1))


def _double(planes: Tensor, half_heights: Tensor, half_widths: Tensor) -> Tensor:
    """Double the resolution: each pixel takes three parts of its nearest and one of the next one, both ways.

    The nearest pixels at an image's end have no next one and count four times.
    """
    places = torch.arange(2 * planes.shape[-1], device=planes.device)
    nearest, following = places // 2, places // 2 + 2 * (places % 2) - 1
    everything = torch.arange(planes.shape[-1], device=planes.device).expand(len(planes), -1)

    # Rows, then columns.
    tall = 3 * _pick(planes, _clamp(nearest, half_heights - 1), everything)
    tall += _pick(planes, _clamp(following, half_heights - 1), everything)
    rows = places.expand(len(planes), -1)
    doubled = 3 * _pick(tall, rows, _clamp(nearest, half_widths - 1))
    doubled += _pick(tall, rows, _clamp(following, half_widths - 1))

    # Sixteenths are rounded in turn by 8/16 and 7/16, along a row.
    return ((doubled + 8 - places % 2) / 16).floor_()


def _quantise_blocks(planes: Tensor, steps: Tensor) -> Tensor:
    """Transform blocks of planes `N C H W`, round them to multiples of `steps`, `N 8 8`, and transform back."""
    # Rows of the transform are cosines of rising frequency, each of length 1.
    place = torch.arange(BLOCK_PX, device=planes.device, dtype=torch.float64)
    cosines = torch.cos((2 * place + 1) * place[:, None] * torch.pi / (2 * BLOCK_PX)) / 2
    cosines[0] /= 2**0.5
    transform = cosines.float()

    # N C rows-of-blocks row column-of-blocks column → blocks of 8 x 8 in the last two places.
    blocks = (planes - 128).unflatten(3, (-1, BLOCK_PX)).unflatten(2, (-1, BLOCK_PX)).transpose(3, 4)
    steps = steps[:, None, None, None]
    coefficients = (transform @ blocks @ transform.T / steps).round_() * steps
    pixels = (transform.T @ coefficients @ transform + 128).round_().clamp_(0, 255)
    return pixels.transpose(3, 4).flatten(4, 5).flatten(2, 3)
