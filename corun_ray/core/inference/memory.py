"""Restoring an image within a given amount of memory: whole where that fits, else in bands, else in tiles.

On a CPU, bands come first: they need less memory and less time.
"""

from torch import Tensor, nn

from corun_ray.core.inference.banded import MIN_ROWS, in_bands
from corun_ray.core.inference.tiled import HALO_PX, in_tiles
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import SIZE_MULTIPLE_PX
from corun_ray.core.networks.spec import compute_padded_size

MIB = 2**20
BYTES_PER_PX_AND_CHANNEL = 100
"""Of a CPMM at work, per pixel and channel of `width` (measured: 45 to 95), the feed-forward above all."""
FEATURE_BYTES_PER_PX_AND_CHANNEL = 12
"""Of what a CPMM that works in bands keeps of the whole image (measured: 7 to 11)."""
CPU_BAND_PX, GPU_BAND_PX = 2**15, 2**21
"""Pixels of a band: few enough for a processor's cache, many enough for a GPU (the latter untried)."""
STATE_BYTES_PER_PX = 75
"""Of the image and what the stages pass on (measured: 69)."""
SMALLEST_CORE_PX = 64


class TooLarge(ValueError):
    """An image that cannot be restored within the memory; the message says what it would take."""


def fit_in_memory(network: nn.Module, hazy: Tensor, memory_mib: int) -> nn.Module:
    """The network to restore `hazy` B 3 H W with, in about `memory_mib` beyond the network's and the image's own.

    Only CORUN's need is known: another network takes any image whole. A CORUN that computes in bands or in tiles
    gives what it would give of the whole image but for rounding; see `core.banded` and `core.tiled`, which needs least
    memory and several times as long. Raises `TooLarge`.
    """
    if not isinstance(network, CORUN):
        return network
    height, width = hazy.shape[-2:]
    on_cpu = hazy.device.type == "cpu"
    band_px = CPU_BAND_PX if on_cpu else GPU_BAND_PX
    # A band stays in a processor's cache: there, bands are also faster than the whole.
    bands_are_faster = on_cpu and height * width > 2 * band_px
    if estimate_whole_mib(network, height, width) <= memory_mib and not bands_are_faster:
        return network
    if estimate_banded_mib(network, height, width, band_px) <= memory_mib:
        return in_bands(network, band_px)
    return in_tiles(network, choose_tile_side_px(network, height, width, memory_mib))


def estimate_whole_mib(network: CORUN, height: int, width: int) -> int:
    """What an image needs as a whole."""
    return -(-_whole_bytes(network, height, width) // MIB)


def estimate_banded_mib(network: CORUN, height: int, width: int, band_px: int) -> int:
    """What an image needs in bands of `band_px` pixels."""
    rows, columns = compute_padded_size(network, height, width)
    per_px = STATE_BYTES_PER_PX + FEATURE_BYTES_PER_PX_AND_CHANNEL * network.width
    band_bytes = max(band_px, MIN_ROWS * columns) * BYTES_PER_PX_AND_CHANNEL * network.width
    return -(-(rows * columns * per_px + band_bytes) // MIB)


def compute_batch_size(network: nn.Module, height: int, width: int, memory_mib: int) -> int | None:
    """How many images of this size a CORUN restores side by side in `memory_mib`, at least 1; None: not known."""
    if not isinstance(network, CORUN):
        return None
    return max(1, memory_mib * MIB // _whole_bytes(network, height, width))


def choose_tile_side_px(network: CORUN, height: int, width: int, memory_mib: int) -> int:
    """The side of the largest tiles, margins included, that fit; raises `TooLarge` where the smallest do not."""
    rows, columns = compute_padded_size(network, height, width)
    work_bytes = memory_mib * MIB - rows * columns * STATE_BYTES_PER_PX
    pixels = work_bytes // (BYTES_PER_PX_AND_CHANNEL * network.width)
    side = int(max(0, pixels) ** 0.5) // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX
    least = 2 * HALO_PX + SMALLEST_CORE_PX
    if side < least:
        need = rows * columns * STATE_BYTES_PER_PX + least**2 * BYTES_PER_PX_AND_CHANNEL * network.width
        raise TooLarge(f"{width} x {height} px need {-(-need // MIB)} MiB, even in tiles; {memory_mib} are allowed")
    return side


def _whole_bytes(network: CORUN, height: int, width: int) -> int:
    rows, columns = compute_padded_size(network, height, width)
    return rows * columns * (STATE_BYTES_PER_PX + BYTES_PER_PX_AND_CHANNEL * network.width)
