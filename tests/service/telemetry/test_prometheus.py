"""The metrics' declarations, and what is made of the values that the service measures anyway."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corun_ray.core.scoring.coherence import Coherence
from corun_ray.service.pool.client import ReadWaits
from corun_ray.service.pool.index import PoolCounters
from corun_ray.service.pool.shard import ShardTelemetry
from corun_ray.service.telemetry import prometheus
from corun_ray.service.telemetry.prometheus import DECLARED, Metric, MetricRecorder
from corun_ray.service.train.coherence import DeviceTimer, TimedCoherence
from corun_ray.service.train.follower import RunGauges
from corun_ray.service.train.meter import WorkerTelemetry

LABELS = {"job_name": "j", "kind": "colabator", "run": "j-1"}


@pytest.fixture
def recorded(monkeypatch):
    """Everything that is recorded: (name, value, the labels that are not the job's)."""
    found = []

    def ray_metric(self):
        def keep(value, labels):
            assert labels.keys() == set(self.labels), self.name
            found.append((self.name, value, {k: v for k, v in labels.items() if k not in LABELS}))

        return SimpleNamespace(inc=keep, set=keep, observe=keep)

    monkeypatch.setattr(Metric, "ray_metric", property(ray_metric))
    return found


def test_names_meanings_and_labels_follow_the_custom():
    for name, metric in DECLARED.items():
        assert re.fullmatch(r"corun_[a-z_]+", name) and not re.search(r"_(ms|mib|mb|count|info)\b", name)
        assert name.endswith("_total") == (metric.make is prometheus.metrics.Counter), name
        assert metric.meaning.endswith(".") and len(metric.meaning) > 15
        labels = set(metric.labels)
        assert "job_name" in labels and not labels & {"job", "instance", "image", "key", "step"}
    assert len(prometheus.STEP_BOUNDS_S) < 16


def test_totals_that_are_kept_elsewhere_are_counted_once(recorded):
    recorder = MetricRecorder(LABELS, shard="0")
    for total in (0, 3, 3, 5, 1, 4):  # 1: the counted process has restarted
        recorder.advance(prometheus.POOL_READS, total)
    recorder.add(prometheus.POOL_READS, 0)
    assert [value for _, value, _ in recorded] == [3, 2, 3]
    assert {tuple(labels.items()) for *_, labels in recorded} == {(("shard", "0"),)}


def test_each_label_has_a_total_of_its_own(recorded):
    recorder = MetricRecorder(LABELS, rank="1")
    recorder.advance(prometheus.LABEL_READS, 2, ready="yes")
    recorder.advance(prometheus.LABEL_READS, 1, ready="no")
    recorder.advance(prometheus.LABEL_READS, 3, ready="yes")
    assert [(value, labels["ready"]) for _, value, labels in recorded] == [(2, "yes"), (1, "no"), (1, "yes")]


def test_a_restored_shard_counts_on_without_what_was_counted_before(recorded):
    shard = ShardTelemetry(LABELS, 2)
    shard.report_restore(PoolCounters(labels=5, offers=40, wins=30, reads=90, hits=80))
    shard.report(PoolCounters(labels=6, resident_bytes=700, offers=41, wins=31, reads=92, hits=81))
    counted = {name: value for name, value, _ in recorded if name.endswith("_total")}
    assert counted == {
        "corun_pool_restores_total": 1,
        "corun_pool_offers_total": 1,
        "corun_pool_wins_total": 1,
        "corun_pool_reads_total": 2,
        "corun_pool_hits_total": 1,
    }
    gauges = [(name, value) for name, value, _ in recorded if not name.endswith("_total")]
    assert gauges[-2:] == [("corun_pool_labels", 6), ("corun_pool_bytes", 700)]
    assert all(labels == {"shard": "2"} for *_, labels in recorded)


def test_the_driver_s_gauges_are_mlflow_s_metrics_and_are_set_again_each_time(recorded):
    run = RunGauges(LABELS, 100)
    run.hold_metrics(
        {
            "loss/total": 2.0,
            "loss/pixel_real": 1.5,
            "optim/lr": 1e-4,
            "pool/win_rate": 0.5,
            "pool/trust": 0.7,
            "pool/labels": 9,
            "val/psnr": 20.0,
            "val/night/fade": 0.3,
            "rate/steps_per_s": 3.0,
        }
    )
    run.hold(prometheus.STEP, 7)
    run.hold(prometheus.STEP, 8)
    run.refresh()
    once = list(recorded)
    assert sorted((name, value, *labels.values()) for name, value, labels in once) == [
        ("corun_failed_writes", 0),
        ("corun_learning_rate", 1e-4),
        ("corun_loss", 1.5, "pixel_real"),
        ("corun_loss", 2.0, "total"),
        ("corun_restarts", 0),
        ("corun_step", 8),
        ("corun_steps_planned", 100),
        ("corun_trust_ratio", 0.7),
        ("corun_validation", 0.3, "val/night", "fade"),
        ("corun_validation", 20.0, "val", "psnr"),
        ("corun_win_ratio", 0.5),
    ]
    run.refresh()
    assert recorded[len(once) :] == once


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands unless it is turned."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.s)
    return now


def test_a_worker_s_loop_is_watched_from_wait_to_wait(recorded, clock):
    def stream():
        for wait_s, count in ((2.0, 3), (0.5, 3)):
            clock.s += wait_s
            yield {"index": np.arange(count)}

    pool = SimpleNamespace(waits=ReadWaits())
    worker = WorkerTelemetry(LABELS, 1, torch.device("cpu"), pool, None)
    for _ in worker.watch(stream()):
        clock.s += 1.0
        pool.waits.ready += 1
        pool.waits.waited_s += 0.25
        with worker.pause("checkpoint"):
            clock.s += 4.0
    by_name = {}
    for name, value, labels in recorded:
        assert labels.pop("rank") == "1"
        by_name.setdefault((name, *labels.values()), []).append(value)
    assert by_name == {
        ("corun_steps_total",): [1, 1],
        ("corun_images_total",): [3, 3],
        ("corun_data_wait_seconds_total",): [2.0, 0.5],
        ("corun_step_seconds",): [7.0, 5.5],
        ("corun_label_reads_total", "yes"): [1, 1],
        ("corun_label_wait_seconds_total",): [0.25, 0.25],
        ("corun_pause_seconds_total", "checkpoint"): [4.0, 4.0],
    }


def test_scores_are_timed_and_stay_the_same(clock):
    def slow(images):
        clock.s += 3.0
        return images.mean((1, 2, 3))

    plain = Coherence(slow, lambda images: images.amax((1, 2, 3)), 8, "multiplication")
    timed = TimedCoherence(plain, torch.device("cpu"))
    images = torch.rand(2, 3, 16, 16)
    for name in ("score_images", "score_blocks"):
        mine, its = getattr(timed, name)(images, images), getattr(plain, name)(images, images)
        assert torch.equal(mine.clarity, its.clarity) and torch.equal(mine.quality, its.quality)
    timed.score_images(images, images)
    assert {scope: watch.total_s() for scope, watch in timed.timers.items()} == {"global": 6.0, "blocks": 3.0}
    assert (timed.block_px, timed.combine) == (8, "multiplication")


class FakeEvent:
    """A CUDA event: the device comes to it when `device_s` is past it. Waiting for it would be a mistake."""

    device_s = 0.0
    next_s = iter(())

    def __init__(self, enable_timing):
        assert enable_timing
        self.at_s = None

    def record(self):
        self.at_s = next(FakeEvent.next_s)

    def query(self):
        return FakeEvent.device_s >= self.at_s

    def elapsed_time(self, other):
        return 1000 * (other.at_s - self.at_s)


def test_on_cuda_a_stopwatch_counts_what_the_device_has_done_and_never_waits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.next_s = iter((1.0, 3.0, 5.0, 5.5))
    watch = DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        with watch:
            pass
    totals = []
    for FakeEvent.device_s in (0.0, 4.0, 5.2, 6.0, 7.0):
        totals.append(watch.total_s())
    assert totals == [0.0, 2.0, 2.0, 2.5, 2.5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stopwatch_on_a_real_gpu():
    device = torch.device("cuda")
    watch, matrix = DeviceTimer(device), torch.rand(2048, 2048, device=device)
    with watch:
        for _ in range(20):
            matrix = matrix @ matrix / 1024
    torch.cuda.synchronize()
    assert 0 < watch.total_s() < 10
