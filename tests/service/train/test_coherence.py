"""Pretrained scorers and loss networks in whole jobs: from a folder, from a bucket, and what is refused at once."""

import shutil

import boto3
import mlflow
import numpy as np
import pytest
import torch

from corun_ray.core.scoring.arithmetic import CannotCapture
from corun_ray.core.scoring.daclip import DACLIP_FILE
from corun_ray.core.training.losses import VGG_FILE, LaplacianFeatures
from corun_ray.core.weights import WeightsError
from corun_ray.service.check import check_job
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.coherence import build_coherence, build_losses, replay_scorers
from corun_ray.service.train.driver import prepare, run_training
from corun_ray.service.weights.folder import index_folder
from corun_ray.service.weights.needed import find_needed_files, open_weights
from tests import DATA
from tests.core.metrics.test_pyiqa import BRISQUE_FILE, NIQE_FILE, add_noise, blur, photographs
from tests.core.scoring.test_daclip import published
from tests.core.training.test_vgg import random_weights
from tests.service.jobs import small_job


def tiny_clip():
    """open_clip's CLIP with a small tower and the true vocabulary."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=49408, width=64, heads=1, layers=1)
    return CLIP(32, vision, text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights folder: the real parameters of BRISQUE and NIQE, VGG-19 and a small DA-CLIP with random ones."""
    root = tmp_path_factory.mktemp("weights")
    with np.load(DATA / "iqa" / "brisque_svm.npz") as svm:
        torch.save((torch.from_numpy(svm["sv_coef"]), torch.from_numpy(svm["sv"])), root / BRISQUE_FILE)
    shutil.copy(DATA / "iqa" / NIQE_FILE, root)
    torch.save(random_weights(), root / VGG_FILE)
    torch.save(published(tiny_clip()), root / DACLIP_FILE)
    index_folder(str(root))
    return root


@pytest.fixture(scope="module")
def bucket(s3_server, folder):
    client = boto3.client("s3")
    client.create_bucket(Bucket="scorers")
    for path in folder.iterdir():
        client.upload_file(str(path), "scorers", f"weights/{path.name}")
    return "s3://scorers/weights"


def job_with(dataset, tmp_path, weights, **coherence):
    return small_job("colabator", dataset, tmp_path, coherence={"weights": weights and str(weights), **coherence})


def test_reference_rates_both_and_needs_no_weights(dataset, tmp_path):
    job = job_with(dataset, tmp_path, None, clarity="reference", block_px=16)
    assert job.coherence.quality == "reference" and not find_needed_files(job)
    coherence = build_coherence(job.coherence, open_weights(None))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert coherence.score_blocks(images, images).quality.shape == (2, 2, 3)


@pytest.mark.parametrize("metric", ["brisque", "niqe"])
def test_a_folder_and_a_bucket_rank_photographs_the_same_way(metric, folder, bucket, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("CORUN_WEIGHTS_CACHE", str(tmp_path / "cache"))
    images = torch.cat([photographs(192), add_noise(photographs(192)), blur(photographs(192))])
    scores = []
    for place in (folder, bucket):
        section = job_with(dataset, tmp_path, place, quality=metric).coherence
        quality = build_coherence(section, open_weights(section.weights)).score_images(images, images).quality
        assert quality.unique().numel() == len(images), "without ties a ranking says something"
        scores.append(quality)
    assert torch.equal(*scores)
    assert [path.name for path in (tmp_path / "cache").rglob("*.*") if not path.name.endswith(".lock")]


def test_the_precision_reaches_the_networks_that_stand_it(folder, dataset, tmp_path):
    sections = [
        job_with(dataset, tmp_path, folder, clarity="daclip", quality="brisque", **keys).coherence
        for keys in ({}, {"precision": "bf16"})
    ]
    usual, half = (build_coherence(section, open_weights(section.weights)) for section in sections)
    assert (usual.clarity.precision, half.clarity.precision) == ("auto", "bf16")
    assert half.quality.precision == "auto", "no network: its statistics need all digits"
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    difference = (half.clarity(images) - usual.clarity(images)).abs()
    assert 0 < difference.max() < 0.05


def test_scorers_are_captured_before_the_first_step(folder, dataset, tmp_path):
    cluster = {"workers": 1, "gpus_per_worker": 1}
    coherence = {"weights": str(folder), "clarity": "daclip", "quality": "brisque", "gpu": ["graphs"], "block_px": 32}
    section = small_job("colabator", dataset, tmp_path, coherence=coherence, cluster=cluster).coherence
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = build_coherence(section, open_weights(section.weights))
    shapes = []

    def capture(function, given):
        shapes.append(tuple(given.shape))
        return function

    coherence = build_coherence(section, open_weights(section.weights))
    replay_scorers(coherence, images, capture)
    assert shapes == [(2, 3, 64, 64), (4, 3, 32, 32)], "whole images, and the blocks of one winner"
    assert torch.equal(coherence.score_blocks(images, images).clarity, plain.score_blocks(images, images).clarity)

    def refuse(function, given):
        raise RuntimeError("no graph")

    with pytest.raises(
        CannotCapture, match="^coherence.gpu: graphs: daclip cannot be replayed as a CUDA graph .no graph"
    ):
        replay_scorers(build_coherence(section, open_weights(section.weights)), images, refuse)


def test_a_wrong_checksum_is_refused_before_any_worker_starts(folder, dataset, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / BRISQUE_FILE).read_bytes())
    content[-100] ^= 1
    (damaged / BRISQUE_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{BRISQUE_FILE}: expected .* with SHA-256 .*, found"):
        prepare(job_with(dataset, tmp_path, damaged, quality="brisque"), tmp_path)


def test_what_is_missing_is_said_before_any_worker_starts(folder, dataset, tmp_path):
    job = job_with(dataset, tmp_path, folder, clarity="daclip", quality="musiq")
    with pytest.raises(WeightsError, match="musiq_koniq_ckpt-e95806b9.pth is not in .*weights.json"):
        prepare(job, tmp_path)
    assert find_needed_files(job) == {
        str(folder): {
            DACLIP_FILE: "coherence.clarity daclip",
            "musiq_koniq_ckpt-e95806b9.pth": "coherence.quality musiq",
        }
    }
    notes, mistakes = check_job(job, [])
    assert any(note.startswith("weights ") and DACLIP_FILE in note for note in notes)
    (mistake,) = mistakes
    assert mistake.startswith("weights: musiq_koniq_ckpt-e95806b9.pth (for coherence.quality musiq): missing")


@pytest.mark.parametrize("kind", ["pretrain", "colabator"])
def test_the_laplacian_features_need_no_weights(kind, tmp_path):
    job = small_job(kind, tmp_path, tmp_path, loss={"perceptual": "laplacian"})
    assert find_needed_files(job) == {}
    assert isinstance(build_losses(job, open_weights(None), None).features, LaplacianFeatures)


def test_a_scorer_that_cannot_rate_blocks_is_said_before_any_worker_starts(folder, dataset, tmp_path):
    with pytest.raises(WeightsError, match="coherence.quality: niqe cannot rate 32 px images"):
        prepare(job_with(dataset, tmp_path, folder, quality="niqe"), tmp_path)


def test_the_published_recipe_runs_in_full_from_a_bucket(local_ray, bucket, dataset, tmp_path):
    """DA-CLIP, a pyiqa metric, the VGG-19 terms and the haze-density term, several validation sets, two workers."""
    job = small_job(
        "colabator",
        dataset,
        tmp_path,
        data={
            "patch_px": 64,
            "rotation": True,
            "mixup": 1.2,
            "validation_sets": {"day": {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}},
        },
        network={"checkpoint_activations": True},
        coherence={"clarity": "daclip", "degradations": ["hazy", "rainy"], "quality": "brisque", "weights": bucket},
        loss={"perceptual": "vgg19", "weights": bucket, "haze_density_weight": 0.1},
        optim={"precision": "bf16", "warmup_steps": 2, "cycles": [{"steps": 3, "lr": 1e-3, "min_lr": 1e-4}]},
        train={"steps": 4, "batch_per_worker": 2, "checkpoint_every": 4, "log_every": 1, "validate_every": 4},
        cluster={"workers": 2},
        tracking={"register": "published"},
    )
    assert run_training(job, Console(), tmp_path) == "models:/published/1"
    client = mlflow.MlflowClient(f"sqlite:///{job.storage}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("corun").experiment_id])
    terms = ("pixel_synthetic", "pixel_real", "scattering", "perceptual", "contrastive", "haze_density")
    for name in (*(f"loss/{term}" for term in terms), "val/day/psnr", "val/day/fade"):
        assert np.isfinite(run.data.metrics[name]) and run.data.metrics[name] > 0, name
    # 4 steps of 4 images of 4 blocks each were either rated or saved.
    rated, saved = (run.data.metrics[f"coherence/block_ratings{part}"] for part in ("", "_saved"))
    assert rated + saved == 4 * 4 * 4 and rated >= 6 * 4
    rates = [metric.value for metric in client.get_metric_history(run.info.run_id, "optim/lr")]
    assert rates[0] < rates[1] and rates[-1] < rates[1], "warm-up, then the cosine"
