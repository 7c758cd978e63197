"""Closed lists of names that arguments may take, without torch, so that job files can use them."""

from typing import Literal, get_args

# --- Scorers of pseudo labels ---

REFERENCE = "reference"
"""Rates clarity and quality by the restoration of the model that comes with the package."""

Clarity = Literal["contrast", "fade", "dark_channel", "daclip", "reference"]
"""Scorers of haze density."""

CLARITY_NAMES: tuple[str, ...] = get_args(Clarity)

QUALITY_NAMES: tuple[str, ...] = ("clean", "unclipped", REFERENCE)
"""Scorers of image quality that need no download."""

Degradation = Literal[
    "motion-blurry",
    "hazy",
    "jpeg-compressed",
    "low-light",
    "noisy",
    "raindrop",
    "rainy",
    "shadowed",
    "snowy",
    "uncompleted",
]
"""Degradations that DA-CLIP knows, in the order of its published vocabulary."""

DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)

Combine = Literal["addition", "multiplication"]
"""Ways to combine clarity and quality into one trust weight."""

ScorerPrecision = Literal["auto", "fp32", "fp16", "bf16"]
"""Arithmetic of the networks of scorers; auto: DA-CLIP in fp16 on GPUs, as published, all else in fp32."""

GpuWork = Literal["graphs", "stream"]
"""What a GPU does for scorers: replays them as CUDA graphs; runs them and the teacher beside the student."""

MUSIQ_NAMES = ("musiq", "musiq-ava", "musiq-paq2piq", "musiq-spaq")
"""The metrics of pyiqa whose network can run in half precision and as a CUDA graph."""

# --- Models ---

SHIPPED_MODELS: dict[str, dict[str, int]] = {"corun-small": {"stages": 2, "width": 8}}
"""Models that come with this package: the name, which is also the model source, and the size of CORUN."""

PulledFormat = Literal["safetensors", "onnx"]
"""Files that a model is written as: plain weights with their description, or a graph for other programs."""

NetworkStart = Literal["closed_form", "published"]
"""Fresh weights of CORUN: those that restore by the closed form alone, or random ones as published."""

REFERENCE_MODEL = "corun-small"
"""The one whose restorations candidates are compared with by `coherence.clarity: reference`."""

# --- Training ---

Precision = Literal["auto", "fp32", "bf16"]
"""Arithmetic of a network in training; auto: bf16 where the device is fast at it, else fp32."""

SynthesisPlace = Literal["stream", "worker"]
"""Who does a sample's pixel work: the processes of the sample stream, or a training worker on its device."""

# --- Detectors ---

DetectorName = Literal[
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]
"""torchvision's detectors of boxes alone."""

DETECTOR_NAMES: tuple[DetectorName, ...] = get_args(DetectorName)

# --- Storage and input ---

Encoding = Literal["uint8", "float16", "float32"]
"""Number types in which a label is stored."""

CameraKind = Literal["published", "mild", "none"]
"""Cameras that synthetic hazy images are taken with: darkening, noise and JPEG as published, slight, or absent."""

ResizeKind = Literal["area", "cubic"]
"""How training resizes images: by averages over area, or bicubic without antialiasing, as published."""

DepthKind = Literal["inverse", "metres"]
"""Units of a depth map: inverse depth (near is large), or metres (far is large, 0 means no reading)."""
