"""DA-CLIP as a clarity scorer: how probably an image is hazy, or degraded in other ways.

DA-CLIP (Luo et al., ICLR 2024, arXiv 2310.01018) adds to a frozen CLIP a copy of its visual tower, the controller,
which is trained to say what degraded an image. Its feature alone is compared with the degradations' names, so
neither the frozen tower nor, once the names are embedded, the text tower is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.choices import DEGRADATIONS
from corun_ray.core.weights import WeightsError, read_weights

DACLIP_FILE = "daclip_ViT-B-32.pt"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64
SHARPNESS = 100.0  # of the softmax over cosines


class DaClip(nn.Module):
    """Clarity, 1 − the density of the chosen degradations: `B 3 H W` RGB in [0, 1] to `B` float32 in [0, 1].

    `tower` embeds normalised images of side `side_px`, `B 3 S S` to `B E`; `words` are the embeddings of
    `DEGRADATIONS`, `10 E`. `chunk_images` are rated at a time, in half precision on CUDA. Frozen, but
    differentiable by the images. Raises `ValueError` for unknown degradations and where none is given.
    """

    mean: Tensor
    std: Tensor
    words: Tensor

    def __init__(
        self,
        tower: nn.Module,
        side_px: int,
        words: Tensor,
        degradations: Sequence[str] = ("hazy",),
        chunk_images: int = 64,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.side_px = side_px
        self.chosen = _chosen(degradations)
        self.chunk_images = chunk_images
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.register_buffer("words", F.normalize(words.detach().float(), dim=1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Clarity, `B` float32 in [0, 1]."""
        return 1 - self.compute_density(images)

    def compute_density(self, images: Tensor) -> Tensor:
        """The chosen degradations' probabilities added, `B` float32 in [0, 1]."""
        return self.compute_probabilities(images)[:, self.chosen].sum(1).clamp(max=1)

    def compute_probabilities(self, images: Tensor) -> Tensor:
        """Of each of `DEGRADATIONS`, `B 10` float32 that add up to 1."""
        return (SHARPNESS * self.compute_cosines(images)).softmax(1)

    def compute_cosines(self, images: Tensor) -> Tensor:
        """Between the images and each of `DEGRADATIONS`, `B 10` float32 in [-1, 1]."""
        # A caller's own autocast would cost the digits that the softmax multiplies by a hundred.
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._cosines(chunk) for chunk in images.float().split(self.chunk_images)])

    def _cosines(self, images: Tensor) -> Tensor:
        normalised = (crop_middle_square(images, self.side_px) - self.mean) / self.std
        with torch.autocast(images.device.type, torch.float16, enabled=images.is_cuda):
            features = self.tower(normalised)
        return F.normalize(features.float(), dim=1) @ self.words.T


def load_daclip(path: Path, degradations: Sequence[str] = ("hazy",), chunk_images: int = 64) -> DaClip:
    """DA-CLIP from its published file, plain or under `state_dict`, with or without `module.` before the names.

    Sizes follow from the tensors' shapes. The arguments after `path` are those of `DaClip`. Raises `WeightsError`
    for a file that is not DA-CLIP, `ValueError` for unknown degradations.
    """
    file = _read(path)
    tower, words = _controller(file), _embedded_words(file)
    if words.shape[1] != tower.output_dim:
        raise WeightsError(f"{path}: not DA-CLIP (embeds words in {words.shape[1]}, images in {tower.output_dim})")
    return DaClip(tower, tower.image_size[0], words, degradations, chunk_images)


def crop_middle_square(images: Tensor, side_px: int) -> Tensor:
    """`B 3 H W` resized to a short side of `side_px`, then cropped to the square in its middle.

    Bicubic and antialiased, as torchvision's `Resize` and `CenterCrop` are on float tensors; nothing is clipped.
    """
    short = min(images.shape[-2:])
    height, width = (side_px * side // short for side in images.shape[-2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = round((height - side_px) / 2), round((width - side_px) / 2)
    return resized[..., top : top + side_px, left : left + side_px]


def _chosen(degradations: Sequence[str]) -> list[int]:
    """Places in `DEGRADATIONS`, each once."""
    unknown = [word for word in degradations if word not in DEGRADATIONS]
    if unknown or not degradations:
        found = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"degradations: expected some of {', '.join(DEGRADATIONS)}, got {found}")
    return sorted({DEGRADATIONS.index(word) for word in degradations})


@dataclass(frozen=True)
class _File:
    """The tensors of a weights file by their published names; methods raise `WeightsError` where they do not fit."""

    path: Path
    tensors: dict[str, Tensor]

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor of `dims` dimensions."""
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: not DA-CLIP (no {name})")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise WeightsError(f"{self.path}: not DA-CLIP ({name} has shape {shape}, expected {dims} dimensions)")
        return shape

    def width(self, name: str) -> int:
        """The last side of a matrix, which attention heads share out."""
        width = self.shape(name, 2)[1]
        if width % HEAD_WIDTH:
            raise WeightsError(f"{self.path}: not DA-CLIP ({name} has width {width}, no multiple of {HEAD_WIDTH})")
        return width

    def layers(self, prefix: str) -> int:
        """The number of blocks `{prefix}.resblocks.i`, at least one."""
        self.shape(f"{prefix}.resblocks.0.ln_1.weight", 1)
        return sum(name.startswith(f"{prefix}.resblocks.") and name.endswith(".ln_1.weight") for name in self.tensors)

    def fill(self, module: nn.Module, published: Callable[[str], str]) -> None:
        """Copies the tensors into `module`, whose names `published` turns into the file's."""
        for name, own in module.state_dict().items():
            expected, found = tuple(own.shape), self.shape(published(name), own.ndim)
            if found != expected:
                raise WeightsError(f"{self.path}: not DA-CLIP ({published(name)} has shape {found}, not {expected})")
            own.copy_(self.tensors[published(name)])


def _read(path: Path) -> _File:
    content: Any = read_weights(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not DA-CLIP (holds a {type(content).__name__}, expected named tensors)")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return _File(path, {name.removeprefix("module."): tensor for name, tensor in tensors.items()})


def _controller(file: _File) -> Any:
    """open_clip's visual tower with the controller's weights; the published transformer stands one level deeper."""
    from open_clip.transformer import VisionTransformer

    prefix = "visual_control."
    patch_px = file.shape(f"{prefix}conv1.weight", 4)[-1]
    tokens = file.shape(f"{prefix}positional_embedding", 2)[0]
    width = file.width(f"{prefix}positional_embedding")
    tower = _unfilled(
        lambda: VisionTransformer(
            image_size=math.isqrt(tokens - 1) * patch_px,
            patch_size=patch_px,
            width=width,
            layers=file.layers(f"{prefix}transformer.transformer"),
            heads=width // HEAD_WIDTH,
            mlp_ratio=4.0,
            output_dim=file.shape(f"{prefix}proj", 2)[1],
        )
    )
    file.fill(tower, lambda name: prefix + name.replace("transformer.", "transformer.transformer.", 1))
    return tower


@torch.no_grad()
def _embedded_words(file: _File) -> Tensor:
    """What the text tower of the file makes of `DEGRADATIONS`, `10 E`."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    tokenizer = SimpleTokenizer()
    prefix = "clip."
    context = file.shape(f"{prefix}positional_embedding", 2)[0]
    width = file.width(f"{prefix}positional_embedding")
    text = _unfilled(
        lambda: TextTransformer(
            context_length=context,
            vocab_size=tokenizer.vocab_size,
            width=width,
            heads=width // HEAD_WIDTH,
            layers=file.layers(f"{prefix}transformer"),
            output_dim=file.shape(f"{prefix}text_projection", 2)[1],
        )
    )
    file.fill(text, lambda name: prefix + name)
    text.attn_mask = text.build_causal_mask()  # no weight, so not in the file
    embedded: Tensor = text.eval()(tokenizer(list(DEGRADATIONS), context_length=context))
    return embedded


def _unfilled(build: Callable[[], nn.Module]) -> Any:
    """The module on the CPU with memory as it comes: first weights would take time, and draw random numbers."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")
