"""Image quality by the no-reference metrics of pyiqa, whose weights are read from this machine as data only."""

import torch
from torch import Tensor, nn

from corun_ray.core.choices import ScorerPrecision
from corun_ray.core.errors import format_error
from corun_ray.core.metrics.catalog import list_no_reference_metrics
from corun_ray.core.metrics.pyiqa import build_metric, get_file_name
from corun_ray.core.scoring.arithmetic import Capture, Graphs, use_precision
from corun_ray.core.scoring.scorers import Scorer
from corun_ray.core.weights import WeightsSource

PROBE_IMAGES = 2


class IqaScorer(nn.Module):
    """The quality of images by one metric: `B 3 H W` RGB in [0, 1] to `B` float32 in [0, 1], higher is better.

    An image that the metric cannot rate, such as a flat one whose statistics are undefined, scores 0. Scores are
    computed without gradients and, also under autocast, in float32, unless `precision` is another.
    """

    def __init__(self, name: str, metric: nn.Module, worst: float, best: float, chunk_images: int = 64) -> None:
        """Wrap a metric of pyiqa.

        The metric's own scores `worst` and `best` become 0 and 1, and scores beyond them are clamped. `chunk_images`
        are rated at a time.
        """
        super().__init__()
        self.name, self.metric, self.chunk_images = name, metric, chunk_images
        self.worst, self.best = worst, best
        self.precision: ScorerPrecision = "auto"
        self._graphs: Graphs | None = None

    def use_graphs(self, capture: Capture) -> None:
        """Replay the metric for shapes that come again; see `Graphs`."""
        self._graphs = Graphs(self.name, self.metric, capture)

    def forward(self, images: Tensor) -> Tensor:
        """Rate images, with `B` scores in [0, 1].

        An undefined score becomes 0.
        """
        quality = (self.compute_raw(images) - self.worst) / (self.best - self.worst)
        return quality.clamp(0, 1).nan_to_num(0.0)

    def compute_raw(self, images: Tensor) -> Tensor:
        """Compute the metric's own scores, `B` float32.

        A score is NaN where the metric is undefined.
        """
        return torch.cat([self._rate_or_nan(chunk) for chunk in images.split(self.chunk_images)])

    @torch.no_grad()
    def rate(self, images: Tensor) -> Tensor:
        """Compute the metric's own scores of one chunk, `B` float32.

        Raises whatever the metric raises, and `ValueError` where it does not give one number for each image.
        """
        compute = self._graphs or self.metric
        with use_precision(self.precision, images.device):
            scores = compute(images.float())

        if scores.numel() != len(images):
            raise ValueError(f"{scores.numel()} scores for {len(images)} images")
        return scores.reshape(-1).float()

    def _rate_or_nan(self, images: Tensor) -> Tensor:
        """Compute the metric's own scores of one chunk.

        A score is NaN where the metric is undefined.
        """
        # Several metrics raise for the whole batch where the statistics of one image are undefined. Rate the images
        # one by one then, so that the others keep their scores.
        try:
            return self.rate(images)
        except (AssertionError, torch.linalg.LinAlgError):
            if len(images) == 1:
                return torch.full((1,), torch.nan, device=images.device)
            return torch.cat([self._rate_or_nan(image) for image in images.split(1)])


def load_quality(
    name: str, weights: WeightsSource, score_range: tuple[float, float] | None = None, chunk_images: int = 64
) -> IqaScorer:
    """Load a metric of pyiqa as a scorer.

    The files that it needs come from `weights`. `score_range` holds the metric's worst and best score; None takes range
    and direction from pyiqa.

    Raises `ValueError` for an unknown name, or where pyiqa gives no range. Raises `WeightsError` where the weights are
    missing, hold anything but plain tensors, or leave a part of the network without values.
    """
    if name not in list_no_reference_metrics():
        raise ValueError(f"{name!r} is no metric of pyiqa that rates single images")

    worst, best = _get_range(name) if score_range is None else score_range
    metric = build_metric(name, lambda url: weights(get_file_name(url)))
    return IqaScorer(name, metric, worst, best, chunk_images)


def probe_scorer(scorer: Scorer, *sides_px: int) -> None:
    """Try a scorer on two random images of each side.

    Raises `ValueError` where it fails, does not give one number for each image, or gives one that is not finite.
    """
    # An `IqaScorer` would turn errors and NaN into scores of 0, so ask its metric.
    rate, name = scorer, "the scorer"
    if isinstance(scorer, IqaScorer):
        rate, name = scorer.rate, scorer.name

    for side_px in sides_px:
        shape = (PROBE_IMAGES, 3, side_px, side_px)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        try:
            scores = rate(images)
        except Exception as error:
            raise ValueError(f"{name} cannot rate {side_px} px images ({format_error(error)})") from None

        if scores.shape != (PROBE_IMAGES,) or not scores.isfinite().all():
            raise ValueError(f"{name} cannot rate {side_px} px images (it gives {scores.tolist()} for two)")


def _get_range(name: str) -> tuple[float, float]:
    """Return the worst and best score that pyiqa states.

    Raises `ValueError` where pyiqa states none.
    """
    facts = list_no_reference_metrics()[name]
    if facts.low is None or facts.high is None:
        raise ValueError(f"score_range: missing (pyiqa gives {name} no range)")

    if facts.lower_better:
        return facts.high, facts.low
    return facts.low, facts.high
