"""`bench pool`: every figure is there. None is held against a limit, machines being what they are."""

import json
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
import ray

from corun_ray.bench.label_pool import load, probe
from corun_ray.bench.label_pool.figures import (
    STEP_S,
    PoolSettings,
    Save,
    Tick,
    list_levels,
    summarise_job,
    summarise_latency,
)
from corun_ray.bench.label_pool.load import Crew, LabelMaker
from corun_ray.bench.label_pool.report import count_float32_bytes, format_json, format_number, format_report, plot
from corun_ray.bench.label_pool.trial import bench_pool
from corun_ray.core.training.labels import supersedes
from corun_ray.service.pool.client import PoolError
from corun_ray.service.pool.keeper import PoolKeeper, start_pool
from corun_ray.service.storage import locate

MAY_BE_ZERO = {"late_share_of_steps", "object_store_bytes_per_label", "index_bytes_per_label"}
"""The last two because other objects may come and go beside so few labels."""


def figures_of(node, path=()):
    """Every number of a report by its path."""
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from figures_of(value, (*path, name))
    elif isinstance(node, int | float):
        yield path, node


@pytest.fixture(scope="module")
def report(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    told = []
    settings = PoolSettings(60, 32, (1, 2), "uint8", memory_mib=64, workers=4, job_s=0.6)
    with pytest.MonkeyPatch.context() as faster:
        faster.setattr(load, "PROCESSES", 2)
        faster.setattr(probe, "REPORT_S", 0.2)
        found = list(bench_pool(settings, locate(str(folder)), lambda done, what: told.append((done, what))))[-1]
    assert list(folder.rglob("*.parquet")) == []
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == 120
    assert told[0][1] == "1 shard: warming up" and told[-1][1] == "2 shards: 4 workers with 60 labels"
    return found


def test_every_figure_is_there(report):
    figures = dict(figures_of(json.loads(format_json(report))))
    assert all(math.isfinite(value) for value in figures.values())
    assert [path for path, value in figures.items() if value <= 0 and path[-1] not in MAY_BE_ZERO] == []
    for number_of_shards, series in zip((1, 2), report.series, strict=True):
        assert series.shards == number_of_shards
        assert [level.labels for level in series.levels] == [30, 60]
        assert series.job.worker_steps == series.job_in_lockstep.worker_steps == 4 * 2
        assert series.job_beyond_memory is None, "all labels are in memory"
        for level in series.levels:
            assert level.memory.counted_bytes_per_label == pytest.approx(4 * 32 * 32 + 2 * 4)
    assert {"cores", "memory_bytes", "ray", "pyarrow", "python"} <= set(report.machine)


def test_the_table_names_what_it_shows(report):
    text = format_report(report)
    assert "60 labels of 32 px in uint8" in text and "1 shard " in text and text.count("4 workers") == 2
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_plot_is_a_picture(report):
    image = cv2.imdecode(np.frombuffer(plot(report), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape[0] > 400 and image.std() > 10


def test_a_pool_that_lacks_a_label_is_not_measured(local_ray, tmp_path):
    place = locate(str(tmp_path))
    shards = start_pool(1, place)
    crew = Crew(32, "uint8")
    crew.join(shards, PoolKeeper(shards, place).restore(None))
    crew.offer([1, 2], 0)
    with pytest.raises(PoolError, match="1 of 3 labels could not be read"):
        crew.read([1, 2, 3], 3)
    crew.end()
    ray.kill(shards[0])


def test_latency_is_summed_up_in_milliseconds():
    found = summarise_latency([0.001 * i for i in range(101)])
    assert (found.samples, found.median_ms, found.mean_ms, found.p99_ms) == pytest.approx((101, 50, 50, 99))
    with pytest.raises(ValueError, match="no samples"):
        summarise_latency([])


def test_a_job_is_summed_up_by_worker_and_step():
    job = summarise_job([Tick(0.03, 0.001, 0.0), Tick(0.06, 0.003, 0.5 * STEP_S)], steps=2, shard_cpu_s=0.1)
    assert job.worker_steps == 2 and job.late_share_of_steps == 0.5
    assert job.blocked_share_of_step == pytest.approx(0.045 / STEP_S)
    assert job.worker_cpu_s_per_step == pytest.approx(0.002)
    assert job.shard_cpu_s_per_step == pytest.approx(0.05)


def test_snapshots_add_up():
    assert Save(1, 2, 3) + Save(10, 20, 30) == Save(11, 22, 33)


@pytest.mark.parametrize(
    ("labels", "levels"),
    [
        (60, [30, 60]),
        (600, [30, 100, 300, 600]),
        (5000, [100, 300, 1000, 3000, 5000]),
        (100_000, [1000, 3000, 10_000, 30_000, 100_000]),
    ],
)
def test_levels_span_two_decades(labels, levels):
    assert list_levels(labels) == levels


@pytest.mark.parametrize(
    ("value", "text"),
    [(33_000.4, "33,000"), (99.96, "100"), (2.345, "2.35"), (0.02, "0.02"), (0.00042, "0.0004"), (0, "0.0000")],
)
def test_numbers_have_no_exponent(value, text):
    assert format_number(value) == text


def test_a_label_at_full_precision_is_as_large_as_the_method_has_it():
    assert count_float32_bytes(288) == 1_658_880


@pytest.mark.parametrize("encoding", ["uint8", "float16", "float32"])
def test_synthetic_labels_are_like_real_ones(encoding):
    maker = LabelMaker(64, encoding)
    one, again, other, later = (maker.make(*which) for which in ((3, 1), (3, 1), (11, 1), (3, 2)))
    assert one.key == "0000003.jpg" and one.scene.dtype == encoding and one.block_clarity.shape == (2, 2)
    assert one.scene.shape == (3, 64, 64) and one.transmission.shape == (1, 64, 64)
    assert PoolSettings(1, 64, (1,), encoding, 1, 1).label_bytes == one.scene.nbytes + one.transmission.nbytes
    assert np.array_equal(one.scene, again.scene) and not np.array_equal(one.scene, other.scene)
    assert supersedes(later.scores, one.scores) and not supersedes(one.scores, later.scores)


def test_a_wrong_request_is_refused_before_anything_starts(tmp_path):
    command = [sys.executable, "-m", "corun_ray", "bench", "pool", "--memory-mib", "5", "--storage", "/nowhere"]
    result = subprocess.run([*command, "--json", tmp_path / "no" / "a.json"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "--memory-mib: 5 is too few for such labels (at least 64)",
        f"--json: there is no folder {tmp_path / 'no'}",
        "--storage: there is no folder /nowhere",
    ]
