"""DA-CLIP as a scorer of clarity: the probability that an image is hazy, or degraded in other ways.

DA-CLIP (Luo et al., ICLR 2024, arXiv 2310.01018) adds to a frozen CLIP a copy of its visual tower, the controller. The
controller is trained to say what degraded an image. Its feature is compared with the embedded names of the
degradations. That needs neither the frozen visual tower nor, once the names are embedded, the text tower.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.choices import DEGRADATIONS, ScorerPrecision
from corun_ray.core.scoring.arithmetic import Capture, Graphs, use_precision
from corun_ray.core.weights import WeightsError, read_weights

DACLIP_FILE = "daclip_ViT-B-32.pt"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HEAD_WIDTH = 64
"""Channels of one attention head."""

SHARPNESS = 100.0
"""The factor of the cosines before the softmax."""

CONTROLLER_PREFIX = "visual_control."
CLIP_PREFIX = "clip."


class DaClip(nn.Module):
    """Clarity, 1 − the density of the chosen degradations: `B 3 H W` RGB in [0, 1] to `B` float32 in [0, 1].

    The network is frozen, but differentiable by the images. By default it runs in half precision on CUDA.
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
        antialias: bool = True,
    ) -> None:
        """Assemble the scorer.

        `tower` embeds normalised images of side `side_px`, `B 3 S S` to `B E`. `words` are the embeddings of
        `DEGRADATIONS`, `10 E`. `chunk_images` are rated at a time. `antialias` is explained at `crop_middle_square`.
        Raises `ValueError` where a degradation is unknown, or none is given.
        """
        super().__init__()
        self.tower = tower
        self.side_px = side_px
        self.chosen = _find_columns(degradations)
        self.chunk_images = chunk_images
        self.antialias = antialias
        self.precision: ScorerPrecision = "auto"
        self._graphs: Graphs | None = None
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.register_buffer("words", F.normalize(words.detach().float(), dim=1))
        self.eval().requires_grad_(False)

    def use_graphs(self, capture: Capture) -> None:
        """Replay the network for shapes that come again; see `Graphs`."""
        self._graphs = Graphs("daclip", self._compute_chunk, capture)

    def forward(self, images: Tensor) -> Tensor:
        """Rate the clarity of images, `B` float32 in [0, 1]."""
        return 1 - self.compute_density(images)

    def compute_density(self, images: Tensor) -> Tensor:
        """Add up the probabilities of the chosen degradations.

        Returns `B` float32 in [0, 1].
        """
        return self.compute_probabilities(images)[:, self.chosen].sum(1).clamp(max=1)

    def compute_probabilities(self, images: Tensor) -> Tensor:
        """Compute the probability of each of `DEGRADATIONS`.

        Returns `B 10` float32; each row adds up to 1.
        """
        return (SHARPNESS * self.compute_cosines(images)).softmax(1)

    def compute_cosines(self, images: Tensor) -> Tensor:
        """Compute the cosines between images and `DEGRADATIONS`.

        Returns `B 10` float32 in [-1, 1].
        """
        # A caller's own autocast would cost the digits that the softmax multiplies by a hundred.
        compute = self._graphs or self._compute_chunk
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([compute(chunk) for chunk in images.float().split(self.chunk_images)])

    def _compute_chunk(self, images: Tensor) -> Tensor:
        """Compute the cosines of one chunk of images."""
        # CLIP's preprocessing.
        normalised = (crop_middle_square(images, self.side_px, self.antialias) - self.mean) / self.std

        # The degradation feature, then its cosine with each name.
        with use_precision(self.precision, images.device, torch.float16 if images.is_cuda else None):
            features = self.tower(normalised)
        return F.normalize(features.float(), dim=1) @ self.words.T


def load_daclip(
    path: Path, degradations: Sequence[str] = ("hazy",), chunk_images: int = 64, antialias: bool = True
) -> DaClip:
    """Load DA-CLIP from its published file.

    The tensors may lie under `state_dict`, and their names may begin with `module.`. Sizes follow from the tensors'
    shapes. The arguments after `path` are those of `DaClip`.

    Raises `WeightsError` for a file that is not DA-CLIP, and `ValueError` for unknown degradations.
    """
    file = _read_file(path)
    tower, words = _build_controller(file), _embed_degradations(file)

    if words.shape[1] != tower.output_dim:
        raise WeightsError(f"{path}: not DA-CLIP (embeds words in {words.shape[1]}, images in {tower.output_dim})")
    return DaClip(tower, tower.image_size[0], words, degradations, chunk_images, antialias)


def crop_middle_square(images: Tensor, side_px: int, antialias: bool = True) -> Tensor:
    """Resize images, then crop the square in the middle.

    The images are `B 3 H W`; their short side becomes `side_px`. The resize is bicubic, as torchvision's `Resize` and
    `CenterCrop` are on float tensors: antialiased by default, and not so up to torchvision 0.16, with which DA-CLIP was
    published. Values are not clipped.
    """
    # Resize.
    short = min(images.shape[-2:])
    height, width = (side_px * side // short for side in images.shape[-2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=antialias, align_corners=False)

    # Crop.
    top, left = round((height - side_px) / 2), round((width - side_px) / 2)
    return resized[..., top : top + side_px, left : left + side_px]


def _find_columns(degradations: Sequence[str]) -> list[int]:
    """Find the places of the chosen degradations in `DEGRADATIONS`, each once."""
    for word in degradations:
        if word not in DEGRADATIONS:
            raise ValueError(f"degradations: expected some of {', '.join(DEGRADATIONS)}, got {word!r}")
    if not degradations:
        raise ValueError(f"degradations: expected some of {', '.join(DEGRADATIONS)}, got none")

    return sorted({DEGRADATIONS.index(word) for word in degradations})


# --- Reading the published file ---


@dataclass(frozen=True)
class _DaClipFile:
    """The tensors of a weights file by their published names.

    The methods raise `WeightsError` where the tensors are not those of DA-CLIP.
    """

    path: Path
    tensors: dict[str, Tensor]

    def get_shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor of `dims` dimensions."""
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: not DA-CLIP (no {name})")

        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise WeightsError(f"{self.path}: not DA-CLIP ({name} has shape {shape}, expected {dims} dimensions)")
        return shape

    def get_width(self, name: str) -> int:
        """Return the last side of a matrix.

        It must be a multiple of the heads' width.
        """
        width = self.get_shape(name, 2)[1]
        if width % HEAD_WIDTH:
            raise WeightsError(f"{self.path}: not DA-CLIP ({name} has width {width}, no multiple of {HEAD_WIDTH})")
        return width

    def count_layers(self, prefix: str) -> int:
        """Count the blocks `{prefix}.resblocks.i`, at least one."""
        self.get_shape(f"{prefix}.resblocks.0.ln_1.weight", 1)
        return sum(name.startswith(f"{prefix}.resblocks.") and name.endswith(".ln_1.weight") for name in self.tensors)

    def fill(self, module: nn.Module, to_published: Callable[[str], str]) -> None:
        """Copy the tensors into `module`.

        `to_published` turns the module's names into the file's.
        """
        for name, own in module.state_dict().items():
            published = to_published(name)
            expected, found = tuple(own.shape), self.get_shape(published, own.ndim)
            if found != expected:
                raise WeightsError(f"{self.path}: not DA-CLIP ({published} has shape {found}, not {expected})")
            own.copy_(self.tensors[published])


def _read_file(path: Path) -> _DaClipFile:
    """Read the named tensors of a weights file.

    Raises `WeightsError` where it holds no mapping.
    """
    content: Any = read_weights(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not DA-CLIP (holds a {type(content).__name__}, expected named tensors)")

    # Keep the tensors alone, without the prefix of data-parallel training.
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name.removeprefix("module.")] = value
    return _DaClipFile(path, tensors)


def _build_controller(file: _DaClipFile) -> Any:
    """Build open_clip's visual tower, with the weights of the controller."""
    from open_clip.transformer import VisionTransformer

    # Sizes follow from the shapes: one token a patch, and the class token.
    prefix = CONTROLLER_PREFIX
    patch_px = file.get_shape(f"{prefix}conv1.weight", 4)[-1]
    tokens = file.get_shape(f"{prefix}positional_embedding", 2)[0]
    width = file.get_width(f"{prefix}positional_embedding")
    tower = _build_empty(
        lambda: VisionTransformer(
            image_size=math.isqrt(tokens - 1) * patch_px,
            patch_size=patch_px,
            width=width,
            layers=file.count_layers(f"{prefix}transformer.transformer"),
            heads=width // HEAD_WIDTH,
            mlp_ratio=4.0,
            output_dim=file.get_shape(f"{prefix}proj", 2)[1],
        )
    )

    # The published transformer stands one level deeper.
    file.fill(tower, lambda name: prefix + name.replace("transformer.", "transformer.transformer.", 1))
    return tower


@torch.no_grad()
def _embed_degradations(file: _DaClipFile) -> Tensor:
    """Embed `DEGRADATIONS` with the file's text tower, `10 E`."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    # Sizes follow from the shapes.
    tokenizer = SimpleTokenizer()
    prefix = CLIP_PREFIX
    context = file.get_shape(f"{prefix}positional_embedding", 2)[0]
    width = file.get_width(f"{prefix}positional_embedding")
    text = _build_empty(
        lambda: TextTransformer(
            context_length=context,
            vocab_size=tokenizer.vocab_size,
            width=width,
            heads=width // HEAD_WIDTH,
            layers=file.count_layers(f"{prefix}transformer"),
            output_dim=file.get_shape(f"{prefix}text_projection", 2)[1],
        )
    )

    # The attention mask is no weight, so it is not in the file.
    file.fill(text, lambda name: prefix + name)
    text.attn_mask = text.build_causal_mask()

    embedded: Tensor = text.eval()(tokenizer(list(DEGRADATIONS), context_length=context))
    return embedded


def _build_empty(build: Callable[[], nn.Module]) -> Any:
    """Build a module on the CPU with uninitialised memory.

    Initial weights would take time and draw random numbers, only to be overwritten.
    """
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")
