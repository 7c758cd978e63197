"""The times of all-reduces by formula, against what can be worked out by hand and what torch itself says."""

import random

import pytest

from corun_ray.bench.scaling import bench_backward, list_gradient_bytes
from corun_ray.bench.scaling_model import (
    MIB,
    Link,
    Topology,
    fit_link,
    predict_exposed_s,
    predict_ready_times_s,
    split_into_buckets,
)
from corun_ray.core.networks.corun import CORUN

INSIDE, BETWEEN = Link(1e-6, 100e9), Link(10e-6, 10e9)


def test_a_ring_within_a_node() -> None:
    layout = Topology(4, 8, INSIDE, BETWEEN)
    # Reduce-scatter and all-gather: three messages each, of a quarter of the data.
    assert layout.nodes == 1 and layout.predict_ring_s(1_000_000) == pytest.approx(6 * (1e-6 + 250_000 / 100e9))


def test_a_ring_through_nodes_goes_at_the_pace_of_the_narrowest_link() -> None:
    layout = Topology(16, 8, INSIDE, BETWEEN)
    assert layout.predict_ring_s(0) == pytest.approx(28 * 1e-6 + 2 * 10e-6)
    assert layout.predict_ring_s(16_000_000) - layout.predict_ring_s(0) == pytest.approx(30 * 1_000_000 / 10e9)


def test_a_tree_has_the_latency_of_its_depth() -> None:
    layout = Topology(64, 8, INSIDE, BETWEEN)
    assert layout.predict_tree_s(0) == pytest.approx(2 * (7 * 1e-6 + 3 * 10e-6))
    assert layout.predict_tree_s(9_000_000) - layout.predict_tree_s(0) == pytest.approx(2 * 9_000_000 / (0.9 * 10e9))


def test_the_faster_of_both_is_taken() -> None:
    many = Topology(512, 8, INSIDE, BETWEEN)
    assert many.predict_all_reduce_s(MIB) == many.predict_tree_s(MIB) < many.predict_ring_s(MIB)
    few = Topology(16, 8, INSIDE, BETWEEN)
    assert few.predict_all_reduce_s(256 * MIB) == few.predict_ring_s(256 * MIB) < few.predict_tree_s(256 * MIB)
    assert Topology(1, 8, INSIDE, BETWEEN).predict_all_reduce_s(MIB) == 0


def test_a_bucket_is_closed_by_the_gradient_that_fills_it() -> None:
    assert split_into_buckets([4, 4, 4, 4, 4, 4, 4], first_bytes=5, cap_bytes=10) == [8, 12, 8]
    assert split_into_buckets([5, 10], first_bytes=5, cap_bytes=10) == [5, 10]


def test_buckets_are_those_of_ddp() -> None:
    """Of a real run of two processes, which says which buckets it made."""
    report = bench_backward(2, stages=2, width=30, size_px=32, repeats=1)
    assert len(report.buckets) == 3 and report.buckets == split_into_buckets(list_gradient_bytes(CORUN(2, 30)))
    assert min(report.alone_s, report.together_s) > 0


def test_only_the_last_bucket_shows_on_a_fast_link() -> None:
    ready_s = predict_ready_times_s([10, 40, 50], backward_s=2.0)
    assert ready_s == pytest.approx([0.2, 1.0, 2.0])
    assert predict_exposed_s([10, 40, 50], ready_s, lambda num_bytes: num_bytes / 100) == pytest.approx(0.5)


def test_on_a_slow_link_buckets_queue() -> None:
    # 10 from 0.2 to 1.2, 40 to 5.2, 50 to 10.2
    assert predict_exposed_s([10, 40, 50], [0.2, 1.0, 2.0], lambda num_bytes: num_bytes / 10) == pytest.approx(8.2)


def test_a_link_is_found_again_from_the_times_of_its_rings() -> None:
    link, noise = Link(50e-6, 2e9), random.Random(0)
    layout = Topology(4, 4, link, link)
    times_s = {size: layout.predict_ring_s(size) * noise.uniform(0.98, 1.02) for size in (4096, 65536, MIB, 16 * MIB)}
    found = fit_link(4, times_s)
    assert found.latency_s == pytest.approx(50e-6, rel=0.05) and found.bytes_per_s == pytest.approx(2e9, rel=0.05)
    with pytest.raises(ValueError, match="two sizes"):
        fit_link(4, {4096: 1.0})
