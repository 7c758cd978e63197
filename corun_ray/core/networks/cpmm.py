"""CPMM, the learned proximal network of a CORUN stage: a 3-level U-shaped transformer.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.1. Module and parameter names are those of the
checkpoints in circulation.

The network is bound by memory traffic. Features are `B C H W` whose channels lie side by side in memory
(channels-last), so that what works on pixels (`B HW C`) and what convolves see the same memory, and nothing is turned
from one into the other. The form that reads like the paper is `tests/core/plain_corun.py`; this one is held against it.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 3
SIZE_MULTIPLE_PX = 2**LEVELS


class SpectralAttention(nn.Module):
    """Self-attention across channels; each head's `width x width` map is taken over all pixels of the image.

    Queries and keys enter the result only by their inner products over the pixels. As both are linear in the input,
    `q = Wq x` and `k = Wk x`, these follow from the input's own: `k q' = Wk (x x') Wq'`. So neither is ever computed.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.heads = channels // width
        self.fixed_mixing: Tensor | None = None
        """The mixing of the whole image, where the input is only a part of the image."""
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
        """B C H W → `x + attention(x)`, B C H W."""
        value = F.linear(_pixels(x), self.to_v.weight)
        mixing = self.compute_mixing(self.compute_products(x)) if self.fixed_mixing is None else self.fixed_mixing
        attended = torch.baddbmm(_pixels(x).to(value.dtype), value, mixing.to(value.dtype).mT)
        before, activation, after = cast(tuple[nn.Conv2d, nn.GELU, nn.Conv2d], tuple(self.pos_emb))
        position = activation(before(_planes(value, x)))
        # The projection's bias is added by the convolution, which has none of its own.
        position = F.conv2d(position, after.weight, self.proj.bias, padding=1, groups=after.groups)
        return position.add_(_planes(attended, x))

    def compute_products(self, x: Tensor) -> Tensor:
        """`x x'`, B C C: the channels' inner products over pixels B C H W. Those of parts add up."""
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, _InnerProducts.apply(_pixels(x)))

    def compute_mixing(self, products: Tensor) -> Tensor:
        """What the values of an image are mixed by, B C C: its attention maps, then the output projection."""
        heads, (batch, channels, _) = self.heads, products.shape
        width = channels // heads
        # Heads are the batch of these products and images stand side by side: no weight is copied for each image.
        with torch.autocast(products.device.type, enabled=False):
            weights = torch.cat([self.to_q.weight, self.to_k.weight]).to(products.dtype)
            mixed = F.linear(products, weights).view(batch, channels, 2, heads, width)
            squares = (weights.mT.view(channels, 2, heads, width) * mixed).sum(1)
            query_norm, key_norm = squares.clamp_min(1e-24).sqrt().unbind(1)  # B heads d
            queries = mixed[:, :, 0].permute(2, 1, 0, 3).reshape(heads, channels, batch * width)
            keys = weights[channels:].view(heads, width, channels)
            inner = torch.bmm(keys, queries).view(heads, width, batch, width).permute(2, 0, 1, 3)
            cosines = inner / (key_norm[..., :, None] * query_norm[..., None, :])
            attention = (self.rescale * cosines.to(self.rescale.dtype)).softmax(-1)  # B heads d d
            attention = attention.permute(1, 2, 0, 3).reshape(heads, width, batch * width)
            projection = self.proj.weight.view(channels, heads, width).transpose(0, 1)  # heads C d
            mixing = torch.bmm(projection, attention).view(heads, channels, batch, width)
            return mixing.permute(2, 1, 0, 3).reshape(batch, channels, channels)


class _InnerProducts(torch.autograd.Function):
    """`x' x`, B C C, of pixels B N C, in twice the precision of `x`, at least float32.

    Cosines of queries and keys that are much smaller than the features cancel most of the digits, and a sum over all
    pixels is too long for half precision anyway. The gradient `x (g + g')` has neither fault: it is computed in the
    precision of `x`, and nothing in twice that is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        pixels = pixels.to(torch.float64 if pixels.dtype == torch.float32 else torch.float32)
        return torch.bmm(pixels.mT, pixels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (pixels,) = ctx.saved_tensors
        return torch.bmm(pixels, (gradient + gradient.mT).to(pixels.dtype))


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

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """B C H W and B C H W → `residual + ffn(x)`, B C H W."""
        expand, first, depthwise, second, shrink = self.net
        hidden = second(depthwise(first(expand(x))))
        weight = cast(nn.Conv2d, shrink).weight[:, :, 0, 0].mT
        out = torch.addmm(_pixels(residual).flatten(0, 1).to(hidden.dtype), _pixels(hidden).flatten(0, 1), weight)
        return _planes(out.view(len(x), -1, weight.shape[1]), x)


class PreNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, then `fn`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        return self.fn(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), x)


class Block(nn.Module):
    """`x + attention(x)`, then `x + ffn(LayerNorm(x))`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        pair = [SpectralAttention(channels, width), PreNorm(channels, FeedForward(channels))]
        self.blocks = nn.ModuleList([nn.ModuleList(pair)])

    def forward(self, x: Tensor) -> Tensor:
        """B C H W → B C H W."""
        for attention, feed_forward in cast(Iterable[tuple[nn.Module, nn.Module]], self.blocks):
            x = attention(x)
            x = feed_forward(x)
        return x


def _pixels(x: Tensor) -> Tensor:
    """B C H W → B HW C: the same memory where that is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _planes(pixels: Tensor, like: Tensor) -> Tensor:
    """B HW C → B C H W, channels-last in memory, of the height and width of `like`."""
    return pixels.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


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

    def list_attentions(self) -> list[SpectralAttention]:
        """In the order in which they run."""
        layers = [*self.encoder_layers, self.bottleneck, *self.decoder_layers]
        return [module for layer in layers for module in layer.modules() if isinstance(module, SpectralAttention)]

    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """Estimate B c H W and partner B (4 - c) H W → refined estimate B c H W; H and W multiples of 8."""
        features = torch.cat([estimate, partner], 1).contiguous(memory_format=torch.channels_last)
        features = self.embedding(features)
        skips = []
        for block, down in cast(Iterable[tuple[Block, Resample]], self.encoder_layers):
            features = block(features)
            skips.append(features)
            features = down(features)
        features = self.bottleneck(features)
        for up, fuse, block in cast(Iterable[tuple[Resample, nn.Conv2d, Block]], self.decoder_layers):
            features = block(fuse(torch.cat([up(features), skips.pop()], 1)))
        return estimate + self.mapping(features)
