"""CORUN as the paper describes it (Fang et al., NeurIPS 2024, section 3.1), without a thought for speed.

The network is held and timed against this form.

Pixels are rows (`B HW C`) where a layer works on pixels and planes (`B C H W`) where it convolves, and every layer
turns its input into what it needs. Parameter names are those of the checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.heads = channels // width
        self.rescale = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.pos_emb = nn.Sequential(_depthwise(channels), nn.GELU(), _depthwise(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        pixels = x.reshape(batch, height * width, channels)
        value = self.to_v(pixels)
        query, key, heads = (
            y.reshape(batch, height * width, self.heads, -1).permute(0, 2, 3, 1)
            for y in (self.to_q(pixels), self.to_k(pixels), value)
        )
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        mixing = (self.rescale * (key @ query.transpose(-2, -1))).softmax(-1)
        attended = (mixing @ heads).permute(0, 3, 1, 2).reshape(batch, height * width, channels)
        attended = self.proj(attended).reshape(batch, height, width, channels)
        value = value.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return attended + self.pos_emb(value).permute(0, 2, 3, 1)


class PlainFeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        expand = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        shrink = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.net = nn.Sequential(expand, nn.GELU(), _depthwise(4 * channels), nn.GELU(), shrink)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PlainPreNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = PlainFeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([PlainAttention(channels, width), PlainPreNorm(channels)])])

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for attention, feed_forward in self.blocks:
            x = x + attention(x)
            x = x + feed_forward(x)
        return x.permute(0, 3, 1, 2)


class PlainCPMM(nn.Module):
    def __init__(self, out_channels: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.mapping = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.encoder_layers, self.decoder_layers = nn.ModuleList(), nn.ModuleList()
        for channels in (width, 2 * width, 4 * width):
            down = _resample(channels, channels // 2, nn.PixelUnshuffle(2))
            self.encoder_layers.append(nn.ModuleList([PlainBlock(channels, width), down]))
        for channels in (4 * width, 2 * width, width):
            up = _resample(2 * channels, 4 * channels, nn.PixelShuffle(2))
            fuse = nn.Conv2d(2 * channels, channels, 1, bias=False)
            self.decoder_layers.append(nn.ModuleList([up, fuse, PlainBlock(channels, width)]))
        self.bottleneck = PlainBlock(8 * width, width)

    def forward(self, estimate: Tensor, partner: Tensor) -> Tensor:
        x = self.embedding(torch.cat([estimate, partner], 1))
        skips = []
        for block, down in self.encoder_layers:
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottleneck(x)
        for up, fuse, block in self.decoder_layers:
            x = block(fuse(torch.cat([up(x), skips.pop()], 1)))
        return estimate + self.mapping(x)


class _Prior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step_lambda = nn.Parameter(torch.tensor([0.3]).sigmoid())


class PlainStage(nn.Module):
    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.trans_prox, self.dehaze_prox = _Prior(), _Prior()
        self.trans_net = None if last else PlainCPMM(1, width)
        self.dehaze_net = PlainCPMM(3, width)

    def forward(self, P: Tensor, T: Tensor, J: Tensor, J_hat: Tensor) -> tuple[Tensor, ...]:
        weight = self.trans_prox.step_lambda
        a = torch.where(1 - J_hat == 0, 1e-7, 1 - J_hat)
        numerator = torch.sum(1 - P + weight * T / a, 1, keepdim=True)
        denominator = torch.sum(1 - J_hat + weight / a, 1, keepdim=True)
        T_hat = (numerator / torch.where(denominator == 0, 1e-7, denominator)).clamp(0.05, 0.999)
        T = T_hat if self.trans_net is None else self.trans_net(T_hat, J)
        weight = self.dehaze_prox.step_lambda
        J_hat = ((T_hat * P + T_hat**2 - T_hat + weight * J) / (T_hat**2 + weight)).clamp(0, 1)
        return T, self.dehaze_net(J_hat, T_hat), J_hat, T_hat


class PlainCORUN(nn.Module):
    """`stages` of 2 and more."""

    def __init__(self, stages: int = 4, width: int = 30) -> None:
        super().__init__()
        self.first = PlainStage(width, last=False)
        self.basic = nn.ModuleList(PlainStage(width, last=False) for _ in range(stages - 2))
        self.last = PlainStage(width, last=True)

    def forward(self, P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every stage's scene and closed-form transmission."""
        T, J, J_hat = torch.full_like(P[:, :1], 0.5), P, P
        outputs = []
        for stage in (self.first, *self.basic, self.last):
            T, J, J_hat, T_hat = stage(P, T, J, J_hat)
            outputs.append((J, T_hat))
        return outputs


def _depthwise(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def _resample(channels: int, inner: int, shuffle: nn.Module) -> nn.Module:
    resample = nn.Module()
    resample.body = nn.Sequential(nn.Conv2d(channels, inner, 3, padding=1, bias=False), shuffle)
    resample.forward = resample.body.forward
    return resample
