import os
import time

import numpy as np
import psutil
import pytest
import ray

from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.stream import BlockLayout, StreamTask, iterate_batches, plan_remaining_phases, split_stream
from corun_ray.service.train.board import start_board
from tests.service.jobs import small_job


@ray.remote(num_cpus=0)
def drain(shard, layout, rank):
    taken = iterate_batches(shard, layout, rank)
    return [(batch["index"].tolist(), batch["hazy"].shape, batch.get("key")) for batch in taken]


def read_stream(job, step, first, workers):
    """What each rank is given: step → rank → (indices, shape, keys)."""
    board = start_board()
    manifest = ray.put(build_manifest(job))
    steps = []
    for phase, layout in plan_remaining_phases(job, step, first, workers):
        shards = split_stream(StreamTask(job, manifest, board, layout, phase.patch_px))
        per_rank = ray.get([drain.remote(shard, layout, rank) for rank, shard in enumerate(shards)])
        steps += zip(*per_rank, strict=True)
    return steps


def test_steps_take_the_stream_in_order_at_any_number_of_workers(local_ray, dataset, tmp_path):
    """One global batch is the same four samples, whether one worker takes it or two; a restart resumes in it."""
    one = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 4, "steps": 20})
    two = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 2, "steps": 20}, cluster={"workers": 2})
    alone = read_stream(one, 0, 0, 1)
    together = read_stream(two, 0, 0, 2)
    resumed = read_stream(two, 2, 8, 2)

    def per_step(steps):
        return [[sum((list(rank[part]) for rank in step), []) for part in (0, 2)] for step in steps]

    assert [indices for indices, _ in per_step(alone)] == [list(range(4 * s, 4 * s + 4)) for s in range(20)]
    assert per_step(together) == per_step(alone)
    assert per_step(resumed) == per_step(alone)[2:]


def test_phases_follow_each_other_without_a_gap_also_after_a_restart_within_one(local_ray, dataset, tmp_path):
    sections = {
        "train": {
            "batch_per_worker": 1,
            "steps": 7,
            "progressive": [
                {"from_step": 2, "patch_px": 48, "batch_per_worker": 2},
                {"from_step": 5, "patch_px": 64, "batch_per_worker": 1},
            ],
        },
        "cluster": {"workers": 2},
    }
    job = small_job("pretrain", dataset, tmp_path, **sections)
    whole = read_stream(job, 0, 0, 2)
    indices = [[index for rank in step for index in rank[0]] for step in whole]
    assert sum(indices, []) == list(range(2 * 2 + 3 * 4 + 2 * 2))
    assert [len(step) for step in indices] == [2, 2, 4, 4, 4, 2, 2]
    shapes = [(1, 32)] * 2 + [(2, 48)] * 3 + [(1, 64)] * 2
    assert [step[0][1] for step in whole] == [(batch, side, side, 3) for batch, side in shapes]
    assert read_stream(job, 3, 8, 2) == whole[3:]


def test_a_stream_out_of_order_is_an_error():
    class Shard:
        def iter_batches(self, **options):
            yield {"index": np.array([0])}
            yield {"index": np.array([2])}

    taken = iterate_batches(Shard(), BlockLayout(0, 2, 1, 1), 0)
    next(taken)
    with pytest.raises(RuntimeError, match=r"given samples \[2\], expected 1"):
        next(taken)


def is_decoding():
    """Whether a task of this process's own Ray makes samples."""
    ours = psutil.Process().children(recursive=True)
    return any("ReadRange" in process.name() for process in ours)


def test_a_stream_that_is_ahead_leaves_the_processor_alone(local_ray, dataset, tmp_path):
    """Ray Data's scheduler would look for work without a pause, once it has made as much as it may."""
    job = small_job(
        "pretrain", dataset, tmp_path, train={"batch_per_worker": 8, "steps": 20_000}, data={"patch_px": 512}
    )
    ((phase, layout),) = plan_remaining_phases(job, 0, 0, 1)
    task = StreamTask(job, ray.put(build_manifest(job)), start_board(), layout, phase.patch_px)
    (shard,) = split_stream(task)
    stream = iterate_batches(shard, layout, 0)
    next(stream)
    quiet_looks, deadline_s = 0, time.monotonic() + 120
    while quiet_looks < 6 and time.monotonic() < deadline_s:
        time.sleep(0.5)
        quiet_looks = 0 if is_decoding() else quiet_looks + 1
    assert quiet_looks == 6, "it gets no further than it may"
    coordinator = psutil.Process(ray.get(shard._coord_actor.__ray_call__.remote(lambda actor: os.getpid())))
    before_s, since_s = coordinator.cpu_times().user, time.monotonic()
    time.sleep(3)
    assert coordinator.cpu_times().user - before_s < 0.4 * (time.monotonic() - since_s)
    assert next(stream)["index"].tolist() == [*range(8, 16)], "and resumes"
