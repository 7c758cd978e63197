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
        self.given_mixing: Tensor | None = None
        """Set where the pixels at hand are a part of the image: what `mixing_of` made of the whole one's statistics."""
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
        mixing = (self._mixing(query, key) if self.given_mixing is None else self.given_mixing).to(value.dtype)
        attended = torch.matmul(mixing, value.flatten(2)).view_as(value)
        return attended + self.proj.bias[:, None, None] + self.pos_emb(value)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention needs to know of pixels B C h w: k·qᵀ (B heads d d), and |k|² over |q|² (B heads 2 d).

        Sums over the pixels, those of an image being the sum of its parts': in float64, so that many parts add up.
        """
        weights = torch.cat([self.to_q.weight, self.to_k.weight])
        query, key = (self._by_head(y) for y in F.conv2d(x, weights[:, :, None, None]).chunk(2, 1))
        norms = torch.stack([key.norm(dim=-1), query.norm(dim=-1)], 2)
        return torch.matmul(key, query.transpose(2, 3)).double(), norms.double().square()

    def mixing_of(self, cross: Tensor, squares: Tensor) -> Tensor:
        """The image's mixing, B C C, from its statistics."""
        key_norm, query_norm = squares.sqrt().unbind(2)
        return self._projected(cross.float(), (key_norm[..., :, None] * query_norm[..., None, :]).float())

    def _mixing(self, query: Tensor, key: Tensor) -> Tensor:
        """Output projection times the block-diagonal attention map, B C C: both are then one product with v."""
        # The inner products run over all pixels of the image: too long a sum for half precision.
        with torch.autocast(query.device.type, enabled=False):
            query, key = self._by_head(query), self._by_head(key)
            norms = key.norm(dim=-1)[..., :, None] * query.norm(dim=-1)[..., None, :]
            return self._projected(torch.matmul(key, query.transpose(2, 3)), norms)

    def _by_head(self, x: Tensor) -> Tensor:
        """B C H W → B heads d HW."""
        batch, channels = x.shape[:2]
        return x.float().reshape(batch, self.heads, channels // self.heads, -1)

    def _projected(self, cross: Tensor, norms: Tensor) -> Tensor:
        batch, heads, width, _ = cross.shape
        attention = (self.rescale * (cross / norms.clamp_min(1e-24))).softmax(-1)  # B heads d d
        projection = self.proj.weight.view(heads * width, heads, width).transpose(0, 1)  # heads C d
        return torch.matmul(projection, attention).transpose(1, 2).reshape(batch, heads * width, heads * width)


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

    def attentions(self) -> list[SpectralAttention]:
        """In the order in which they run."""
        layers = [*self.encoder_layers, self.bottleneck, *self.decoder_layers]
        return [module for layer in layers for module in layer.modules() if isinstance(module, SpectralAttention)]

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
