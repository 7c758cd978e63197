"""Image quality by the no-reference metrics of pyiqa, from weights on this machine and as data only."""

import torch
from torch import Tensor, nn

from corun_ray.core.metrics.catalog import list_no_reference_metrics
from corun_ray.core.metrics.pyiqa import build_metric, get_file_name
from corun_ray.core.scoring.scorers import Scorer
from corun_ray.core.weights import WeightsSource


class IqaScorer(nn.Module):
    """Quality of images by one metric: `B 3 H W` RGB in [0, 1] to `B` float32 in [0, 1], higher is better.

    `worst` and `best` are the metric's own scores that become 0 and 1; scores beyond them are clamped. An image
    that the metric cannot rate, such as a flat one whose statistics are undefined, scores 0. Computed in float32
    also under autocast, `chunk_images` at a time, without gradients.
    """

    def __init__(self, name: str, metric: nn.Module, worst: float, best: float, chunk_images: int = 64) -> None:
        super().__init__()
        self.name, self.metric, self.chunk_images = name, metric, chunk_images
        self.worst, self.best = worst, best

    def forward(self, images: Tensor) -> Tensor:
        quality = (self.compute_raw(images) - self.worst) / (self.best - self.worst)
        return quality.clamp(0, 1).nan_to_num(0.0)

    def compute_raw(self, images: Tensor) -> Tensor:
        """The metric's own scores, `B` float32; NaN where it is undefined."""
        return torch.cat([self._or_nan(chunk) for chunk in images.split(self.chunk_images)])

    @torch.no_grad()
    def rate(self, images: Tensor) -> Tensor:
        """The metric's own scores of one chunk, `B` float32; raises whatever the metric raises.

        Raises `ValueError` for a metric that does not give one number an image.
        """
        with torch.autocast(images.device.type, enabled=False):
            scores = self.metric(images.float())
        if scores.numel() != len(images):
            raise ValueError(f"{scores.numel()} scores for {len(images)} images")
        return scores.reshape(-1).float()

    def _or_nan(self, images: Tensor) -> Tensor:
        # Several metrics raise, for the whole batch, where the statistics of one image are undefined.
        try:
            return self.rate(images)
        except (AssertionError, torch.linalg.LinAlgError):
            if len(images) == 1:
                return torch.full((1,), torch.nan, device=images.device)
            return torch.cat([self._or_nan(image) for image in images.split(1)])


def load_quality(
    name: str, weights: WeightsSource, score_range: tuple[float, float] | None = None, chunk_images: int = 64
) -> IqaScorer:
    """The pyiqa metric `name` as a scorer, with the files that it needs from `weights`.

    `score_range` are the metric's worst and best score; None takes pyiqa's own range and direction. Raises
    `ValueError` for an unknown name, or where pyiqa gives no range, and `WeightsError` where the weights are
    missing, hold anything but plain tensors, or leave a part of the network without values.
    """
    if name not in list_no_reference_metrics():
        raise ValueError(f"{name!r} is no metric of pyiqa that rates single images")
    worst, best = score_range or _own_range(name)
    return IqaScorer(name, build_metric(name, lambda url: weights(get_file_name(url))), worst, best, chunk_images)


def probe_scorer(scorer: Scorer, *sides_px: int) -> None:
    """Tries a scorer on two random images of each side.

    Raises `ValueError` where it fails, does not give one number an image, or gives one that is not finite.
    """
    rate = scorer.rate if isinstance(scorer, IqaScorer) else scorer
    name = scorer.name if isinstance(scorer, IqaScorer) else "the scorer"
    for side_px in sides_px:
        images = torch.rand(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
        try:
            scores = rate(images)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{name} cannot rate {side_px} px images ({reason})") from None
        if scores.shape != (2,) or not scores.isfinite().all():
            raise ValueError(f"{name} cannot rate {side_px} px images (it gives {scores.tolist()} for two)")


def _own_range(name: str) -> tuple[float, float]:
    facts = list_no_reference_metrics()[name]
    if facts.low is None or facts.high is None:
        raise ValueError(f"score_range: missing (pyiqa gives {name} no range)")
    return (facts.high, facts.low) if facts.lower_better else (facts.low, facts.high)
