"""The two paper jobs, key by key: each key is a published fact, or changes nothing of what is learnt."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from corun_ray.config.loading import load_jobs

BOTH = {
    # Data: RIDCP500, tested on RTTS.
    "data.clear": "data/rgb_500",
    "data.depth": "data/depth_500",
    "data.depth_kind": "inverse",
    "data.paired": None,
    "data.validation.hazy": "data/rtts",
    "data.validation.clear": None,
    "data.validation.transmission": None,
    "data.validation_sets": {},
    "data.patch_px": 288,
    "data.resize": "cubic",
    "data.rotation": False,
    "data.mixup": 0.0,
    "data.camera": "published",
    # Haze.
    "haze.beta": (0.2, 2.8),
    "haze.airlight": (0.25, 1.0),
    "haze.airlight_tint": 0.025,
    "haze.nearest": (0.0, 0.0),
    "haze.density_variation": (0.0, 0.0),
    # Network.
    "network.type": "corun",
    "network.stages": 4,
    "network.width": 30,
    "network.args": {},
    # Losses without what the paper does not have.
    "loss.perceptual": "vgg19",
    "loss.scattering_weight": 0.01,
    "loss.contrastive_weight": 1.0,
    "loss.transmission": 0.0,
    # Optimiser.
    "optim.ema": 0.999,
    "optim.clip_norm": 0.0,
    "optim.precision": "fp32",
    "optim.warmup_steps": 0,
    "optim.cycles": (),
    "train.accumulate": 1,
    "cluster.workers": 4,
    # Validation: every 5,000 steps of pre-training, and at the end of Colabator.
    "train.validate_every": 5_000,
    "train.validation_metrics": ("brisque", "nima"),
    "train.best": None,
}

PRETRAINING = BOTH | {
    "kind": "pretrain",
    "data.random_resize": False,
    "network.init": None,
    "network.start": "published",
    "loss.pixel_weight": 1.0,
    "loss.perceptual_weight": 0.0,
    "optim.lr": 1e-4,
    "optim.min_lr": 1e-4,
    "optim.schedule_steps": 30_000,
    "train.steps": 30_000,
    "train.batch_per_worker": 2,
    "train.progressive": (),
}

COLABATOR = BOTH | {
    "kind": "colabator",
    "data.hazy": "data/urhi",
    "data.random_resize": True,
    "network.init": "models:/corun-pretrained@champion",
    "network.start": "closed_form",
    "loss.pixel_weight": 5.0,
    "loss.perceptual_weight": 0.2,
    "loss.haze_density_weight": 0.0,
    "optim.lr": 5e-5,
    "optim.min_lr": 1e-6,
    "optim.schedule_steps": 50_000,
    "train.steps": 5_000,
    "train.batch_per_worker": 1,
    "coherence.clarity": "daclip",
    "coherence.degradations": ("hazy",),
    "coherence.antialias": False,
    "coherence.quality": "musiq",
    "coherence.quality_range": None,
    "coherence.block_px": 32,
    "coherence.combine": "addition",
    "coherence.precision": "auto",
    "pool.encoding": "float32",
}

OURS = {
    # Where things are, and what they are called.
    *("name", "seed", "storage", "loss.weights", "coherence.weights", "train.validation_weights"),
    *("tracking.uri", "tracking.experiment", "tracking.register"),
    *("data.validation.match", "data.validation.match_clear", "data.validation.crop_truth"),
    # How the work is laid out, and what is shown of it.
    *("cluster.gpus_per_worker", "cluster.cpus_per_worker", "cluster.data_cpus", "cluster.max_failures"),
    *("cluster.resize_every_s", "data.cache_mib", "data.max_bad_fraction", "data.synthesis", "optim.compile"),
    *("network.checkpoint_activations", "coherence.chunk_images", "coherence.share_blocks", "coherence.gpu"),
    *("pool.shards", "pool.memory_mib"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.validation_images"),
}
"""Keys that change nothing of what a model learns."""


@pytest.mark.parametrize(("name", "published"), [("paper_pretrain", PRETRAINING), ("paper_colabator", COLABATOR)])
def test_every_key_of_a_paper_job_is_as_published_or_changes_nothing(name: str, published: dict[str, Any]) -> None:
    resolved = dict(list_leaves(load_jobs(Path(f"jobs/{name}.yaml"), env={})[0].model_dump()))
    assert {key: resolved[key] for key in published} == published
    assert resolved.keys() - published.keys() - OURS == set()


def list_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List the keys of a job that hold no section, as `section.key`, with their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from list_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
