"""The label pool's record and rule."""

import numpy as np
import pytest

from corun_ray.core.choices import Encoding
from corun_ray.core.training.labels import Label, LocalPool, Scores, decode, encode, supersedes


def label(key: str, clarity: float, quality: float, step: int = 0) -> Label:
    array = np.full((3, 2, 2), step, np.float32)
    return Label(key, Scores(clarity, quality), step, array, None, array[0], array[0])


@pytest.mark.parametrize(
    ("encoding", "bytes_each", "bound"), [("uint8", 1, 0.5 / 255), ("float16", 2, 2**-12), ("float32", 4, 0)]
)
def test_encodings_keep_their_precision(encoding: Encoding, bytes_each: int, bound: float) -> None:
    unit = np.random.default_rng(0).uniform(0, 1, (3, 40, 50)).astype(np.float32)
    unit.flat[:3] = 0, 1, 0.5
    stored = encode(unit, encoding)
    assert stored.dtype == encoding and stored.nbytes == bytes_each * unit.size
    back = decode(stored)
    assert back.dtype == np.float32 and back.shape == unit.shape
    assert np.abs(back - unit).max() <= bound + 1e-7 * (bound > 0)
    assert back.min() == 0 and back.max() == 1


def test_uint8_rounds_to_the_nearest_level_and_clips() -> None:
    unit = np.array([-0.2, 0.0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 1.3], np.float32)
    assert encode(unit, "uint8").tolist() == [0, 0, 0, 1, 255, 255]
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(encode(decode(levels), "uint8"), levels)


@pytest.mark.parametrize(
    ("candidate", "enters"),
    [
        ((0.5, 0.5), True),  # a tie is at least as good
        ((0.6, 0.5), True),
        ((0.5, 0.6), True),
        ((0.6, 0.6), True),
        ((0.9, 0.4999), False),
        ((0.4999, 0.9), False),
        ((0.0, 0.0), False),
    ],
)
def test_both_scores_must_be_at_least_as_good(candidate: tuple[float, float], enters: bool) -> None:
    assert supersedes(Scores(*candidate), Scores(clarity=0.5, quality=0.5)) is enters


def test_the_first_candidate_enters_however_bad() -> None:
    assert supersedes(Scores(0.0, 0.0), None)


def test_a_pool_holds_what_the_rule_says_after_a_thousand_offers() -> None:
    random = np.random.default_rng(1)
    pool = LocalPool()
    history: dict[str, list[Label]] = {}
    for step in range(250):
        # Five levels and few keys, so that ties and repeats within one offer are frequent.
        drawn = zip(random.integers(7, size=4), random.integers(5, size=(4, 2)) / 4, strict=True)
        batch = [label(f"k{key}", scores[0], scores[1], 4 * step + i) for i, (key, scores) in enumerate(drawn)]
        pool.offer(batch)
        for offered in batch:
            history.setdefault(offered.key, []).append(offered)
    assert pool.labels.keys() == history.keys()
    replaced = 0
    for key, offers in history.items():
        kept = offers[0]
        for offered in offers[1:]:
            gains = np.subtract(offered.scores, kept.scores)
            if not (gains < 0).any():
                kept = offered
                replaced += 1
        assert pool.labels[key] is kept
    assert replaced > 20


def test_prefetch_answers_in_the_order_of_the_keys() -> None:
    first, second = label("a", 0.1, 0.2), label("b/a", 0.3, 0.4)
    pool = LocalPool([first])
    pending = pool.prefetch(["b/a", "a", "b/a"])
    assert pending.result() == [None, first, None]
    pool.offer([second])
    assert pool.prefetch(["b/a", "a", "b/a"]).result() == [second, first, second]
    assert pending.result() == [None, first, None]
