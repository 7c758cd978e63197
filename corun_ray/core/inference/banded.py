"""CORUN on large images, row band by row band: nothing wider than the features is ever kept of a whole image.

Within a block the feed-forward network makes four channels of each, several times over; kept for a whole image, they
are most of what a restoration needs. Only the attention's sums need all pixels, and these are taken band by band too.
So a block is computed in bands with a margin of the few pixels that its convolutions see. The result is that of the
whole image but for rounding, at hardly more work; tiles (`core.tiled`), which keep no features, need less memory still
and compute everything several times.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import CPMM, Block, SpectralAttention

MIN_ROWS = 8
"""Of a band: more than the margins of its neighbours reach into it."""
HALO_PX = 3
"""How far the convolutions of a block see: two of the attention's, one of the feed-forward network's."""


def in_bands(network: CORUN, band_px: int) -> CORUN:
    """A copy of the network whose CPMMs work on bands of about `band_px` of their pixels; for inference only."""
    return network.replace_cpmms(lambda cpmm: BandedCPMM(cpmm, band_px))


class BandedCPMM(nn.Module):
    """A CPMM whose wide temporaries are those of a band; its features, `width` channels, are the whole image's."""

    def __init__(self, cpmm: CPMM, band_px: int) -> None:
        super().__init__()
        self.cpmm, self.band_px = cpmm, band_px

    @torch.no_grad()
    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """As the CPMM's own."""
        cpmm = self.cpmm
        features = self._mapped(cpmm.embedding, estimate, partner)
        skips = []
        for block, down in cast(Iterable[tuple[Block, nn.Module]], cpmm.encoder_layers):
            self._refine(block, features)
            skips.append(features)
            features = down(features)
        self._refine(cpmm.bottleneck, features)
        for up, fuse, block in cast(Iterable[tuple[nn.Module, nn.Module, Block]], cpmm.decoder_layers):
            features = self._fused(up, fuse, features, skips.pop())
            self._refine(block, features)
        return estimate + self._mapped(cpmm.mapping, features)

    def _refine(self, block: Block, features: Tensor) -> None:
        """The block, in place."""
        (attention,) = (module for module in block.modules() if isinstance(module, SpectralAttention))
        # In float64, so that many bands add up.
        sums = sum(attention.compute_products(features[..., band, :]).double() for band, _ in self._bands(features, 0))
        before: Tensor | None = None
        try:
            attention.fixed_mixing = attention.compute_mixing(cast(Tensor, sums))
            for band, outer in self._bands(features, HALO_PX):
                seen = features[..., outer, :].clone(memory_format=torch.channels_last)
                if before is not None:  # the margin above is as it was before its own band was written
                    seen[..., : before.shape[-2], :] = before
                inner = _within(band, outer)
                before = seen[..., inner.stop - HALO_PX : inner.stop, :].clone()
                features[..., band, :] = block(seen)[..., inner, :]
        finally:
            attention.fixed_mixing = None

    def _fused(self, up: nn.Module, fuse: nn.Module, features: Tensor, skip: Tensor) -> Tensor:
        """`fuse(up(features), skip)`, in the memory of `skip`."""
        for band, outer in self._bands(features, 1):
            inner, rows = _within(band, outer), slice(2 * band.start, 2 * band.stop)
            raised = up(features[..., outer, :])[..., 2 * inner.start : 2 * inner.stop, :]
            skip[..., rows, :] = fuse(torch.cat([raised, skip[..., rows, :]], 1))
        return skip

    def _mapped(self, convolution: nn.Module, *parts: Tensor) -> Tensor:
        """A 3x3 convolution of `parts`, side by side as channels."""
        made = []
        for band, outer in self._bands(parts[0], 1):
            seen = torch.cat([part[..., outer, :] for part in parts], 1)
            seen = seen.contiguous(memory_format=torch.channels_last)
            made.append(convolution(seen)[..., _within(band, outer), :])
        output = made[0].new_empty(*made[0].shape[:2], *parts[0].shape[-2:])
        output = output.contiguous(memory_format=torch.channels_last)
        return torch.cat(made, -2, out=output)

    def _bands(self, features: Tensor, halo_px: int) -> Iterator[tuple[slice, slice]]:
        """Rows of each band, and the rows that must be seen to compute them."""
        height, width = features.shape[-2:]
        rows = max(MIN_ROWS, self.band_px // width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            yield slice(start, stop), slice(max(0, start - halo_px), min(height, stop + halo_px))


def _within(band: slice, outer: slice) -> slice:
    return slice(band.start - outer.start, band.stop - outer.start)
