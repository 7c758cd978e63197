"""CORUN on large images, row band by row band: nothing wider than the features is ever kept of a whole image.

Within a block the feed-forward network makes four channels of each, several times over; kept for a whole image, they
are most of what a restoration needs. Only the attention's sums need all pixels, and these are taken band by band too.
So a block is computed in bands with a margin of the few pixels that its convolutions see. The result is that of the
whole image but for rounding, at hardly more work; tiles (`core.tiled`), which keep no features, need less memory still
and compute everything several times.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from corun_ray.core.corun import CORUN
from corun_ray.core.cpmm import CPMM, Block, SpectralAttention

HALO_PX = 3
"""How far the convolutions of a block see: two of the attention's, one of the feed-forward network's."""


def banded(network: CORUN, pixels: int) -> CORUN:
    """A copy of the network whose CPMMs work on bands of about so many of their pixels; for inference only."""
    network = copy.deepcopy(network).eval()
    network.checkpoint_activations = False
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CPMM):
                setattr(parent, name, BandedCPMM(child, pixels))
    return network


class BandedCPMM(nn.Module):
    """A CPMM whose wide temporaries are those of a band; its features, `width` channels, are the whole image's."""

    def __init__(self, cpmm: CPMM, pixels: int) -> None:
        super().__init__()
        self.cpmm, self.pixels = cpmm, pixels

    @torch.no_grad()
    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """As the CPMM's own."""
        cpmm = self.cpmm
        features = self._mapped(cpmm.embedding, 1, estimate, partner)
        skips = []
        for block, down in cast(Iterable[tuple[Block, nn.Module]], cpmm.encoder_layers):
            features = self._block(block, features)
            skips.append(features)
            features = down(features)
        features = self._block(cpmm.bottleneck, features)
        for up, fuse, block in cast(Iterable[tuple[nn.Module, nn.Module, Block]], cpmm.decoder_layers):
            features = self._mapped(fuse, 0, up(features), skips.pop())
            features = self._block(block, features)
        return estimate + self._mapped(cpmm.mapping, 1, features)

    def _block(self, block: Block, features: Tensor) -> Tensor:
        (attention,) = (module for module in block.modules() if isinstance(module, SpectralAttention))
        # In float64, so that many bands add up.
        sums = sum(attention.products(features[..., band, :]).double() for band, _ in self._bands(features, 0))
        try:
            attention.given_mixing = attention.mixing_of(cast(Tensor, sums))
            return self._mapped(block, HALO_PX, features)
        finally:
            attention.given_mixing = None

    def _mapped(self, layer: Callable[[Tensor], Tensor], halo_px: int, *parts: Tensor) -> Tensor:
        """The layer's output for `parts`, side by side as channels; their sizes are the same."""
        output: Tensor | None = None
        for band, outer in self._bands(parts[0], halo_px):
            seen = torch.cat([part[..., outer, :] for part in parts], 1).contiguous(memory_format=torch.channels_last)
            made = layer(seen)[..., band.start - outer.start : band.stop - outer.start, :]
            if output is None:
                shape = (len(made), made.shape[1], *parts[0].shape[-2:])
                output = made.new_empty(shape).contiguous(memory_format=torch.channels_last)
            output[..., band, :] = made
        assert output is not None
        return output

    def _bands(self, features: Tensor, halo_px: int) -> Iterator[tuple[slice, slice]]:
        """Rows of each band, and the rows that must be seen to compute them."""
        height, width = features.shape[-2:]
        rows = max(8, self.pixels // width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            yield slice(start, stop), slice(max(0, start - halo_px), min(height, stop + halo_px))
