"""CPMM, the learned proximal network of a CORUN stage: a 3-level U-shaped transformer.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.1. Module and parameter names are those of the
checkpoints in circulation.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 3
SIZE_MULTIPLE_PX = 2**LEVELS


class SpectralAttention(nn.Module):
    """Self-attention across channels; each head's `width x width` map is taken over all pixels of the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.heads = channels // width
        self.rescale = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.pos_emb = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        weights = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        query, key, value = F.conv2d(x, weights[:, :, None, None]).chunk(3, 1)
        mixing = self._mixing(query, key).to(value.dtype)
        attended = torch.matmul(mixing, value.flatten(2)).view_as(value)
        return attended + self.proj.bias[:, None, None] + self.pos_emb(value)

    def _mixing(self, query: Tensor, key: Tensor) -> Tensor:
        """Output projection times the block-diagonal attention map, B C C: both are then one product with v."""
        batch, channels = query.shape[:2]
        # The inner products run over all pixels of the image: too long a sum for half precision.
        with torch.autocast(query.device.type, enabled=False):
            query, key = (x.float().reshape(batch, self.heads, channels // self.heads, -1) for x in (query, key))
            norms = key.norm(dim=-1)[..., :, None] * query.norm(dim=-1)[..., None, :]
            cosine = torch.matmul(key, query.transpose(2, 3)) / norms.clamp_min(1e-24)
            attention = (self.rescale * cosine).softmax(-1)  # B heads d d
            projection = self.proj.weight.view(channels, self.heads, -1).transpose(0, 1)  # heads C d
            return torch.matmul(projection, attention).transpose(1, 2).reshape(batch, channels, channels)


class FeedForward(nn.Module):
    """1x1 expansion by four, GELU, depthwise 3x3, GELU, 1x1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.net = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        return self.net(x)


class PreNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, then `fn`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        return self.fn(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Block(nn.Module):
    """`x + attention(x)`, then `x + ffn(LayerNorm(x))`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        pair = [SpectralAttention(channels, width), PreNorm(channels, FeedForward(channels))]
        self.blocks = nn.ModuleList([nn.ModuleList(pair)])

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        for attention, feed_forward in cast(Iterable[tuple[nn.Module, nn.Module]], self.blocks):
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


class Resample(nn.Module):
    """A 3x3 convolution, then pixel-(un)shuffle by two."""

    def __init__(self, channels: int, conv_channels: int, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, conv_channels, 3, padding=1, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        """Down: B C H W → B 2C H/2 W/2; up: B C H W → B C/2 2H 2W."""
        return self.body(x)


class CPMM(nn.Module):
    """Refines a closed-form estimate with the help of its partner (scene with transmission, or the reverse).

    The output layer starts at zero, so that a fresh network is the closed-form solution exactly: training then
    improves on it instead of first finding its way back to it.
    """

    def __init__(self, out_channels: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.mapping = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.encoder_layers = nn.ModuleList()
        self.decoder_layers = nn.ModuleList()
        for channels in (width * 2**level for level in range(LEVELS)):
            down = Resample(channels, channels // 2, nn.PixelUnshuffle(2))
            self.encoder_layers.append(nn.ModuleList([Block(channels, width), down]))
            up = Resample(2 * channels, 4 * channels, nn.PixelShuffle(2))
            fuse = nn.Conv2d(2 * channels, channels, 1, bias=False)
            self.decoder_layers.insert(0, nn.ModuleList([up, fuse, Block(channels, width)]))
        self.bottleneck = Block(width * 2**LEVELS, width)
        nn.init.zeros_(self.mapping.weight)

    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """Estimate B c H W and partner B (4 - c) H W → refined estimate B c H W; H and W multiples of 8."""
        features = self.embedding(torch.cat([estimate, partner], 1))
        skips = []
        for block, down in cast(Iterable[tuple[Block, Resample]], self.encoder_layers):
            features = block(features)
            skips.append(features)
            features = down(features)
        features = self.bottleneck(features)
        for up, fuse, block in cast(Iterable[tuple[Resample, nn.Conv2d, Block]], self.decoder_layers):
            features = block(fuse(torch.cat([up(features), skips.pop()], 1)))
        return estimate + self.mapping(features)
