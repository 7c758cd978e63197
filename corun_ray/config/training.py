"""Define the sections of a training job: network, coherence, label pool, losses, optimiser, data, haze, loop."""

import ast
import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.pairing import TruthSection
from corun_ray.config.types import (
    Batch,
    Count,
    DistanceRange,
    Fraction,
    FractionRange,
    LearningRate,
    MinLearningRate,
    Mismatch,
    Name,
    OneOrMore,
    OptionalCount,
    OptionalText,
    PositiveRange,
    RandomResize,
    ScheduleSteps,
    Section,
    Steps,
    Text,
    Whole,
    check_distinct,
)
from corun_ray.core.choices import (
    MUSIQ_NAMES,
    QUALITY_NAMES,
    REFERENCE,
    SHIPPED_MODELS,
    CameraKind,
    Clarity,
    Combine,
    Degradation,
    DepthKind,
    Encoding,
    GpuWork,
    NetworkStart,
    Precision,
    ResizeKind,
    ScorerPrecision,
    SynthesisPlace,
)
from corun_ray.core.metrics.catalog import (
    OWN_METRICS,
    TRANSMISSION_METRICS,
    list_no_reference_metrics,
    list_validation_metrics,
)

ARCHITECTURE_PACKAGES = ("spandrel", "spandrel_extra_arches")
CLASS_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A network's class as `module.path:ClassName`."""

TermWeight = Annotated[float, Field(ge=0)]


# --- Network ---


@cache
def list_architectures() -> tuple[str, ...]:
    """Return the networks of spandrel, and of spandrel_extra_arches where installed.

    The packages are not imported: their source names the networks.
    """
    found: list[str] = []
    for package in ARCHITECTURE_PACKAGES:
        spec = find_spec(package)
        if spec is None:
            continue

        # Each architecture is a package of its own, whose __all__ lists the network and its loader (…Arch).
        for place in spec.submodule_search_locations or ():
            for file in sorted(Path(place, "architectures").glob("*/__init__.py")):
                exported = re.search(r"^__all__ = (\[[^\]]*\])", file.read_text("utf-8"), re.MULTILINE)
                names = ast.literal_eval(exported[1]) if exported else []
                found += [name for name in names if not name.endswith("Arch")]
    return tuple(found)


def _check_network_type(name: str) -> str:
    if CLASS_PATH.fullmatch(name):
        return name
    known = ("corun", "spandrel", *list_architectures())
    if name not in known:
        hint = _suggest(name, known)
        raise ValueError(f'"{name}" is neither corun, an architecture of spandrel nor module.path:ClassName{hint}')
    return name


def _suggest(name: str, known: Sequence[str]) -> str:
    """Suggest the known name spelt most like `name`.

    Empty where none is similar.
    """
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _get_default_size(earlier: Mapping[str, Any], key: str, usual: int) -> int | None:
    """Return the default of `stages` or `width`.

    A shipped model that the job starts from decides. Other networks than CORUN have neither key.
    """
    if earlier["type"] != "corun":
        return None
    if earlier["init"] in SHIPPED_MODELS:
        return SHIPPED_MODELS[earlier["init"]][key]
    return usual


class NetworkSection(Section):
    type: Annotated[str, AfterValidator(_check_network_type)] = Field(
        "corun",
        description="corun, a spandrel network (NAFNet, ...), module.path:ClassName, or spandrel: detected from init",
    )
    init: OptionalText = Field(
        None,
        description="model to start from: MLflow URI, checkpoint, .pth or corun-small, which sets stages and width",
    )
    stages: OptionalCount = Field(
        default_factory=lambda earlier: _get_default_size(earlier, "stages", 4),
        ge=2,
        le=16,
        description="number of unfolding stages; corun only",
    )
    width: OptionalCount = Field(
        default_factory=lambda earlier: _get_default_size(earlier, "width", 30),
        ge=4,
        multiple_of=2,
        description="number of feature channels; corun only",
    )
    start: NetworkStart = Field(
        "closed_form",
        description="weights of a network without init: closed_form restores by physics alone, published is random; "
        "corun only",
    )
    args: dict[str, Any] = Field({}, description="arguments of the network's class; not used by corun")
    checkpoint_activations: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time; corun only"
    )

    @model_validator(mode="after")
    def _check_arguments(self) -> "NetworkSection":
        # CORUN has keys of its own.
        if self.type == "corun":
            if self.args:
                raise Mismatch("network.args", "not used by corun, which has stages and width")
            for key in ("stages", "width"):
                if getattr(self, key) is None:
                    raise Mismatch(f"network.{key}", "null (corun needs a number)")

            if self.start == "published" and self.init is not None:
                raise Mismatch("network.start", f"published, but the job starts from network.init ({self.init})")

            # The size of a shipped model is known here; that of any other when the job starts.
            if self.init in SHIPPED_MODELS:
                for key, size in SHIPPED_MODELS[self.init].items():
                    if getattr(self, key) != size:
                        raise Mismatch(f"network.{key}", f"{getattr(self, key)}, but {self.init} has {size}")
            return self

        # Other networks take the arguments of their class.
        for key in ("stages", "width"):
            if getattr(self, key) is not None:
                raise Mismatch(f"network.{key}", f"only used by corun; {self.type} takes network.args")
        if self.start == "published":
            raise Mismatch("network.start", f"only used by corun, not by {self.type}")
        if self.checkpoint_activations:
            raise Mismatch("network.checkpoint_activations", f"only used by corun, not by {self.type}")
        return self


# --- Coherence and label pool ---


def _check_quality(name: str) -> str:
    known = [*QUALITY_NAMES, *list_no_reference_metrics()]
    if name not in known:
        hint = _suggest(name, known)
        ours = ", ".join(QUALITY_NAMES)
        raise ValueError(f'"{name}" is neither of {ours} nor a metric of pyiqa that rates single images{hint}')
    return name


class CoherenceSection(Section):
    clarity: Clarity = Field(
        "contrast", description="scorer of clarity (little haze); reference rates quality too; daclip needs weights"
    )
    degradations: Annotated[tuple[Degradation, ...], AfterValidator(check_distinct)] = Field(
        ("hazy",), description="degradations that count as unclear; their probabilities are added; daclip only"
    )
    antialias: bool = Field(True, description="antialias the resize before DA-CLIP; as published: false; daclip only")
    quality: Annotated[str, AfterValidator(_check_quality)] = Field(
        default_factory=lambda earlier: REFERENCE if earlier.get("clarity") == REFERENCE else "clean",
        description="scorer of image quality: clean, unclipped, reference or a no-reference metric of pyiqa",
    )
    quality_range: tuple[float, float] | None = Field(
        None, description="worst and best value of a pyiqa metric; null: pyiqa's own range and direction"
    )
    block_px: Whole = Field(
        32, ge=8, description="side of the blocks whose scores weight the losses (trust map), in pixels"
    )
    combine: Combine = Field("addition", description="combination of clarity and quality to one weight")
    weights: OptionalText = Field(None, description="folder or URI of the scorers' weights (see corun-ray weights)")
    chunk_images: OneOrMore = Field(64, description="blocks that a scoring network processes at once")
    share_blocks: bool = Field(
        False, description="balance the rating of blocks over the workers; faster with slow scorers"
    )
    precision: ScorerPrecision = Field(
        "auto",
        description="arithmetic of daclip and musiq; auto: fp16 for daclip on GPUs, as published, else fp32",
    )
    gpu: tuple[GpuWork, ...] = Field(
        (),
        description="what GPUs do: graphs (daclip and musiq as CUDA graphs), stream (teacher and scorers beside the "
        "student, in more memory)",
    )

    @model_validator(mode="after")
    def _check_scorers(self) -> "CoherenceSection":
        # Clarity.
        if self.clarity == "daclip" and self.weights is None:
            raise Mismatch("coherence.weights", "missing (clarity daclip needs its weights)")
        if self.clarity != "daclip" and self.degradations != ("hazy",):
            raise Mismatch("coherence.degradations", f"only used by daclip, not by {self.clarity}")
        if self.clarity != "daclip" and not self.antialias:
            raise Mismatch("coherence.antialias", f"only used by daclip, not by {self.clarity}")

        # The reference rates both, and whole images.
        if (self.clarity == REFERENCE) != (self.quality == REFERENCE):
            raise Mismatch("coherence.quality", f"{self.quality}, but clarity {self.clarity} (reference rates both)")
        if self.clarity == REFERENCE and self.share_blocks:
            raise Mismatch("coherence.share_blocks", "not used by reference, which rates whole images")

        # Only some networks stand half precision, or a graph.
        if self.clarity != "daclip" and self.quality not in MUSIQ_NAMES:
            if self.precision != "auto":
                raise Mismatch("coherence.precision", f"{self.precision} (only used by daclip and musiq)")
            if "graphs" in self.gpu:
                raise Mismatch("coherence.gpu", "graphs (only used by daclip and musiq)")

        # Quality: only a metric of pyiqa has a range, and some need one to be given.
        if self.quality in QUALITY_NAMES:
            if self.quality_range is not None:
                raise Mismatch("coherence.quality_range", f"not used by {self.quality}")
        elif self.quality_range is None:
            facts = list_no_reference_metrics()[self.quality]
            if facts.low is None or facts.high is None:
                raise Mismatch("coherence.quality_range", f"missing (pyiqa gives {self.quality} no range)")
        elif self.quality_range[0] == self.quality_range[1]:
            raise Mismatch("coherence.quality_range", "worst and best are the same")
        return self


class PoolSection(Section):
    shards: Count = Field(1, ge=1, le=256, description="number of actors that share the labels")
    encoding: Encoding = Field("uint8", description="number type of stored labels")
    memory_mib: OptionalCount = Field(
        None,
        ge=1,
        description="memory for labels, all shards together; other labels are in storage; null: no limit",
    )


class LossSection(Section):
    perceptual: Literal["none", "laplacian", "vgg19"] = Field(
        "none",
        description="features of the perceptual and contrastive terms: laplacian (an image pyramid) or vgg19, as "
        "published, which needs weights; none: without these terms",
    )
    weights: OptionalText = Field(None, description="folder or URI of the weights of vgg19")
    pixel_weight: TermWeight = Field(1.0, description="weight of the L1 distance to the truth or label")
    scattering_weight: TermWeight = Field(0.01, description="weight of the re-hazed image's L1 distance to the input")
    perceptual_weight: TermWeight = Field(0.0, description="weight of the feature distance to the truth")
    contrastive_weight: TermWeight = Field(
        1.0, description="weight of the contrastive term: near the truth, far from the input"
    )
    transmission: TermWeight = Field(
        0.0, description="weight of the transmission's L1 distance to the truth of synthetic haze; 0: as published"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "LossSection":
        if self.perceptual == "vgg19" and self.weights is None:
            raise Mismatch("loss.weights", "missing (perceptual vgg19 needs its weights)")
        return self


class ColabatorLossSection(LossSection):
    pixel_weight: TermWeight = Field(5.0, description="weight of the L1 distance to the truth or label")
    perceptual_weight: TermWeight = Field(0.2, description="weight of the feature distance to the truth")
    haze_density_weight: TermWeight = Field(0.0, description="weight of 1 - clarity of the restored real image")


class CycleSection(Section):
    steps: OneOrMore = Field(description="length of the cycle")
    lr: LearningRate
    min_lr: float = Field(ge=0, description="learning rate at the cycle's end")


class OptimSection(Section):
    lr: LearningRate = 1e-4
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: earlier["lr"])
    schedule_steps: ScheduleSteps = 30_000
    ema: float = Field(0.999, ge=0, lt=1, description="decay per step of the averaged weights, which are the teacher's")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient; 0: no limit, as published")
    precision: Precision = Field(
        "auto",
        description="arithmetic of the network; auto: bf16 on GPUs of compute capability 8.0 and up and on processors "
        "with AMX or AVX512-BF16, fp32 elsewhere",
    )
    compile: bool = Field(
        False,
        description="compile the network with torch.compile, which needs a C++ compiler on CPUs, a C compiler on GPUs",
    )
    warmup_steps: Count = Field(
        0, ge=0, description="number of first steps, in which the learning rate rises from near 0"
    )
    cycles: tuple[CycleSection, ...] = Field(
        (), description="cosine cycles with restarts, {steps, lr, min_lr} each; replace lr, min_lr and schedule_steps"
    )

    def describe_early_end(self, steps: int) -> str | None:
        """Describe a learning rate that has come to its end before a training of so many steps; None if none has."""
        if self.cycles:
            end_step, last = sum(cycle.steps for cycle in self.cycles), self.cycles[-1]
            if end_step < steps:
                rest = f"the other {steps - end_step} of train.steps have its last rate, {last.min_lr:g}"
                return f"optim.cycles: end at step {end_step}: {rest}"
        elif self.min_lr < self.lr and self.schedule_steps < steps:
            rest = f"the other {steps - self.schedule_steps} of train.steps have optim.min_lr, {self.min_lr:g}"
            return f"optim.schedule_steps: ends at step {self.schedule_steps}: {rest}"
        return None

    @field_validator("min_lr")
    @classmethod
    def _check_order(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr > info.data.get("lr", min_lr):
            raise ValueError(f"{min_lr} is more than optim.lr ({info.data['lr']})")
        return min_lr


class ColabatorOptimSection(OptimSection):
    lr: LearningRate = 5e-5
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: min(1e-6, earlier["lr"]))
    schedule_steps: ScheduleSteps = 50_000


class ValidationSection(TruthSection):
    transmission: OptionalText = Field(
        None, description="folder or URI of their true transmission, grey images or .npy, paired by stem"
    )


class PairedSection(TruthSection):
    hazy: Text = Field(description="folder, pack or URI of degraded images")
    clear: Text = Field(description="folder, pack or URI of their clean truth, paired by stem or by match")


class TrainingDataSection(Section):
    clear: OptionalText = Field(
        None, description="folder, pack (see corun-ray pack) or URI of clear images, to which haze is added"
    )
    depth: OptionalText = Field(
        None, description="folder, pack or URI of their depth maps (.npy, .png, .mat); null: procedural depth"
    )
    depth_kind: DepthKind = Field(
        "inverse", description="inverse: larger is nearer; metres: larger is farther, 0 means no reading"
    )
    camera: CameraKind = Field(
        "published", description="darkening, noise and JPEG of synthetic hazy images: published, mild or none"
    )
    paired: PairedSection | None = Field(None, description="degraded and clean images; they replace clear and depth")
    validation: ValidationSection | None = Field(None, description="validation set; null: none")
    validation_sets: dict[Name, ValidationSection] = Field(
        {}, description="more validation sets by name, each with the keys of data.validation"
    )
    patch_px: Whole = Field(288, ge=32, multiple_of=16, description="side of a training patch, in pixels")
    random_resize: RandomResize = False
    resize: ResizeKind = Field("area", description="area, or as published: cubic, bicubic without antialiasing")
    rotation: bool = Field(False, description="rotate synthetic or paired patches by a random multiple of 90 degrees")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta(alpha, alpha) that mixes pairs; 0: no mixup")
    cache_mib: Count = Field(
        0, ge=0, description="memory for decoded images in each node's object store, at most half of it; 0: none"
    )
    synthesis: SynthesisPlace = Field(
        "stream",
        description="place of haze, noise, JPEG and strong views: stream, on CPUs, or worker, on its GPU if it has one",
    )
    max_bad_fraction: Fraction = Field(0.01, description="tolerated fraction of unusable images")

    def list_validation_sections(self) -> dict[str, ValidationSection]:
        """List all validation sets by their keys in the job file."""
        sections = {} if self.validation is None else {"data.validation": self.validation}
        return sections | {f"data.validation_sets.{name}": one for name, one in self.validation_sets.items()}

    @staticmethod
    def name_validation_set(key: str) -> str:
        """Return how the metrics of a set begin: `val`, or `val/NAME` of `data.validation_sets.NAME`."""
        return "/".join(["val", *key.split(".")[2:]])

    @field_validator("paired")
    @classmethod
    def _check_source(cls, paired: PairedSection | None, info: ValidationInfo) -> PairedSection | None:
        if "clear" not in info.data:
            return paired  # its own mistake is reported

        # Either clear images or pairs, and a depth only with clear images.
        if (info.data["clear"] is None) == (paired is None):
            text = "missing (folder, pack or URI of clear images; or give data.paired)"
            raise Mismatch("data.clear", text if paired is None else "not used together with data.paired")
        if paired is not None and info.data.get("depth") is not None:
            raise Mismatch("data.depth", "not used together with data.paired")
        return paired

    @field_validator("synthesis")
    @classmethod
    def _check_synthesis(cls, synthesis: SynthesisPlace, info: ValidationInfo) -> SynthesisPlace:
        if synthesis == "worker" and info.data.get("paired") is not None:
            raise Mismatch("data.synthesis", "worker, but data.paired has hazy images, so that no haze is made")
        return synthesis


class ColabatorDataSection(TrainingDataSection):
    hazy: Text = Field(description="folder, pack or URI of real hazy images")
    random_resize: RandomResize = True


class HazeSection(Section):
    beta: PositiveRange = Field((0.2, 2.8), description="scattering coefficient, both ends above 0")
    airlight: FractionRange = Field((0.25, 1.0), description="brightness of the airlight, both ends in 0 to 1")
    airlight_tint: float = Field(0.025, ge=0, description="largest deviation of a colour channel from the airlight")
    nearest: DistanceRange = Field(
        (0.0, 0.0), description="distance of the nearest point, in ranges of depth; 0: free of haze, as published"
    )
    density_variation: FractionRange = Field(
        (0.0, 0.0), description="largest deviation of beta over an image, as a share of beta; 0: uniform, as published"
    )


def _check_validation_metric(name: str) -> str:
    known = [*list_validation_metrics()]
    if name not in known:
        ours = ", ".join([*OWN_METRICS, *TRANSMISSION_METRICS])
        raise ValueError(f'"{name}" is neither of {ours} nor a metric of pyiqa for images{_suggest(name, known)}')
    return name


ValidationMetrics = Annotated[
    tuple[Annotated[str, AfterValidator(_check_validation_metric)], ...], AfterValidator(check_distinct)
]


class TrainSection(Section):
    steps: Steps = 30_000
    batch_per_worker: Batch = 2
    accumulate: OneOrMore = Field(1, description="batches of each worker per step; their gradients are averaged")
    log_every: OneOrMore = Field(50, description="steps between lines of metrics")
    checkpoint_every: OneOrMore = Field(
        500, description="steps between checkpoints; with best, also one after each validation"
    )
    validate_every: OneOrMore = Field(500, description="steps between validations")
    keep_checkpoints: OneOrMore = Field(
        2, description="number of checkpoints kept, the last ones; with best, the best ones beside the last"
    )
    validation_images: OneOrMore = Field(8, description="number of images in the picture grid of a validation")
    validation_metrics: ValidationMetrics | None = Field(
        None,
        description="fade, psnr, ssim, transmission_rank or metrics of pyiqa (brisque, ...); null: fade, and what each "
        "set has the truth for",
    )
    validation_weights: OptionalText = Field(
        None, description="folder or URI of the weights of these metrics (see corun-ray weights)"
    )
    best: OptionalText = Field(
        None,
        description="metric of validation, such as val/psnr, whose best checkpoint is kept and published beside the "
        "last; null: none",
    )

    @property
    def images_per_worker(self) -> int:
        """Images of each kind (synthetic, real) that one worker sees per optimizer step."""
        return self.batch_per_worker * self.accumulate

    def choose_metrics(self, images: ValidationSection) -> tuple[str, ...]:
        """Return the metrics by which a validation set is measured."""
        if self.validation_metrics is not None:
            return self.validation_metrics
        metrics = ["fade"]
        if images.clear is not None:
            metrics += ["psnr", "ssim"]
        if images.transmission is not None:
            metrics.append("transmission_rank")
        return tuple(metrics)


class ProgressiveStep(Section):
    from_step: Count = Field(ge=1, description="first step with these sizes, counted from 0")
    patch_px: Whole = Field(ge=32, multiple_of=16, description="side of a training patch, in pixels")
    batch_per_worker: Batch


class PretrainTrainSection(TrainSection):
    progressive: tuple[ProgressiveStep, ...] = Field(
        (), description="later patch and batch sizes, {from_step, patch_px, batch_per_worker} each"
    )

    @field_validator("progressive")
    @classmethod
    def _check_steps(cls, entries: tuple[ProgressiveStep, ...], info: ValidationInfo) -> tuple[ProgressiveStep, ...]:
        # Steps rise, and all are within the training.
        starts = [entry.from_step for entry in entries]
        if starts != sorted(set(starts)):
            raise ValueError("from_step must rise from one entry to the next")
        steps = info.data.get("steps")
        if steps and starts and starts[-1] >= steps:
            raise ValueError(f"from_step {starts[-1]} is not before train.steps ({steps})")
        return entries


class ColabatorTrainSection(TrainSection):
    steps: Steps = 5_000
    batch_per_worker: Batch = 1
