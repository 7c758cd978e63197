"""Hold the data pipeline against the published formulae: strong view, noise, JPEG and resizing.

Draws the published formulae and ours equally often, and measures real photographs at the patch size both ways:

    python docs/evidence/as_published.py PHOTOGRAPHS
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from corun_ray.core.choices import ResizeKind
from corun_ray.core.data.augment import apply_jpeg, resize, sample_noise, sample_strong_operations
from corun_ray.core.data.images import ImageU8, decode_image
from corun_ray.core.data.samples import make_real_views

NUM_DRAWS = 20_000
PATCH_PX = 288
QUALITIES = (30, 60, 75, 90)
RESIZES: tuple[ResizeKind, ...] = ("area", "cubic")


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    arguments = parser.parse_args()

    compare_draws(np.random.default_rng(0))

    photographs = [decode_image(path.read_bytes()) for path in sorted(arguments.photographs.iterdir())]
    compare_jpeg(photographs)
    compare_resizing(photographs)


# --- Random draws ---


def compare_draws(rng: np.random.Generator) -> None:
    """Print how often each strength of the strong view comes, and how correlated noise is."""
    # Of the published strong view, only the strengths are drawn: the choice of the operation is the same.
    blur = Counter(rng.choice([1, 3, 5], NUM_DRAWS, p=[0.404, 0.404, 0.192]).tolist())
    bits = Counter(rng.choice([4, 5, 6, 7], NUM_DRAWS).tolist())
    ours: dict[str, list[float]] = {"blur": [], "posterize": []}
    while min(map(len, ours.values())) < NUM_DRAWS:
        for operation, strength in sample_strong_operations(rng):
            if operation.__name__ in ours:
                ours[operation.__name__].append(strength)

    print(f"\n{NUM_DRAWS:,} draws\n\n| | published | ours |\n| --- | --- | --- |")
    for name, published in (("blur", blur), ("posterize", bits)):
        mine = Counter(ours[name][:NUM_DRAWS])
        for strength in sorted(published | mine):
            shares = (counts[strength] / NUM_DRAWS for counts in (published, mine))
            print(f"| {name} {strength:g} | {' | '.join(f'{share:.3f}' for share in shares)} |")

    theirs, mine = draw_published_covariances(rng), draw_our_covariances(rng)
    for name, measure in (("deviation", mean_deviation), ("correlation of channels", mean_correlation)):
        print(f"| correlated noise, {name} | {measure(theirs):.3f} | {measure(mine):.3f} |")


def draw_published_covariances(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the covariances of correlated noise, `N 3 3` in levels of 255, by the published formula."""
    found = []
    for _ in range(NUM_DRAWS):
        basis = scipy.linalg.orth(rng.uniform(size=(3, 3)))
        covariance = np.abs(25**2 * basis.T @ np.diag(rng.uniform(size=3)) @ basis)

        # numpy's normal distribution takes the singular values of a matrix that is no covariance.
        _, variances, axes = np.linalg.svd(covariance)
        found.append(axes.T @ np.diag(variances) @ axes)
    return np.array(found)


def draw_our_covariances(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw as many covariances of our correlated noise."""
    found: list[NDArray] = []
    while len(found) < NUM_DRAWS:
        mixing = sample_noise(rng)
        # The other kinds mix one image, or each channel by itself.
        if mixing.shape == (3, 3) and np.count_nonzero(mixing) > 3:
            found.append(mixing.T @ mixing * 255**2)
    return np.array(found)


def mean_deviation(covariances: NDArray[np.float64]) -> float:
    """Return the mean standard deviation of a channel."""
    return float(np.sqrt(np.einsum("nii->ni", covariances)).mean())


def mean_correlation(covariances: NDArray[np.float64]) -> float:
    """Return the mean correlation of two channels."""
    deviations = np.sqrt(np.einsum("nii->ni", covariances))
    correlations = covariances / deviations[:, :, None] / deviations[:, None, :]
    return float(correlations[:, *np.triu_indices(3, 1)].mean())


# --- Photographs ---


def compare_jpeg(photographs: Sequence[ImageU8]) -> None:
    """Print the 8 px grid that JPEG leaves in a patch: steps between pixels on the grid, against others."""
    rng = np.random.default_rng(0)
    print(f"\nJPEG grid on patches of {len(photographs)} photographs, 1: none\n")
    print("| quality | on the photograph, as published | ours | on the patch |\n| --- | --- | --- | --- |")
    for quality in QUALITIES:
        published = [resize(apply_jpeg(image, quality), PATCH_PX, PATCH_PX, "cubic") for image in photographs]
        ours = [make_real_views(image, rng, patch_px=PATCH_PX, jpeg_quality=quality).weak for image in photographs]
        patches = [apply_jpeg(resize(image, PATCH_PX, PATCH_PX), quality) for image in photographs]
        cells = (f"{np.mean([blockiness(patch) for patch in way]):.2f}" for way in (published, ours, patches))
        print(f"| {quality} | {' | '.join(cells)} |")


def blockiness(patch: ImageU8) -> float:
    """Compute the mean step across borders of 8 px blocks, against that between other pixels."""
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(patch.astype(float), axis=axis)).mean((1 - axis, 2))
        at_border = np.arange(len(steps)) % 8 == 7
        ratios.append(steps[at_border].mean() / steps[~at_border].mean())
    return float(np.mean(ratios))


def compare_resizing(photographs: Sequence[ImageU8]) -> None:
    """Print the fine detail of patches, and of the photographs at their own size."""
    print("\nFine detail: standard deviation of the Laplacian\n\n| | |\n| --- | --- |")
    print(f"| photographs | {np.mean([detail(image) for image in photographs]):.1f} |")
    for method in RESIZES:
        patches = [resize(image, PATCH_PX, PATCH_PX, method) for image in photographs]
        print(f"| {method} | {np.mean([detail(patch) for patch in patches]):.1f} |")


def detail(image: ImageU8) -> float:
    """Compute the standard deviation of an image's Laplacian, in levels."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), -1).std())


if __name__ == "__main__":
    main()
