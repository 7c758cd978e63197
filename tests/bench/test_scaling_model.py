"""The step on many GPUs by formula: its parts against simulations and what can be worked out by hand."""

import dataclasses

import numpy as np
import pytest

from corun_ray.bench.scaling_model import (
    SHARD_S_PER_LABEL,
    Link,
    PoolModel,
    Topology,
    WorkerStep,
    count_label_bytes,
    count_stream_cores,
    estimate_fullest_bin,
    estimate_most_wins,
    predict_step,
)
from corun_ray.core.training.labels import Label, Scores, encode

ALONE = WorkerStep(step_s=0.3, backward_s=0.12, before_labels_s=0.06, rating_s=0.2)
BUCKETS = [2**20, 25 * 2**20, 19 * 2**20]


def layout(workers: int, link_gbit: float = 100) -> Topology:
    return Topology(workers, 8, Link(4e-6, 235e9), Link(14e-6, link_gbit * 1e9 / 8))


@pytest.mark.parametrize("encoding", ["uint8", "float16", "float32"])
def test_a_label_weighs_what_it_says(encoding) -> None:
    planes, blocks = encode(np.zeros((4, 96, 96), np.float32), encoding), np.zeros((3, 3), np.float32)
    label = Label("one", Scores(0, 0), 0, planes[:3], planes[3:], blocks, blocks)
    assert count_label_bytes(96, encoding) == label.size_bytes


@pytest.mark.parametrize(("workers", "images", "rate"), [(1, 4, 0.3), (8, 1, 0.1), (64, 1, 0.1), (64, 8, 0.1)])
def test_the_most_winners_of_any_worker(workers: int, images: int, rate: float) -> None:
    drawn = np.random.default_rng(0).binomial(images, rate, (20_000, workers)).max(1).mean()
    assert estimate_most_wins(workers, images, rate) == pytest.approx(drawn, rel=0.02)


def test_no_or_all_candidates_win() -> None:
    assert estimate_most_wins(64, 4, 0.0) == 0 and estimate_most_wins(64, 4, 1.0) == pytest.approx(4)


@pytest.mark.parametrize(("items", "bins"), [(512, 8), (4096, 64), (64, 1)])
def test_the_fullest_bin(items: int, bins: int) -> None:
    drawn = np.random.default_rng(0).multinomial(items, np.full(bins, 1 / bins), 2000).max(1).mean()
    assert estimate_fullest_bin(items, bins) == pytest.approx(drawn, rel=0.1)


def test_a_shard_answers_one_after_the_other() -> None:
    pool = PoolModel(count_label_bytes(288, "uint8"))
    assert pool.predict_answers_s(layout(64), images=1) == pytest.approx(64 * SHARD_S_PER_LABEL)
    needed = pool.find_shards_needed(layout(512), 1, within_s=0.1)
    assert needed is not None and pool.predict_answers_s(layout(512), 1, needed) <= 0.1 < pool.predict_answers_s(
        layout(512), 1, needed - 1
    )


def test_labels_go_at_the_pace_of_a_nodes_link() -> None:
    pool, slow = PoolModel(1_000_000), layout(64, link_gbit=1)
    assert pool.predict_answers_s(slow, images=1) == pytest.approx(64 * 1_000_000 / 125e6)
    assert pool.find_shards_needed(slow, 1, within_s=0.001) is None
    assert pool.predict_answers_s(dataclasses.replace(slow, workers=8), 1) == pytest.approx(8 * SHARD_S_PER_LABEL)


def test_one_worker_loses_nothing() -> None:
    step = predict_step(ALONE, PoolModel(332_424), layout(1), BUCKETS)
    assert step.efficiency == pytest.approx(1) and step.costs == [] and step.all_reduce_s == 0


def test_each_wait_is_told_and_the_step_is_their_sum() -> None:
    step = predict_step(ALONE, PoolModel(332_424), layout(512), BUCKETS)
    assert step.costs[0] == "pool" and "rating" in step.costs
    mean_rating_s = ALONE.rating_s * 0.1
    waits_s = step.exposed_s + step.pool_wait_s + step.rating_wait_s
    assert step.step_s == pytest.approx(ALONE.step_s + mean_rating_s + waits_s)
    assert step.efficiency == pytest.approx((ALONE.step_s + mean_rating_s) / step.step_s)
    assert step.label_bytes_per_s == pytest.approx(512 * 1.1 * 332_424 / step.step_s)


def test_the_shards_that_are_needed_end_the_wait() -> None:
    needed = predict_step(ALONE, PoolModel(332_424), layout(512), BUCKETS).shards_needed
    assert needed is not None
    assert predict_step(ALONE, PoolModel(332_424, needed), layout(512), BUCKETS).pool_wait_s == 0


def test_more_images_a_worker_even_winners_out() -> None:
    many = dataclasses.replace(ALONE, step_s=8 * 0.3, backward_s=8 * 0.12, before_labels_s=8 * 0.06, images=8)
    one, eight = (predict_step(alone, PoolModel(332_424, shards=8), layout(64), BUCKETS) for alone in (ALONE, many))
    assert one.costs[0] == eight.costs[0] == "rating" and eight.efficiency > one.efficiency + 0.1


def test_workers_that_rate_together_wait_for_the_mean() -> None:
    alone, shared = (
        predict_step(ALONE, PoolModel(332_424, 8, shares_blocks=shares), layout(64), BUCKETS)
        for shares in (False, True)
    )
    assert alone.costs[0] == "rating" and "rating" not in shared.costs and shared.rating_wait_s == 0
    assert shared.step_s == pytest.approx(alone.step_s - alone.rating_wait_s)


def test_pretraining_waits_for_gradients_alone() -> None:
    step = predict_step(ALONE, None, layout(512, link_gbit=10), BUCKETS)
    assert step.costs == ["gradients"] and step.pool_wait_s == step.rating_wait_s == step.label_bytes_per_s == 0
    assert step.efficiency == pytest.approx(ALONE.step_s / (ALONE.step_s + step.exposed_s))


def test_cores_for_the_stream() -> None:
    assert count_stream_cores(512, 2, step_s=0.3, samples_per_s=36) == 95
