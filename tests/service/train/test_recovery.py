"""The checkpoint from which a run resumes when Ray Train is started again on its folder."""

import json

import pytest
import ray
from torch import nn

from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoint_record import TRAINING_FILE
from corun_ray.core.training.checkpoints import save_run
from corun_ray.core.training.state import TrainState
from corun_ray.service.runs.record import name_checkpoint
from corun_ray.service.storage import locate
from corun_ray.service.train.recovery import STATE_FILE, find_last_step, find_start_checkpoint


@pytest.fixture
def run(tmp_path):
    """A run's folder with complete checkpoints of steps 6 and 12 that Ray Train has registered."""
    for step in (6, 12):
        state = TrainState.start(nn.Conv2d(3, 3, 1))
        state.step = step
        folder = tmp_path / name_checkpoint(step)
        folder.mkdir()
        save_run(folder, state, NetworkSpec("a:B", {}), {"pool_snapshot": None})
    place = locate(str(tmp_path))
    place.child(STATE_FILE).write(listing(6, 12))
    return place


def listing(*steps, version=ray.__version__):
    results = [{"checkpoint_dir_name": name_checkpoint(step), "metrics": {}} for step in steps]
    return json.dumps({"ray_version": version, "checkpoint_results": results}).encode()


def truncate(run, step):
    file = run.child(name_checkpoint(step)).child(TRAINING_FILE)
    file.write(file.read()[:-20])


def test_ray_train_s_own_list_comes_first(run):
    assert find_start_checkpoint(run) is None and run.child(STATE_FILE).exists()
    assert find_last_step(run) == 12


@pytest.mark.parametrize(
    "content", [b"", listing(6, 12)[:-9], b"[]", b"{}", listing(6, 12, 18), listing(6, version="2.0.0")]
)
def test_a_list_that_is_damaged_or_names_what_is_not_there_gives_way_to_the_folders(run, content):
    run.child(STATE_FILE).write(content)
    assert find_start_checkpoint(run) == run.child(name_checkpoint(12)).uri
    assert not run.child(STATE_FILE).exists(), "Ray Train would refuse to start"


def test_half_a_checkpoint_is_never_taken_for_a_good_one(run):
    run.child(STATE_FILE).delete()
    truncate(run, 12)
    assert find_start_checkpoint(run) == run.child(name_checkpoint(6)).uri and find_last_step(run) == 6
    truncate(run, 6)
    assert find_start_checkpoint(run) is None and find_last_step(run) is None


def test_a_run_without_checkpoints_begins(tmp_path):
    run = locate(str(tmp_path / "run"))
    assert not run.exists()
    run.child("job.yaml").write(b"kind: pretrain")
    assert find_start_checkpoint(run) is None and find_last_step(run) is None
