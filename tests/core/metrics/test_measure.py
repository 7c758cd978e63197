"""Measuring pictures: each value is that of its judge, the authors' program or the library; refusals have reasons."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.restore import to_tensor
from corun_ray.core.metrics.catalog import list_metrics, list_no_reference_metrics
from corun_ray.core.metrics.measure import Unmeasured, load_measure
from corun_ray.core.metrics.pyiqa import build_metric
from corun_ray.core.weights import WeightsError, refuse_weights
from tests import DATA
from tests.core.metrics.test_fade import read_scores
from tests.core.metrics.test_pyiqa import real

__all__ = ["real"]


def photographs() -> dict[str, np.ndarray]:
    return {
        name: decode_image((DATA / "fade" / name).read_bytes()) for name in read_scores(DATA / "fade" / "official.tsv")
    }


def test_fade_is_the_authors_image_by_image():
    measure = load_measure("fade", refuse_weights)
    found = {name: measure(to_tensor(image), None) for name, image in photographs().items()}
    assert found == pytest.approx(read_scores(DATA / "fade" / "official.tsv"), rel=0.01)


def test_psnr_and_ssim_are_the_usual_ones_image_by_image():
    psnr, ssim = load_measure("psnr", refuse_weights), load_measure("ssim", refuse_weights)
    rng = np.random.default_rng(0)
    for image in photographs().values():
        truth = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
        pair = to_tensor(image), to_tensor(truth)
        assert psnr(*pair) == pytest.approx(peak_signal_noise_ratio(truth, image), abs=1e-3)
        expected = structural_similarity(
            truth, image, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert ssim(*pair) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", ["brisque", "niqe"])
def test_other_metrics_are_pyiqas_image_by_image(name, real):
    measure = load_measure(name, real)
    judge = build_metric(name, lambda url: real(Path(url).name))
    for image in photographs().values():
        assert measure(to_tensor(image), None) == pytest.approx(judge(to_tensor(image)).item(), rel=1e-5)


def test_a_full_reference_metric_of_pyiqa_takes_the_truth():
    measure = load_measure("gmsd", refuse_weights)
    image = to_tensor(next(iter(photographs().values())))
    assert measure(image, image) == pytest.approx(0, abs=1e-6)
    assert measure(image, image.flip(3)) > 0.05


def test_what_cannot_be_measured_has_a_reason():
    image = torch.rand(1, 3, 40, 40)
    with pytest.raises(Unmeasured, match="no truth"):
        load_measure("psnr", refuse_weights)(image, None)
    with pytest.raises(Unmeasured, match="another size .30 x 40 px, not 40 x 40"):
        load_measure("ssim", refuse_weights)(image, image[..., :30])
    with pytest.raises(Unmeasured, match="undefined"):
        load_measure("fade", refuse_weights)(torch.zeros(1, 3, 40, 40), None)
    with pytest.raises(WeightsError, match="musiq"):
        load_measure("musiq", refuse_weights)
    with pytest.raises(ValueError, match="no metric"):
        load_measure("beauty", refuse_weights)


def test_every_metric_says_whether_it_needs_a_truth_and_which_way_is_better():
    facts = list_metrics()
    assert list(facts)[:3] == ["psnr", "ssim", "fade"]
    assert facts.keys() > list_no_reference_metrics().keys()
    assert facts["lpips"].needs_truth and facts["lpips"].lower_better
    assert facts["psnr"].needs_truth and not facts["psnr"].lower_better
    assert not facts["niqe"].needs_truth and facts["niqe"].lower_better
