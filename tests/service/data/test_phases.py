"""How a run is cut: phases of one size, and the blocks that give each rank its batches."""

import numpy as np
import pytest

from corun_ray.service.data.stream import BlockLayout, StreamPhase, plan_phases, plan_remaining_phases
from tests.service.jobs import small_job

PROGRESSIVE = [
    {"from_step": 4, "patch_px": 48, "batch_per_worker": 2},
    {"from_step": 9, "patch_px": 64, "batch_per_worker": 1},
]


@pytest.fixture
def progressive(dataset, tmp_path):
    train = {"steps": 12, "batch_per_worker": 3, "progressive": PROGRESSIVE}
    return small_job("pretrain", dataset, tmp_path, train=train)


@pytest.mark.parametrize("kind", ["pretrain", "colabator"])
def test_without_later_sizes_a_run_is_one_phase(kind, dataset, tmp_path):
    job = small_job(kind, dataset, tmp_path, train={"steps": 40, "batch_per_worker": 2})
    assert plan_phases(job) == [StreamPhase(0, 40, 32, 2)]
    assert plan_remaining_phases(job, 0, 0, 3) == [(StreamPhase(0, 40, 32, 2), BlockLayout(0, 40, 2, 3))]
    assert plan_remaining_phases(job, 30, 180, 3) == [(StreamPhase(0, 40, 32, 2), BlockLayout(180, 10, 2, 3))]
    assert plan_remaining_phases(job, 40, 240, 3) == []


def test_blocks_of_larger_samples_last_fewer_steps_and_hold_the_same_batches(dataset, tmp_path):
    train = {"steps": 40, "batch_per_worker": 2}
    layouts = []
    for place in ("stream", "worker"):
        job = small_job("pretrain", dataset, tmp_path, train=train, data={"synthesis": place})
        layouts.append(plan_remaining_phases(job, 0, 0, 2)[0][1].steps_per_block)
        assert global_batches(job, 0, 0, 2) == np.arange(160).reshape(40, 4).tolist()
    assert layouts == [14, 4]


def test_each_phase_ends_where_the_next_starts(progressive):
    assert plan_phases(progressive) == [StreamPhase(0, 4, 32, 3), StreamPhase(4, 9, 48, 2), StreamPhase(9, 12, 64, 1)]


def test_a_step_takes_all_its_batches_from_the_stream(dataset, tmp_path):
    train = {"steps": 12, "batch_per_worker": 3, "accumulate": 4, "progressive": PROGRESSIVE}
    job = small_job("pretrain", dataset, tmp_path, train=train)
    assert plan_phases(job) == [StreamPhase(0, 4, 32, 12), StreamPhase(4, 9, 48, 8), StreamPhase(9, 12, 64, 4)]


@pytest.mark.parametrize(
    "steps, last", [(9, StreamPhase(4, 9, 48, 2)), (6, StreamPhase(4, 6, 48, 2)), (4, StreamPhase(0, 4, 32, 3))]
)
def test_phases_stop_with_the_run(steps, last, dataset, tmp_path):
    """Whatever the job file may name beyond its last step."""
    train = {"steps": 12, "batch_per_worker": 3, "progressive": PROGRESSIVE}
    job = small_job("pretrain", dataset, tmp_path, train=train)
    shorter = job.model_copy(update={"train": job.train.model_copy(update={"steps": steps})})
    assert plan_phases(shorter)[-1] == last


def global_batches(job, step, num_images_seen, workers):
    """The samples of each step on all ranks, read as the ranks would: block after block."""
    steps = []
    for phase, layout in plan_remaining_phases(job, step, num_images_seen, workers):
        rows = np.arange(layout.num_blocks * layout.rows_per_block).reshape(-1, workers, layout.rows_per_block)
        samples = layout.map_rows_to_samples(rows)
        ranks = [samples[:, rank].reshape(-1, phase.batch)[: layout.num_steps] for rank in range(workers)]
        steps += np.concatenate(ranks, axis=1).tolist()
    return steps


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_are_counted_on_across_phases_and_restarts(progressive, workers):
    whole = global_batches(progressive, 0, 0, workers)
    assert [len(step) for step in whole] == [size * workers for size in [3] * 4 + [2] * 5 + [1] * 3]
    assert sum(whole, []) == list(range(25 * workers))
    for step in range(13):
        seen = sum(len(batch) for batch in whole[:step])
        assert global_batches(progressive, step, seen, workers) == whole[step:]


@pytest.mark.parametrize("num_steps, batch, workers", [(1, 1, 1), (16, 2, 3), (17, 1, 2), (100, 3, 4), (90_000, 1, 5)])
def test_the_layout_gives_each_rank_its_batches_in_order(num_steps, batch, workers):
    """Whatever the cut, the r-th rank's blocks, read in turn, are the r-th batch of each step."""
    layout = BlockLayout(1000, num_steps, batch, workers)
    assert layout.num_blocks <= 20_000 and layout.blocks_per_worker * layout.steps_per_block >= num_steps
    rows = np.arange(layout.num_blocks * layout.rows_per_block).reshape(-1, workers, layout.rows_per_block)
    samples = layout.map_rows_to_samples(rows)
    for rank in range(workers):
        mine = samples[:, rank].reshape(-1, batch)[:num_steps]
        steps = np.arange(num_steps)[:, None]
        assert np.array_equal(mine, 1000 + (steps * workers + rank) * batch + np.arange(batch))
