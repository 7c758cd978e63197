"""CPMM, the learned proximal network of a CORUN stage: a 3-level U-shaped transformer.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.1. Module and parameter names are those of the
checkpoints in circulation.

Memory traffic bounds the speed of this network. Features are `B C H W` whose channels lie side by side in memory
(channels-last). Linear layers on pixels (`B HW C`) and convolutions then read the same memory, and no layer copies its
input into another layout. `tests/core/networks/plain_corun.py` is the form that reads like the paper; a test holds this
one against it.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 3
SIZE_MULTIPLE_PX = 2**LEVELS
"""Heights and widths must be multiples of this: each level halves them."""

SQUARED_NORM_MIN = 1e-24
"""Keeps the norm of a query or key above zero, as `F.normalize` does with its square root."""


class CPMM(nn.Module):
    """The network that refines a closed-form estimate with the help of its partner.

    T-CPMM refines the transmission (1 channel) beside the scene, S-CPMM the scene (3 channels) beside the
    transmission. The output layer starts at zero, so that a fresh network returns the closed-form solution exactly:
    training improves on that solution, instead of first finding its way back to it.
    """

    def __init__(self, out_channels: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.mapping = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)

        # The encoder goes down from level to level, and the decoder comes back up: its layers are in reverse order.
        self.encoder_layers = nn.ModuleList()
        self.decoder_layers = nn.ModuleList()
        for level in range(LEVELS):
            channels = width * 2**level
            down = Resample(channels, channels // 2, nn.PixelUnshuffle(2))
            self.encoder_layers.append(nn.ModuleList([Block(channels, width), down]))

            up = Resample(2 * channels, 4 * channels, nn.PixelShuffle(2))
            fuse = nn.Conv2d(2 * channels, channels, 1, bias=False)
            self.decoder_layers.insert(0, nn.ModuleList([up, fuse, Block(channels, width)]))

        self.bottleneck = Block(width * 2**LEVELS, width)
        nn.init.zeros_(self.mapping.weight)

    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        """Refine an estimate: `estimate + mapping(U-Net(embedding([estimate, partner])))`.

        `estimate` is `B c H W`, `partner` is `B (4 - c) H W`; H and W are multiples of 8. Returns `B c H W`.
        """
        # Embed both images. All that follows stays channels-last.
        features = torch.cat([estimate, partner], 1).contiguous(memory_format=torch.channels_last)
        features = self.embedding(features)

        # Encode: keep each level's features for the decoder, then go down a level.
        skips = []
        for block, down in cast(Iterable[tuple[Block, Resample]], self.encoder_layers):
            features = block(features)
            skips.append(features)
            features = down(features)

        features = self.bottleneck(features)

        # Decode: go up a level, and fuse the result with the encoder's features of that level.
        for up, fuse, block in cast(Iterable[tuple[Resample, nn.Conv2d, Block]], self.decoder_layers):
            features = block(fuse(torch.cat([up(features), skips.pop()], 1)))

        # Residual: the network learns a correction of the closed-form estimate.
        return estimate + self.mapping(features)

    def list_attentions(self) -> list["SpectralAttention"]:
        """List the attention layers in the order in which they run."""
        attentions = []
        for layer in [*self.encoder_layers, self.bottleneck, *self.decoder_layers]:
            for module in layer.modules():
                if isinstance(module, SpectralAttention):
                    attentions.append(module)
        return attentions


class Block(nn.Module):
    """A transformer block: `x + attention(x)`, then `x + ffn(LayerNorm(x))`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        pair = [SpectralAttention(channels, width), PreNorm(channels, FeedForward(channels))]
        self.blocks = nn.ModuleList([nn.ModuleList(pair)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform features, `B C H W` to `B C H W`.

        Both layers add their own residual.
        """
        for attention, feed_forward in cast(Iterable[tuple[nn.Module, nn.Module]], self.blocks):
            x = attention(x)
            x = feed_forward(x)
        return x


class SpectralAttention(nn.Module):
    """Self-attention across channels, over all pixels of the image (section 3.1).

    With `x` as C rows of all pixels, each head's queries `q = Wq x`, keys `k = Wk x` and values `v = Wv x` are `d` rows
    (`d` is the network's width), and its attention map is `d x d`:

        A = softmax(rescale cos(k, q)),    attention(x) = projection(A v) + position(v)

    Queries and keys enter only by their inner products over the pixels. These follow from the input's own inner
    products, `k q' = Wk (x x') Wq'`, so no query and no key is ever computed.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.heads = channels // width
        self.fixed_mixing: Tensor | None = None
        """The mixing of the whole image (see `compute_mixing`), set where the input is only a part of the image."""
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
        """Compute `x + attention(x)`, both `B C H W`."""
        value = F.linear(_to_pixels(x), self.to_v.weight)

        # Mix the values by the attention maps and the projection (one matrix holds both), and add x.
        mixing = self.compute_mixing(self.compute_products(x)) if self.fixed_mixing is None else self.fixed_mixing
        attended = torch.baddbmm(_to_pixels(x).to(value.dtype), value, mixing.to(value.dtype).mT)

        # Positional branch on the values: depthwise 3x3, GELU, depthwise 3x3. The second convolution has no bias, so
        # the projection's bias is added there.
        before, activation, after = cast(tuple[nn.Conv2d, nn.GELU, nn.Conv2d], tuple(self.pos_emb))
        position = activation(before(_to_planes(value, x)))
        position = F.conv2d(position, after.weight, self.proj.bias, padding=1, groups=after.groups)

        return position.add_(_to_planes(attended, x))

    def compute_products(self, x: Tensor) -> Tensor:
        """Compute `x x'`, the inner products of the channels.

        The products run over all pixels: `B C H W` becomes `B C C`. The products of an image's parts add up to the
        products of the image.
        """
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, _InnerProducts.apply(_to_pixels(x)))

    def compute_mixing(self, products: Tensor) -> Tensor:
        """Compute `projection A`, the matrix that mixes the values.

        The matrix is `B C C`. `products` are those of `compute_products`, `B C C`. Heads are the batch of the matrix
        products below, with the images side by side in one matrix: no weight is copied for each image.
        """
        heads, (batch, channels, _) = self.heads, products.shape
        width = channels // heads  # `d` in the shapes below

        with torch.autocast(products.device.type, enabled=False):
            # (x x') Wq' and (x x') Wk' in one product.
            weights = torch.cat([self.to_q.weight, self.to_k.weight]).to(products.dtype)
            mixed = F.linear(products, weights).view(batch, channels, 2, heads, width)

            # Norms of queries and keys: the diagonals of Wq (x x') Wq' and Wk (x x') Wk', each B heads d.
            squares = (weights.mT.view(channels, 2, heads, width) * mixed).sum(1)
            query_norm, key_norm = squares.clamp_min(SQUARED_NORM_MIN).sqrt().unbind(1)

            # Inner products k q' = Wk (x x') Wq' of each head, B heads d d, and their cosines.
            queries = mixed[:, :, 0].permute(2, 1, 0, 3).reshape(heads, channels, batch * width)
            keys = weights[channels:].view(heads, width, channels)
            inner = torch.bmm(keys, queries).view(heads, width, batch, width).permute(2, 0, 1, 3)
            cosines = inner / (key_norm[..., :, None] * query_norm[..., None, :])

            # Attention maps A, B heads d d.
            attention = (self.rescale * cosines.to(self.rescale.dtype)).softmax(-1)

            # The output projection, heads C d, of each head's map.
            attention = attention.permute(1, 2, 0, 3).reshape(heads, width, batch * width)
            projection = self.proj.weight.view(channels, heads, width).transpose(0, 1)
            mixing = torch.bmm(projection, attention).view(heads, channels, batch, width)
            return mixing.permute(2, 1, 0, 3).reshape(batch, channels, channels)


class _InnerProducts(torch.autograd.Function):
    """The inner products of channels, in twice the precision of the pixels, and at least in float32.

    The cosines of queries and keys that are much smaller than the features cancel most digits, and a sum over all
    pixels is too long for half precision anyway. The gradient `x (g + g')` has neither fault. It is computed in the
    pixels' own precision, and no tensor of twice that precision is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        """Compute `x' x` of pixels x.

        `B N C` becomes `B C C`.
        """
        ctx.save_for_backward(pixels)
        pixels = pixels.to(torch.float64 if pixels.dtype == torch.float32 else torch.float32)
        return torch.bmm(pixels.mT, pixels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Compute the gradient `x (g + g')` of the pixels.

        `g` is `B C C`, the result is `B N C`.
        """
        (pixels,) = ctx.saved_tensors
        return torch.bmm(pixels, (gradient + gradient.mT).to(pixels.dtype))


class PreNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, then `fn`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Compute `fn(LayerNorm(x), x)`, `B C H W` like x.

        `fn` adds its second argument to its result.
        """
        normalised = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fn(normalised, x)


class FeedForward(nn.Module):
    """A 1x1 expansion by four, GELU, depthwise 3x3, GELU, 1x1 back."""

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
        """Compute `residual + ffn(x)`, all `B C H W`."""
        expand, first, depthwise, second, shrink = self.net
        hidden = second(depthwise(first(expand(x))))

        # The last 1x1 convolution as a matrix product over pixels, which adds the residual on the way.
        weight = cast(nn.Conv2d, shrink).weight[:, :, 0, 0].mT
        rows = _to_pixels(residual).flatten(0, 1).to(hidden.dtype)
        out = torch.addmm(rows, _to_pixels(hidden).flatten(0, 1), weight)
        return _to_planes(out.view(x.shape[0], -1, weight.shape[1]), x)


class Resample(nn.Module):
    """A 3x3 convolution, then pixel-(un)shuffle by two."""

    def __init__(self, channels: int, conv_channels: int, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, conv_channels, 3, padding=1, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        """Resample `B C H W` features.

        Down gives `B 2C H/2 W/2`, up gives `B C/2 2H 2W`.
        """
        return self.body(x)


def _to_pixels(x: Tensor) -> Tensor:
    """View planes `B C H W` as pixels `B HW C`.

    There is no copy where x is channels-last.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_planes(pixels: Tensor, like: Tensor) -> Tensor:
    """View pixels `B HW C` as channels-last planes.

    The planes, `B C H W`, have the height and width of `like`.
    """
    return pixels.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
