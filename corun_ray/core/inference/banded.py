"""CORUN on large images, row band by row band: only the features are ever kept of a whole image.

Within a block the feed-forward network makes four channels of each feature, several times over; for a whole image,
these temporaries are most of the memory of a restoration. Only the attention's sums need all pixels, and sums can be
taken band by band. So each block is computed in bands, with a margin of the few pixels that its convolutions see. The
result equals the whole image's but for rounding, at hardly more work. Tiles (`core.inference.tiled`) keep no features:
they need less memory still, but compute everything several times.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import CPMM, Block, SpectralAttention

MIN_ROWS = 8
"""Least rows of a band: more than the margins of its neighbours reach into it."""
HALO_PX = 3
"""How far the convolutions of a block see: two of the attention's, one of the feed-forward network's."""


def in_bands(network: CORUN, band_px: int) -> CORUN:
    """Copy the network for inference in bands.

    A band has about `band_px` pixels of a CPMM's features.
    """
    return network.replace_cpmms(lambda cpmm: BandedCPMM(cpmm, band_px))


class BandedCPMM(nn.Module):
    """A CPMM whose wide temporaries are those of a band; its features, `width` channels, are the whole image's."""

    def __init__(self, cpmm: CPMM, band_px: int) -> None:
        super().__init__()
        self.cpmm, self.band_px = cpmm, band_px

    @torch.no_grad()
    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """Refine `estimate` with the help of `partner`, as `CPMM.forward` does."""
        cpmm = self.cpmm
        features = self._convolve(cpmm.embedding, estimate, partner)

        # Down the U: refine at each level, keep the features for the way up.
        skips = []
        for block, down in cast(Iterable[tuple[Block, nn.Module]], cpmm.encoder_layers):
            self._refine(block, features)
            skips.append(features)
            features = down(features)

        self._refine(cpmm.bottleneck, features)

        # Up again: fuse with the kept features, then refine.
        for up, fuse, block in cast(Iterable[tuple[nn.Module, nn.Module, Block]], cpmm.decoder_layers):
            features = self._fuse(up, fuse, features, skips.pop())
            self._refine(block, features)

        return estimate + self._convolve(cpmm.mapping, features)

    def _refine(self, block: Block, features: Tensor) -> None:
        """Apply a block to `features` in place."""
        (attention,) = (module for module in block.modules() if isinstance(module, SpectralAttention))

        # First pass: the attention's sums over all pixels, in float64 so that many bands add up.
        sums = sum(attention.compute_products(features[..., band, :]).double() for band, _ in self._bands(features, 0))

        # Second pass: each band with its margin, under the attention weights of the whole image.
        before: Tensor | None = None
        try:
            attention.fixed_mixing = attention.compute_mixing(cast(Tensor, sums))
            for band, outer in self._bands(features, HALO_PX):
                seen = features[..., outer, :].clone(memory_format=torch.channels_last)
                # The band above has been overwritten: restore the margin that this band must see.
                if before is not None:
                    seen[..., : before.shape[-2], :] = before

                # Keep this band's last rows as they are now, for the band below.
                inner = _shift_into(band, outer)
                before = seen[..., inner.stop - HALO_PX : inner.stop, :].clone()
                features[..., band, :] = block(seen)[..., inner, :]
        finally:
            attention.fixed_mixing = None

    def _fuse(self, up: nn.Module, fuse: nn.Module, features: Tensor, skip: Tensor) -> Tensor:
        """Compute `fuse(up(features), skip)` in the memory of `skip`."""
        for band, outer in self._bands(features, 1):
            # `up` doubles the resolution, so all rows count twice after it.
            inner = _shift_into(band, outer)
            rows = slice(2 * band.start, 2 * band.stop)
            raised = up(features[..., outer, :])[..., 2 * inner.start : 2 * inner.stop, :]
            skip[..., rows, :] = fuse(torch.cat([raised, skip[..., rows, :]], 1))
        return skip

    def _convolve(self, convolution: nn.Module, *parts: Tensor) -> Tensor:
        """Apply a 3x3 convolution, band by band.

        `parts` stand side by side as channels.
        """
        bands = []
        for band, outer in self._bands(parts[0], 1):
            seen = torch.cat([part[..., outer, :] for part in parts], 1)
            seen = seen.contiguous(memory_format=torch.channels_last)
            bands.append(convolution(seen)[..., _shift_into(band, outer), :])

        # Join the bands in memory that is channels-last, as the CPMM's own features are.
        output = bands[0].new_empty(*bands[0].shape[:2], *parts[0].shape[-2:])
        output = output.contiguous(memory_format=torch.channels_last)
        return torch.cat(bands, -2, out=output)

    def _bands(self, features: Tensor, halo_px: int) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each band, without and with margin.

        A band's margin must be seen to compute the band.
        """
        height, width = features.shape[-2:]
        rows = max(MIN_ROWS, self.band_px // width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            yield slice(start, stop), slice(max(0, start - halo_px), min(height, stop + halo_px))


def _shift_into(band: slice, outer: slice) -> slice:
    """Return where `band` lies within `outer`."""
    return slice(band.start - outer.start, band.stop - outer.start)
