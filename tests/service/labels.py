"""Labels for tests of the pool."""

import numpy as np

from corun_ray.core.training.labels import Label, Scores, encode


def label(key: str, clarity: float = 0.5, quality: float = 0.5, step: int = 0) -> Label:
    """A small label whose pixels tell its step."""
    fill = np.full((3, 8, 8), step % 256, np.uint8)
    blocks = np.full((1, 1), 0.5, np.float32)
    return Label(key, Scores(clarity, quality), step, fill, fill[:1], blocks, blocks)


def photo_label(key: str, encoding="uint8", transmission: bool = True, step: int = 7) -> Label:
    """A label with a picture of 16 x 24 px and 2 x 3 blocks."""
    rng = np.random.default_rng(sum(key.encode()))
    image = encode(rng.uniform(0, 1, (4, 16, 24)).astype(np.float32), encoding)
    blocks = rng.uniform(0, 1, (2, 2, 3)).astype(np.float32)
    return Label(key, Scores(0.25, 0.75), step, image[:3], image[3:] if transmission else None, blocks[0], blocks[1])


def assert_equal(one: Label, other: Label) -> None:
    """Bit for bit."""
    assert (one.key, one.scores, one.step) == (other.key, other.scores, other.step)
    for name in ("scene", "transmission", "block_clarity", "block_quality"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None and theirs is None) or (mine.dtype == theirs.dtype and np.array_equal(mine, theirs)), name
