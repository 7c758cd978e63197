"""Restoring an image within a given amount of memory: whole where that fits, else in parts.

CORUN works in bands, else in tiles; on a CPU, bands come first: they need less memory and less time. Any other network
works in tiles that overlap.
"""

import math

from torch import Tensor, nn

from corun_ray.core.inference.banded import MIN_ROWS, in_bands
from corun_ray.core.inference.needs import find_grid_px, list_tried_sides, measure_memory, measure_reach
from corun_ray.core.inference.overlapping import OverlappingTiles
from corun_ray.core.inference.tiled import HALO_PX, in_tiles
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import SIZE_MULTIPLE_PX
from corun_ray.core.networks.spec import compute_padded_size

MIB = 2**20
BYTES_PER_PX_AND_CHANNEL = 100
"""Memory of a CPMM at work, mostly its feed-forward network, per pixel and channel of `width` (measured: 45 to 95)."""
FEATURE_BYTES_PER_PX_AND_CHANNEL = 12
"""Memory that a CPMM working in bands keeps of the whole image (measured: 7 to 11)."""
STATE_BYTES_PER_PX = 75
"""Memory of the image and of the state that stages pass on (measured: 69)."""
CPU_BAND_PX = 2**15
"""Pixels of a band on a CPU: few enough for the processor's cache."""
GPU_BAND_PX = 2**21
"""Pixels of a band on a GPU: enough to keep it busy (not measured)."""
SMALLEST_CORE_PX = 64
SMALL_IMAGE_PX = 2**16
"""Pixels of the images that any other network than CORUN takes whole, without a look at what it needs."""
IMAGE_BYTES_PER_PX = 48
"""Memory of an image beside a network at work: padded, the result, and the clamped result (12 to 16 each)."""


class TooLarge(ValueError):
    """An image that cannot be restored within the memory; the message tells the memory it needs."""


def fit_in_memory(network: nn.Module, hazy: Tensor, memory_mib: int) -> nn.Module:
    """Choose whole, bands or tiles to fit `memory_mib`.

    Returns the network, or a copy that works in bands or in tiles, to restore `hazy` with. `hazy` is B 3 H W. The
    memory comes on top of the network's and the image's own. CORUN's result in bands or tiles equals the whole image's
    but for rounding. Tiles need the least memory and several times as long; see `core.inference.banded` and
    `core.inference.tiled`. What other networks need is measured on a small image first; whether their tiles give the
    whole image's result depends on the network (`core.inference.overlapping`).

    Raises `TooLarge` where even tiles do not fit.
    """
    if not isinstance(network, CORUN):
        return _fit_any_network(network, hazy, memory_mib)

    height, width = hazy.shape[-2:]
    on_cpu = hazy.device.type == "cpu"
    band_px = CPU_BAND_PX if on_cpu else GPU_BAND_PX

    # A band stays in a processor's cache: on a CPU, bands of a large image are also faster than the whole.
    bands_are_faster = on_cpu and height * width > 2 * band_px
    if estimate_whole_mib(network, height, width) <= memory_mib and not bands_are_faster:
        return network

    if estimate_banded_mib(network, height, width, band_px) <= memory_mib:
        return in_bands(network, band_px)
    return in_tiles(network, choose_tile_side_px(network, height, width, memory_mib))


def estimate_whole_mib(network: CORUN, height: int, width: int) -> int:
    """Estimate the memory to restore an image as a whole."""
    return _round_up_to_mib(_estimate_whole_bytes(network, height, width))


def estimate_banded_mib(network: CORUN, height: int, width: int, band_px: int) -> int:
    """Estimate the memory to restore an image in bands.

    A band has `band_px` pixels.
    """
    rows, columns = compute_padded_size(network, height, width)
    kept_per_px = STATE_BYTES_PER_PX + FEATURE_BYTES_PER_PX_AND_CHANNEL * network.width
    band_bytes = max(band_px, MIN_ROWS * columns) * BYTES_PER_PX_AND_CHANNEL * network.width
    return _round_up_to_mib(rows * columns * kept_per_px + band_bytes)


def compute_batch_size(network: nn.Module, height: int, width: int, memory_mib: int) -> int | None:
    """Return how many images fit into `memory_mib` at once.

    All have the same size. At least 1. None: the images are small, and the need of this network is not measured for
    them.
    """
    if not isinstance(network, CORUN):
        rows, columns = compute_padded_size(network, height, width)
        if rows * columns <= SMALL_IMAGE_PX:
            return None
        image_bytes = measure_memory(network).estimate_bytes(rows * columns) + rows * columns * IMAGE_BYTES_PER_PX
        return max(1, int(memory_mib * MIB / image_bytes))
    return max(1, memory_mib * MIB // _estimate_whole_bytes(network, height, width))


def _fit_any_network(network: nn.Module, hazy: Tensor, memory_mib: int) -> nn.Module:
    """Choose whole or overlapping tiles for a network of any kind.

    Raises `TooLarge` where even the smallest tiles do not fit.
    """
    rows, columns = compute_padded_size(network, *hazy.shape[-2:])
    if rows * columns <= SMALL_IMAGE_PX:
        return network

    # Beside the network at work, the images and their results exist as a whole.
    need = measure_memory(network)
    images = hazy.shape[0]
    left_bytes = memory_mib * MIB - images * rows * columns * IMAGE_BYTES_PER_PX
    if images * need.estimate_bytes(rows * columns) <= left_bytes:
        return network

    # Tiles are those of one image at a time.
    grid_px, smallest_px = find_grid_px(network), list_tried_sides(network)[0]
    side_px = int(need.find_pixels(left_bytes) ** 0.5) // grid_px * grid_px
    if side_px < smallest_px:
        need_mib = memory_mib + _round_up_to_mib(math.ceil(need.estimate_bytes(smallest_px**2) - left_bytes))
        height, width = hazy.shape[-2:]
        raise TooLarge(f"{width} x {height} px need {need_mib} MiB, even in tiles; {memory_mib} are allowed")
    return OverlappingTiles(network, side_px, measure_reach(network, side_px))


def choose_tile_side_px(network: CORUN, height: int, width: int, memory_mib: int) -> int:
    """Return the side of the largest tiles that fit.

    Margins are included.

    Raises `TooLarge` where even the smallest tiles do not fit.
    """
    rows, columns = compute_padded_size(network, height, width)
    state_bytes = rows * columns * STATE_BYTES_PER_PX
    bytes_per_px = BYTES_PER_PX_AND_CHANNEL * network.width

    # The state of the whole image is needed in any case; the rest of the memory is for one tile at work.
    tile_px = max(0, memory_mib * MIB - state_bytes) // bytes_per_px
    side = int(tile_px**0.5) // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX

    smallest_side = 2 * HALO_PX + SMALLEST_CORE_PX
    if side < smallest_side:
        need_mib = _round_up_to_mib(state_bytes + smallest_side**2 * bytes_per_px)
        raise TooLarge(f"{width} x {height} px need {need_mib} MiB, even in tiles; {memory_mib} are allowed")
    return side


def _estimate_whole_bytes(network: CORUN, height: int, width: int) -> int:
    """Estimate the bytes to restore an image as a whole."""
    rows, columns = compute_padded_size(network, height, width)
    return rows * columns * (STATE_BYTES_PER_PX + BYTES_PER_PX_AND_CHANNEL * network.width)


def _round_up_to_mib(size_bytes: int) -> int:
    """Round a size in bytes up to whole MiB."""
    return -(-size_bytes // MIB)
