"""A run of 20 steps against the same run stopped after step 15 and resumed, also by another number of workers."""

import shutil
from pathlib import Path

import pytest
import torch

from corun_ray.core.training.checkpoint_record import TRAINING_FILE, read_record
from corun_ray.core.weights import read_tensors
from corun_ray.service.pool import snapshots
from corun_ray.service.runs.record import find_last_run, list_checkpoint_steps, name_checkpoint
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job

NETWORK_FOLDER = Path(__file__).parents[1]
"""Of `traced.py`, which has the class of the network."""


def traced_job(dataset, folder, steps, workers=1, accumulate=1):
    """Four samples a step, by one worker or several, at once or in parts."""
    folder.mkdir(exist_ok=True)
    return small_job(
        "colabator",
        dataset,
        folder,
        network={"type": "traced:Traced", "args": {"trace": str(dataset.parent / "trace.txt")}},
        train={
            "steps": steps,
            "batch_per_worker": 4 // workers // accumulate,
            "accumulate": accumulate,
            "log_every": 10,
            "checkpoint_every": 5,
        },
        cluster={"workers": workers},
        pool={"shards": 2},
        optim={"lr": 1e-3, "min_lr": 1e-5, "schedule_steps": 20, "ema": 0.9},
        tracking={"uri": f"sqlite:///{dataset.parent}/mlflow.db"},
    )


def train(job, dataset, resume=False):
    """Runs the job; returns the steps that it traced: the digests of all ranks in order, synthetic then real."""
    trace = dataset.parent / "trace.txt"
    trace.write_text("")
    run_training(job, Console(), NETWORK_FOLDER, resume)
    lines = [line.split() for line in trace.read_text().splitlines()]
    ranks = [[line[1:] for line in lines if line[0] == str(rank)] for rank in range(job.cluster.max_workers)]
    ranks = [passes[-len(ranks[0]) :] for passes in ranks]
    half, parts = job.train.batch_per_worker, job.train.accumulate
    # A rank's passes of a step follow each other, and the ranks' samples do.
    steps = [[one for rank in ranks for one in rank[i : i + parts]] for i in range(0, len(ranks[0]), parts)]
    return [([d for one in step for d in one[:half]], [d for one in step for d in one[half:]]) for step in steps]


@pytest.fixture(scope="module")
def runs(local_ray, dataset, tmp_path_factory):
    """A whole run, and two copies of it that lost all after step 15 and were resumed."""
    root = tmp_path_factory.mktemp("resume")
    data = shutil.copytree(dataset, root / "data")
    whole = train(traced_job(data, root / "whole", 20), data)

    # The labels of step 20 are left: a crash between saving the labels and the checkpoint leaves as much.
    for name in ("stopped", "two"):
        shutil.copytree(root / "whole", root / name)
        shutil.rmtree(last(root / name, data)[1])
    resumed = train(traced_job(data, root / "stopped", 20), data, resume=True)
    by_two = train(traced_job(data, root / "two", 20, workers=2, accumulate=2), data, resume=True)
    return root, data, whole, resumed, by_two


def last(folder, data):
    """The run's folder and its last checkpoint."""
    run = find_last_run(traced_job(data, folder, 20))
    return run, Path(run.path) / name_checkpoint(20)


def final_labels(run):
    """Scores and steps of the labels at the end."""
    pool = run.child("pool")
    content = snapshots.read_index(pool, snapshots.read(pool.child(snapshots.format_name(20))))
    return {key: head for key, (head, _) in content.items()}


def test_the_same_samples_come_in_the_same_order(runs):
    _, _, whole, resumed, by_two = runs
    whole = whole[-20:]  # the network is tried once before the training
    assert len(whole) == 20
    assert resumed[-5:] == whole[15:] and by_two[-5:] == whole[15:]
    assert len(resumed) == len(by_two) == 5, "only what was lost is trained again"
    assert len({digest for step in whole for part in step for digest in part}) > 100, "no two samples are the same"


def test_with_one_worker_the_final_weights_and_labels_are_those_of_the_whole_run(runs):
    root, data, *_ = runs
    (whole, one), (resumed, other) = (last(root / name, data) for name in ("whole", "stopped"))
    ours, theirs = (read_tensors(folder / TRAINING_FILE)[0] for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
    mine, others = (final_labels(run) for run in (whole, resumed))
    assert mine == others and len(mine) == 6


def test_snapshots_go_with_the_checkpoints_that_name_them(runs):
    root, data, *_ = runs
    for name in ("whole", "stopped", "two"):
        run, _ = last(root / name, data)
        found = {snapshots.parse_step(file) for file in run.child("pool").list_files()} - {None}
        assert found == {15, 20} == set(list_checkpoint_steps(run)), "keep_checkpoints is 2"


def test_the_counters_and_positions_go_on(runs):
    root, data, *_ = runs
    for name in ("whole", "stopped", "two"):
        run, folder = last(root / name, data)
        record = read_record(folder)
        assert (record["step"], record["num_images_seen"]) == (20, 80)
        pool = run.child("pool")
        total = snapshots.sum_counters(snapshots.read(pool.child(snapshots.format_name(20))))
        assert total.reads >= 80 and sum(total.wins_by_step.values()) == total.wins


def test_a_run_that_has_ended_is_passed_over(runs, capsys):
    root, data, *_ = runs
    assert train(traced_job(data, root / "stopped", 20), data, resume=True) == []
    assert "has ended before" in capsys.readouterr().out
